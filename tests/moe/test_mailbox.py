"""Ranks of one machine exchange through memory: the same as gloo brings, and gloo brings it where that cannot be."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from elastic_moe.parallel import mailbox as mailboxes
from elastic_moe.parallel.barrier import PeerGone
from elastic_moe.parallel.collectives import GatherByMailbox, ReduceByExchange, RowsByMailbox
from elastic_moe.parallel.mailbox import Mailbox, PeerSlot, Slot, open_mailbox
from elastic_moe.pool import Pool
from elastic_moe.torch_private import exchange_rows
from tests import sample
from tests.ranks import Ranks


def opened() -> Mailbox:
    assert dist.group.WORLD is not None
    found = open_mailbox(dist.group.WORLD)
    assert found is not None
    return found


def sent(sender: int, receiver: int, turn: int) -> Tensor:
    """What a rank sends another, of another length each time: none, a few bytes, or more than any time before."""
    num = [0, 3, 1000, 70_000 * (turn + 1)][(sender + 2 * receiver + turn) % 4]
    return torch.arange(num, dtype=torch.int32) + 100 * sender + 10 * receiver + turn


def exchanges() -> list[str]:
    """What arrived otherwise than it was sent, one rank coming later than the other each time."""
    rank, size, mailbox, wrong = dist.get_rank(), dist.get_world_size(), opened(), []
    for turn in range(30):
        if turn % size == rank:
            torch.randn(200, 200) @ torch.randn(200, 200)
        found = mailbox.exchange([sent(rank, other, turn) for other in range(size)])
        for other, part in enumerate(found):
            expected = None if other == rank else sent(other, rank, turn)
            if (part is None) != (expected is None) or (
                part is not None and expected is not None and not torch.equal(part.view(torch.int32), expected)
            ):
                wrong.append(f"turn {turn}, from {other} to {rank}")
    return wrong


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_gets_what_the_others_have_for_it(ranks: Ranks, world_size: int) -> None:
    assert ranks.run(exchanges, world_size=world_size) == [[]] * world_size


def drawn(seed: int, num_turns: int, dying: int | None = None) -> str:
    """Exchange parts of drawn sizes, after drawn pauses; one rank ends in the midst. What a peer's end looked like."""
    rank, size, mailbox = dist.get_rank(), dist.get_world_size(), opened()
    last = random.Random(seed).randrange(num_turns)
    for turn in range(num_turns):
        draw = random.Random(f"{seed} {turn}")
        num = [[draw.choice((0, 1, 100, 2000 * turn)) for _ in range(size)] for _ in range(size)]
        pauses_s = [draw.random() * 2e-3 for _ in range(size)]
        time.sleep(pauses_s[rank])
        if rank == dying and turn == last:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            found = mailbox.exchange([torch.full((n,), 100 * rank + turn % 100) for n in num[rank]])
        except PeerGone as error:
            return str(error)
        for other, part in enumerate(found):
            if part is not None:
                expected = torch.full((num[other][rank],), 100 * other + turn % 100)
                assert torch.equal(part.view(torch.int64), expected), (seed, turn, other)
    return ""


@pytest.mark.parametrize("world_size", [3, sample.rest(16)])
def test_ranks_that_are_stopped_and_go_on_meet_all_the_same(ranks: Ranks, world_size: int) -> None:
    seed, over = random.randrange(1 << 30), threading.Event()
    print(f"seed {seed}")
    pids = ranks.pids(world_size)

    def disturb() -> None:
        draw = random.Random(seed)
        while not over.is_set():
            pid = draw.choice(pids)
            os.kill(pid, signal.SIGSTOP)
            over.wait(draw.random() * 0.01)
            os.kill(pid, signal.SIGCONT)
            over.wait(draw.random() * 0.01)

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    try:
        assert ranks.run(drawn, seed, 100, world_size=world_size) == [""] * world_size
    finally:
        over.set()
        disturbing.join()


def test_a_rank_that_is_killed_is_missed_by_all_others(ranks: Ranks) -> None:
    """Also by those that no pipe joins to it: who fails before them leaves the others' pipes."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    dying = seed % 6
    told = ranks.run_losing([dying], drawn, seed, 100, dying, world_size=6)
    assert sorted(told) == sorted({*range(6)} - {dying})
    assert all(re.search(r"rank \d (cannot be told|has closed its connection)", said) for said in told.values()), told


def opened_again(times: int) -> int:
    """How many more descriptors are open after so many mailboxes, as of restarts within one process."""
    gc.collect()
    before = _num_open()
    for turn in range(times):
        mailbox = opened()
        mailbox.exchange([torch.tensor([turn])] * dist.get_world_size())
        del mailbox
    gc.collect()
    return _num_open() - before


def test_no_restart_leaves_descriptors_open(ranks: Ranks) -> None:
    assert ranks.run(opened_again, 200, world_size=3) == [0, 0, 0]


def as_fsdp2_asks(dtype: torch.dtype) -> list[str]:
    """Which of our collectives give something else than torch's, with a mailbox and without."""
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    assert group is not None
    wrong, mailbox = [], opened()
    for turn in range(4):
        draw = torch.Generator().manual_seed(10 * rank + turn)
        given = torch.randint(-50, 50, (size * (5 + turn),), generator=draw).to(dtype)  # no sum of them is rounded
        expected, got = given.new_empty(len(given) // size), given.new_empty(len(given) // size)
        dist.reduce_scatter_tensor(expected, given)
        for name, box in (("mailbox", mailbox), ("gloo", None)):
            reduce = ReduceByExchange(box, Pool())
            before = given.clone()
            reduce(output_tensor=got.fill_(-1), input_tensor=given, group=group, op=dist.ReduceOp.SUM)
            if not torch.equal(got, expected) or not torch.equal(given, before):
                wrong.append(f"reduce, {name}")
        every = given.new_empty(size * len(expected))
        dist.all_gather_into_tensor(every, expected)
        gather = GatherByMailbox(mailbox, Pool())
        output = gather.allocate((len(every),), dtype=dtype, device=every.device).fill_(-1)
        own = output.view(size, -1)[rank]
        own.copy_(expected)
        gather(output_tensor=output, input_tensor=own, group=group)
        if not torch.equal(output, every):
            wrong.append("gather")
    return wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_our_collectives_give_what_torchs_do(ranks: Ranks, dtype: torch.dtype) -> None:
    assert ranks.run(as_fsdp2_asks, dtype, world_size=3) == [[]] * 3


SPLITS = [[2, 0, 3], [1, 4, 0], [0, 0, 0]]
"""Rows from each rank to each; one sends nothing."""


def rows_both_ways() -> list[str]:
    """Whether rows and their gradients are those of gloo's exchange."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    send, receive = SPLITS[rank], [of[rank] for of in SPLITS]
    found: list[tuple[Tensor, Tensor]] = []
    for mailbox in (opened(), None):
        x_RD = (torch.arange(4.0 * sum(send)).view(-1, 4) + 100 * rank).requires_grad_()
        if mailbox is None:
            y_QD = exchange_rows(x_RD, send, receive, group)
        else:
            y_QD = RowsByMailbox.apply(x_RD, send, receive, mailbox)
        (grad,) = torch.autograd.grad((y_QD * (rank + 1)).sum(), x_RD)
        found.append((y_QD.detach(), grad))
    names = ("rows", "gradients")
    return [name for name, mine, its in zip(names, *found, strict=True) if not torch.equal(mine, its)]


def test_rows_and_gradients_travel_as_by_gloo(ranks: Ranks) -> None:
    assert ranks.run(rows_both_ways, world_size=3) == [[]] * 3


def apart(which: int) -> tuple[bool, list[str], int]:
    """One rank is on another machine, or sees no other's memory, or has none to show: whether there is a mailbox, what
    the log says of it, and how many more descriptors are open."""
    told: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    gc.collect()  # of models before this test
    before, boot_id, peer_slot, slot = _num_open(), mailboxes._boot_id, mailboxes.PeerSlot, mailboxes.Slot

    def unseen(*_: int) -> PeerSlot:
        raise PermissionError("not to be seen")

    def refused() -> Slot:
        raise PermissionError("memfd_create was refused")

    if dist.get_rank() == 1:
        if which == 0:
            mailboxes._boot_id = lambda: (1, 2)
        elif which == 1:
            mailboxes.PeerSlot = unseen  # type: ignore[assignment,misc]
        else:
            mailboxes.Slot = refused  # type: ignore[assignment,misc]
    ear, level = Ear(), mailboxes.log.level
    mailboxes.log.addHandler(ear)
    mailboxes.log.setLevel(logging.INFO)
    try:
        assert dist.group.WORLD is not None
        found = open_mailbox(dist.group.WORLD)
    finally:
        mailboxes.log.removeHandler(ear)
        mailboxes.log.setLevel(level)
        mailboxes._boot_id, mailboxes.PeerSlot, mailboxes.Slot = boot_id, peer_slot, slot  # type: ignore[misc]
    gc.collect()
    return found is not None, told, _num_open() - before


@pytest.mark.parametrize(("which", "why"), [(0, "several machines"), (1, "sees no mailbox"), (2, "No such file")])
def test_where_one_rank_is_apart_all_go_by_gloo_and_say_why(ranks: Ranks, which: int, why: str) -> None:
    found = ranks.run(apart, which, world_size=2)
    assert [opened for opened, _, _ in found] == [False, False]
    assert all(len(told) == 1 and "gloo carries" in told[0] for _, told, _ in found)
    assert why in found[0][1][0]
    assert [num_left for _, _, num_left in found] == [0, 0], "descriptors are left open"


def _num_open() -> int:
    """Descriptors of mailboxes, and pipes: others come and go with what else there is in this process."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the list itself, say
            found += os.readlink(f"/proc/self/fd/{name}").startswith(("/memfd:elastic-moe mailbox", "pipe:"))
    return found


def test_a_strange_descriptor_is_refused_at_once(tmp_path: Path) -> None:
    slot, (reading, writing) = Slot(), os.pipe()
    small = os.open(tmp_path / "small", os.O_CREAT | os.O_RDWR)
    try:
        for fd, secret, why in (
            (reading, 1, "no mailbox"),
            (small, 1, "no mailbox"),
            (slot.fd, slot.secret + 1, "another"),
        ):
            with pytest.raises(OSError, match=why):
                PeerSlot(os.getpid(), fd, secret)
    finally:
        for fd in (reading, writing, small):
            os.close(fd)
    with pytest.raises(OSError):
        PeerSlot(os.getpid(), slot.fd + 1000, slot.secret)


def test_what_all_get_is_written_once_and_nothing_stays_open() -> None:
    gc.collect()
    before = _num_open()
    slot = Slot()
    peer = PeerSlot(os.getpid(), slot.fd, slot.secret)
    part = torch.arange(1 << 19, dtype=torch.int32)
    slot.lay([part, part, part])
    assert [torch.equal(peer.part(rank).view(torch.int32), part) for rank in range(3)] == [True] * 3
    assert os.fstat(slot.fd).st_size < 2 * part.nbytes
    assert _num_open() == before + 2, "one of the owner's, and one of who reads"
    del slot, peer
    gc.collect()
    assert _num_open() == before


def test_what_was_laid_out_last_is_read_though_its_owner_is_gone() -> None:
    """It went on once all had met, and ended; what it had made room for was not mapped by then."""
    slot = Slot()
    peer = PeerSlot(os.getpid(), slot.fd, slot.secret)
    part = torch.arange(1 << 19, dtype=torch.int32)
    slot.lay([part])
    del slot
    gc.collect()
    assert torch.equal(peer.part(0).view(torch.int32), part)


def test_a_rank_that_cannot_map_its_mailbox_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peers wait to hear that it has none. So it is where the file in memory has taken the last descriptor."""
    map_of, none_such = torch.from_file, "/proc/self/fd/1048576"
    monkeypatch.setattr(torch, "from_file", lambda path, **how: map_of(none_such, **how))
    own, inbox, why = mailboxes._own_parts(2)
    assert not own and inbox is None and none_such in why
