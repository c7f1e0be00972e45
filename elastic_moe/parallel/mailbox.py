"""Bytes between ranks of one machine that compute on its processor: through memory that all of them map.

What gloo carries goes through sockets, and the kernel copies it in and out on the cores that the ranks compute on.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import stat
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_moe.parallel.barrier import Inbox, PipeBarrier, PipeEnd, distances
from elastic_moe.torch_private import group_timeout_s

log = logging.getLogger(__name__)

_HEADER_BYTES = 4096
_NUMBER_BYTES = 8
_MOST_RANKS = (_HEADER_BYTES // _NUMBER_BYTES - 1) // 2
_NUM_SLOTS = 2
_GROWTH_BYTES = 1 << 20
_SEVERAL_MACHINES = "they run on several machines"


class Slot:
    """A file in memory without a name: a secret, where the part for each rank begins and ends, and the parts."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("elastic-moe mailbox", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.fchmod(self.fd, 0o600)
        self.secret = secrets.randbits(62)
        self._map(_HEADER_BYTES)
        self._numbers[0] = self.secret

    def lay(self, parts: Sequence[Tensor]) -> None:
        """Write a part for each rank; what several ranks get is written once."""
        places: dict[int, tuple[int, int]] = {}
        at = _HEADER_BYTES
        for part in parts:
            if id(part) not in places:
                places[id(part)] = (at, at + part.nbytes)
                at += -(-part.nbytes // _NUMBER_BYTES) * _NUMBER_BYTES
        if at > len(self._bytes):
            self._map(-(-at // _GROWTH_BYTES) * _GROWTH_BYTES)
        self._numbers[1 : 1 + 2 * len(parts)] = torch.tensor([places[id(part)] for part in parts]).flatten()
        for part in {id(part): part for part in parts}.values():
            begin, end = places[id(part)]
            self._bytes[begin:end].view(part.dtype).copy_(part.flatten())

    def _map(self, num_bytes: int) -> None:
        os.ftruncate(self.fd, num_bytes)
        self._bytes = _mapped(self.fd, num_bytes)
        self._numbers = self._bytes[:_HEADER_BYTES].view(torch.int64)


class PeerSlot:
    """The slot of another rank, as this one reads it: by a descriptor of its own, for its owner may be through with its
    last exchange, and its own be closed, before this rank has mapped what that one has made room for.

    Raises:
        OSError: it is not to be had, as on another machine.
    """

    def __init__(self, pid: int, fd: int, secret: int) -> None:
        # There another process may have these numbers: nothing is waited for, and only such a file is mapped.
        self.fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        weakref.finalize(self, os.close, self.fd)
        found = os.fstat(self.fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size < _HEADER_BYTES:
            raise FileNotFoundError(f"descriptor {fd} of process {pid} is no mailbox")
        self._map()
        if int(self._numbers[0]) != secret:
            raise FileNotFoundError(f"descriptor {fd} of process {pid} is the mailbox of another")

    def part(self, rank: int) -> Tensor:
        """The bytes for a rank."""
        begin, end = self._numbers[1 + 2 * rank : 3 + 2 * rank].tolist()
        if end > len(self._bytes):
            self._map()
        return self._bytes[begin:end]

    def _map(self) -> None:
        self._bytes = _mapped(self.fd, os.fstat(self.fd).st_size)
        self._numbers = self._bytes[:_HEADER_BYTES].view(torch.int64)


def _mapped(fd: int, num_bytes: int) -> Tensor:
    """The file's bytes; other than `mmap.mmap` this keeps no descriptor of its own for as long as they are mapped.

    Raises:
        OSError: there is no descriptor left, nor memory.
    """
    try:
        return torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=num_bytes, dtype=torch.uint8)
    except RuntimeError as error:  # so torch says that the system has refused it
        raise OSError(str(error)) from error


class Mailbox:
    """The slots of a group's ranks: each lays out what is for the others, all meet, and each reads what is for it.

    A rank has two slots, used in turn. When it lays out into one it has met the others in the exchange of the other
    one, to which they came after reading the one before; so one meeting an exchange is enough.
    """

    def __init__(
        self, rank: int, own: Sequence[Slot], peers: Sequence[Sequence[PeerSlot | None]], barrier: PipeBarrier
    ) -> None:
        self.rank = rank
        self._own = own
        self._peers = peers
        self._barrier = barrier
        self._turn = 0

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor | None]:
        """Give each rank of the group its part; return the bytes that each has for this one, None in its own place.

        A collective. What it returns is to be read before the next exchange, and changed by no one.

        Raises:
            PeerGone: a rank has ended, or does not come for as long as the group's other collectives would wait.
        """
        own, peers = self._own[self._turn], self._peers[self._turn]
        self._turn = (self._turn + 1) % _NUM_SLOTS
        own.lay(parts)
        self._barrier.wait()
        return [None if peer is None else peer.part(self.rank) for peer in peers]


class _Card(NamedTuple):
    """What a rank tells the others, as numbers."""

    boot_id: tuple[int, int]
    pid: int
    slots: Sequence[tuple[int, int]]
    """The descriptor and the secret of each."""
    ends: Sequence[PipeEnd]

    def numbers(self) -> list[int]:
        return [*self.boot_id, self.pid, *itertools.chain(*self.slots), *itertools.chain(*self.ends)]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Self:
        pairs = list(zip(numbers[3::2], numbers[4::2], strict=True))
        return cls((numbers[0], numbers[1]), numbers[2], pairs[:_NUM_SLOTS], [PipeEnd(*p) for p in pairs[_NUM_SLOTS:]])


def open_mailbox(group: dist.ProcessGroup) -> Mailbox | None:
    """A mailbox for a group; None where its ranks are not all on one machine, or see no others. A collective."""
    if not 2 <= group.size() <= _MOST_RANKS or not hasattr(os, "memfd_create"):
        return None
    slots, inbox, obstacle = _own_parts(group.size())
    card = _Card(_boot_id(), os.getpid(), [(s.fd, s.secret) for s in slots], inbox.ends if inbox else []).numbers()
    num_numbers = 3 + 2 * (_NUM_SLOTS + len(distances(group.size())))
    own = torch.tensor(card + [-1] * (num_numbers - len(card)))
    cards = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(cards, own, group=group)
    mailbox: Mailbox | None = None
    if inbox is not None:
        try:
            mailbox = _connected(group, [_Card.of(numbers.tolist()) for numbers in cards], slots, inbox)
        except OSError as error:
            obstacle = str(error)
    worked = torch.tensor(int(mailbox is not None))
    dist.all_reduce(worked, op=dist.ReduceOp.MIN, group=group)
    if not worked:
        level = logging.INFO if obstacle == _SEVERAL_MACHINES else logging.WARNING
        log.log(level, "gloo carries what %d ranks exchange: %s", group.size(), obstacle or "another sees no mailbox")
        return None
    assert inbox is not None
    inbox.close_ends()
    return mailbox


def _own_parts(num_ranks: int) -> tuple[list[Slot], Inbox | None, str]:
    """This rank's slots and pipes; where it can have none, none and why, which the others are still to hear.

    A hardened system refuses files in memory (vm.memfd_noexec = 2), and a process may have all its descriptors in use.
    """
    try:
        return [Slot() for _ in range(_NUM_SLOTS)], Inbox(num_ranks), ""
    except OSError as error:
        return [], None, f"no memory to exchange through: {error}"


def _connected(group: dist.ProcessGroup, cards: Sequence[_Card], slots: Sequence[Slot], inbox: Inbox) -> Mailbox:
    """Raises OSError where a rank's memory or pipes are not to be had."""
    rank, size = group.rank(), group.size()
    if any(card.boot_id != cards[rank].boot_id for card in cards):
        raise OSError(_SEVERAL_MACHINES)
    peers = [
        [None if other == rank else PeerSlot(card.pid, *card.slots[turn]) for other, card in enumerate(cards)]
        for turn in range(_NUM_SLOTS)
    ]
    with contextlib.ExitStack() as on_failure:
        told = []
        for turn, distance in enumerate(distances(size)):
            ahead = cards[(rank + distance) % size]
            told.append(ahead.ends[turn].open(ahead.pid))
            on_failure.callback(os.close, told[-1])
        names = [f"rank {dist.get_global_rank(group, other)}" for other in range(size)]
        barrier = PipeBarrier(rank, names, inbox, told, group_timeout_s(group))
        on_failure.pop_all()
    return Mailbox(rank, slots, peers, barrier)


def _boot_id() -> tuple[int, int]:
    """Two numbers that only this machine has, and only until it starts anew."""
    try:
        number = int(Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", ""), 16)
    except OSError:
        number = secrets.randbits(124)  # like no other's
    return number >> 66, number & ((1 << 62) - 1)
