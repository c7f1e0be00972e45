"""What is copied when, and that what is copied behind the training's back is the state of the save."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import optimizer as torch_optimizer

from storage.arena import moves, pending
from storage.arena import stager as stagers
from storage.arena.moves import Move, SharedWork
from storage.arena.stager import Staged
from storage.arena.staging import Staging
from storage.errors import UsageError
from storage.parallel import Pool
from tests.cluster import until
from tests.storage.staging_rig import Rig, copies, same

NUM_STAGINGS = int(os.environ.get("ARENA_STAGINGS", "100"))


@contextlib.contextmanager
def alone_in_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with contextlib.closing(Rig()) as made:
        yield made


def num_hooks() -> int:
    """How many watch the steps of all optimizers, without those whose stager nobody has any more."""
    gc.collect()
    return len(torch_optimizer._global_optimizer_pre_hooks)


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizers_step_waits_until_what_it_owns_is_copied(rig: Rig, name: str) -> None:
    optimizer = OPTIMIZERS[name](rig.model.parameters())
    rig.train(optimizer)
    named = rig.named(optimizer)
    expected = copies(named)
    staged = rig.stage(named)
    assert staged.is_pending
    assert not same(staged, expected), "nobody has copied anything yet"
    rig.train(optimizer)
    assert same(staged, expected)
    assert not same(staged, copies(rig.named(optimizer)))
    staged.wait()
    assert not rig.heard.changes
    staged.release()


def test_several_optimizers_and_several_backward_passes(rig: Rig) -> None:
    first = torch.optim.AdamW(rig.model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(rig.model[2].parameters(), lr=0.1)
    rig.train(first, second)
    named = rig.named(first, second)
    for order in ((first, second), (second, first)):
        expected = copies(named)
        staged = rig.stage(named)
        rig.train(*order, num_backwards=3)
        assert same(staged, expected)
        staged.wait()
        staged.release()


def test_a_second_save_before_the_step_leaves_the_first_as_it_was(rig: Rig) -> None:
    rig.arena._num_slots = 2
    optimizer = torch.optim.AdamW(rig.model.parameters(), lr=0.1)
    rig.train(optimizer)
    named = rig.named(optimizer)
    expected = copies(named)
    first, second = rig.stage(named), rig.stage(named)
    rig.train(optimizer)
    for staged in (first, second):
        staged.wait()
        assert same(staged, expected)
        staged.release()


def test_a_step_on_another_thread_waits_as_well(rig: Rig) -> None:
    """As where each parameter has an optimizer of its own, which steps in the backward pass."""
    optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in rig.model.parameters()]
    rig.train(*optimizers)
    expected = copies(rig.named())
    staged = rig.stage(rig.named())
    for parameter in rig.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    threads = [threading.Thread(target=optimizer.step) for optimizer in optimizers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(staged, expected)
    staged.release()


def test_what_no_optimizer_owns_is_copied_before_the_save_returns(rig: Rig) -> None:
    """Buffers change in the forward pass: those of a BatchNorm here."""
    optimizer = torch.optim.SGD(rig.model.parameters(), lr=0.1)
    rig.train(optimizer)
    named = [*rig.named(), ("averaged", torch.randn(100))]
    expected = copies(named)
    staged = rig.stage(named)
    owned = {name for name, _ in rig.model.named_parameters()}
    for (name, _), found, before in zip(named, staged.tensors, expected, strict=True):
        assert torch.equal(found, before) != (name in owned), name
    named[-1][1].zero_()
    rig.train(optimizer)
    assert same(staged, expected)
    staged.wait()
    staged.release()


def test_nothing_is_late_before_an_optimizer_has_stepped_or_with_one_that_torch_does_not_know(rig: Rig) -> None:
    class Own:
        """An optimizer that does not derive from torch's."""

        def step(self) -> None:
            for parameter in rig.model.parameters():
                parameter.data.add_(1)

    rig.train(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    expected = copies(rig.named())
    staged = rig.stage(rig.named())
    assert not staged.is_pending
    Own().step()
    assert same(staged, expected)


def test_synchronous_staging_watches_no_optimizer() -> None:
    before = num_hooks()
    sync = Rig(Staging.SYNC)
    optimizer = torch.optim.SGD(sync.model.parameters(), lr=0.1)
    sync.train(optimizer)
    expected = copies(sync.named())
    assert num_hooks() == before
    staged = sync.stage(sync.named())
    assert not staged.is_pending
    sync.train(optimizer)
    assert same(staged, expected)


def test_a_stager_that_is_closed_or_gone_leaves_no_hook() -> None:
    before = num_hooks()
    closed, gone = Rig(), Rig()
    assert num_hooks() == before + 2
    closed.stager.close()
    del gone
    gc.collect()
    assert num_hooks() == before


def test_sharded_parameters_are_the_optimizers_too(rig: Rig) -> None:
    with alone_in_group():
        fully_shard(rig.model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(rig.model.parameters(), lr=0.1, fused=True)
        rig.train(optimizer)
        named = [(name, getattr(t, "to_local", lambda t=t: t)()) for name, t in rig.named(optimizer)]
        expected = copies(named)
        staged = rig.stage(named)
        rows = zip(named, staged.tensors, expected, strict=True)
        late = {name for (name, _), found, before in rows if not torch.equal(found, before)}
        assert {"0.weight", "2.weight", "0.exp_avg"} <= late
        assert not {name for name in late if "running" in name}
        rig.train(optimizer)
        assert same(staged, expected)
        staged.wait()


# what goes wrong ----------------------------------------------------------------------------------------------------


def test_an_exception_between_save_and_step_leaves_the_next_save_as_usual(rig: Rig) -> None:
    optimizer = torch.optim.SGD(rig.model.parameters(), lr=0.1)
    rig.train(optimizer)
    expected = copies(rig.named())
    staged = rig.stage(rig.named())
    with contextlib.suppress(ZeroDivisionError):
        raise ZeroDivisionError
    staged.wait()
    assert same(staged, expected)
    staged.release()
    staged = rig.stage(rig.named())
    rig.train(optimizer)
    assert same(staged, expected)


def test_a_copy_that_fails_is_told_to_who_stores_it_and_not_to_the_step(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(moves: Sequence[Move]) -> None:
        raise RuntimeError("the memory is broken")

    optimizer = torch.optim.SGD(rig.model.parameters(), lr=0.1)
    rig.train(optimizer)
    monkeypatch.setattr(moves, "_copy_small", fails)
    with pytest.raises(RuntimeError, match="broken"):
        rig.stager.stage(rig.named())
    assert rig.arena.num_free == 1
    monkeypatch.undo()
    lazily = rig.model[0].weight
    staged = rig.stage([("w", lazily.detach())])
    staged._pending.work._calls.appendleft(lambda: fails([]))  # type: ignore[union-attr]
    staged._pending.work._num_left += 1  # type: ignore[union-attr]
    rig.train(optimizer)
    with pytest.raises(RuntimeError, match="broken"):
        staged.wait()
    staged.release()
    assert rig.arena.num_free == 1


def test_a_slot_is_free_once_nothing_is_written_into_it_any_more(rig: Rig) -> None:
    optimizer = torch.optim.SGD(rig.model.parameters(), lr=0.1)
    rig.train(optimizer)
    staged = rig.stage(rig.named())
    assert staged._pending is not None and not staged._pending.work.has_ended
    assert rig.arena.num_free == 0
    staged.release()
    assert staged._pending.work.has_ended
    assert rig.arena.num_free == 1


def test_lack_of_memory_is_raised_and_takes_no_slot(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stagers, "_ALIGNMENT_BYTES", 1 << 50)
    with pytest.raises(MemoryError, match="no room to stage"):
        rig.stage(rig.named())
    assert rig.arena.num_free == 1


def test_many_stagings_cost_one_slot(rig: Rig) -> None:
    rig.stager._pool = Pool(2)
    optimizer = torch.optim.AdamW(rig.model.parameters(), lr=0.1)
    rig.train(optimizer)
    hooks = num_hooks()
    made: list[weakref.ref[Staged]] = []
    for number in range(NUM_STAGINGS):
        staged = rig.stage(rig.named(optimizer))
        made.append(weakref.ref(staged))
        rig.train(optimizer)
        staged.wait()
        staged.release()
        if number == 0:
            size_bytes, descriptors = rig.arena.size_bytes, slots_open()
    assert rig.arena.size_bytes == size_bytes
    assert slots_open() <= descriptors  # others' may have gone meanwhile
    assert num_hooks() == hooks
    assert rig.stager._pending is None
    del staged

    def are_gone() -> bool:
        gc.collect()
        return not [found for found in made if found() is not None]

    until("all to be let go, by who has helped with one as well", are_gone)


def slots_open() -> int:
    found = 0
    for link in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += "memfd:elastic-moe-slot" in os.readlink(f"/proc/self/fd/{link}")
    return found


def test_a_slot_is_laid_out_anew_for_other_tensors_and_for_no_others(rig: Rig) -> None:
    """Two of the same number and size: only their kinds differ."""
    floats, ints = torch.randn(6, 4), torch.arange(24, dtype=torch.int32).reshape(4, 6)
    seen = []
    for tensor in (floats, floats + 1, ints, ints + 1, floats + 2):
        staged = rig.stager.stage([("a", tensor), ("b", tensor * 2)])
        assert [torch.equal(*pair) for pair in zip(staged.tensors, (tensor, tensor * 2), strict=True)] == [True] * 2
        assert [found.dtype for found in staged.tensors] == [tensor.dtype] * 2
        seen.append(staged.tensors[0])
        staged.release()
    is_same = [one is other for one, other in itertools.pairwise(seen)]
    assert is_same == [True, False, True, False]
    slot = rig.arena.take(1)
    assert slot is not None
    slot.close()
    assert slot.laid_out is None, "it would keep the memory of a slot that is another's by now"
    rig.arena.drop(slot)


def test_shared_work_is_done_once_by_all_that_help() -> None:
    done: list[int] = []
    ends: list[int] = []
    work = SharedWork([lambda n=n: done.append(n) for n in range(500)], lambda: ends.append(len(done)))
    helpers = [threading.Thread(target=work.help) for _ in range(3)]
    for helper in helpers:
        helper.start()
    work.wait()
    for helper in helpers:
        helper.join()
    assert sorted(done) == list(range(500))
    assert ends == [500]
    empty = SharedWork([])
    empty.wait()
    assert empty.has_ended


def test_shared_work_has_not_ended_before_its_end_was_made() -> None:
    began, gate = threading.Event(), threading.Event()

    def end() -> None:
        began.set()
        assert gate.wait(60)

    work = SharedWork([], end)
    helper = threading.Thread(target=work.help)
    helper.start()
    try:
        assert began.wait(60)
        assert not work.has_ended
    finally:
        gate.set()
        helper.join()
    work.wait()


def test_the_first_failure_of_shared_work_leaves_out_the_rest() -> None:
    done: list[int] = []

    def fails() -> Any:
        raise ValueError("first")

    work = SharedWork([lambda: done.append(1), fails, lambda: done.append(2)])
    for _ in range(2):
        with pytest.raises(ValueError, match="first"):
            work.wait()
    assert done == [1]


def test_a_rank_copies_with_its_share_of_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    for local, expected in (("1", 8), ("16", 4), ("100", 1), ("", 8)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert moves.num_copy_threads() == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "none")
    with pytest.raises(UsageError, match="LOCAL_WORLD_SIZE is 'none'"):
        moves.num_copy_threads()
    assert pending._TOLD_S_MIN > 0
