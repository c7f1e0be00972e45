"""The ranks that checkpoint together: byte strings between them, and nothing pickled."""

from __future__ import annotations

import itertools
import json
import logging
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from storage.errors import UsageError
from storage.format.columns import Array
from storage.ranks.devices import collective_device
from storage.ranks.nearby import NUM_RANKS_MAX, Doorway, Nearby, host
from storage.torch_private import timeout_s_of

log = logging.getLogger(__name__)

COORDINATOR = 0
SHORT_BYTES = 248
"""So much of a message goes with its length: what is no longer takes one collective, and what is, two."""
_LENGTH = struct.Struct("<Q")
_HEAD_BYTES = _LENGTH.size + SHORT_BYTES


@dataclass(frozen=True, slots=True)
class Message:
    """Bytes for rank `peer`."""

    peer: int
    data: Array


@dataclass(frozen=True, slots=True)
class Expected:
    """Bytes that rank `peer` sends, and the memory for them."""

    peer: int
    into: Array


class Group:
    """Collectives over bytes on a process group. `alone`, and where torch.distributed is not initialised, the group has
    one rank, this process, and needs no process group.

    Every method is a collective: all ranks call it, in the same order. Call them from one thread only.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
        self._active = not alone and dist.is_available() and dist.is_initialized()
        self._is_alone = alone
        self._group = process_group
        if self._active and dist.get_rank(process_group) < 0:
            raise UsageError(
                f"rank {dist.get_rank()} is not in the process group that was given: open this on its ranks only"
            )
        self.rank = dist.get_rank(process_group) if self._active else 0
        self.world_size = dist.get_world_size(process_group) if self._active else 1
        self._nearby: Nearby | None = None
        if self._active:
            self._device = collective_device(process_group)

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank decides for all."""
        return self.rank == COORDINATOR

    def check_world(self) -> None:
        """Raise UsageError where there are other ranks by now, that this one did not know of. No collective."""
        if self._active or self._is_alone or not dist.is_available() or not dist.is_initialized():
            return
        if (num := dist.get_world_size(self._group)) > 1:
            raise UsageError(
                f"torch.distributed has {num} ranks, and had not been initialised when this Checkpointer started: start"
                " it after init_process_group"
            )

    def connect_nearby(self) -> None:
        """Have few ranks of one host tell each other by sockets of their own what they gather: see `nearby`.

        Where that cannot be, on all ranks alike, all stays with torch.
        """
        if not self._active or self._nearby is not None or not 1 < self.world_size <= NUM_RANKS_MAX:
            return
        if (timeout_s := timeout_s_of(self._group, self._device)) is None:
            return
        with Doorway() as door:
            told = [json.loads(data) for data in self.all_gather(json.dumps([host(), door.address]).encode())]
            addresses = [address for _, address in told]
            if len({where for where, _ in told}) > 1:
                return
            if (
                not all(addresses)
                or self.any(not door.call(self.rank, addresses))
                or self.any(not door.answer(self.rank, self.world_size))
            ):
                log.info("ranks agree on saves by torch: one of them can have no socket, or is not reached by it")
                return
            self._nearby = Nearby(self.rank, door.take(), timeout_s)

    def close(self) -> None:
        """Let go of what `connect_nearby` has made; on all ranks, as collectives go by torch from here on."""
        if self._nearby is not None:
            self._nearby.close()
            self._nearby = None

    def broadcast(self, data: bytes | None) -> bytes:
        """The coordinator's `data` on every rank; the others' is ignored."""
        if self.world_size == 1:
            assert data is not None
            return data
        head = self._head(data or b"")
        dist.broadcast(head, group=self._group, group_src=COORDINATOR)
        length, short = _parsed(head)
        if length <= SHORT_BYTES:
            return short
        rest = self._tensor((data or b"")[SHORT_BYTES:], length - SHORT_BYTES)
        dist.broadcast(rest, group=self._group, group_src=COORDINATOR)
        return short + _bytes(rest)

    def gather(self, data: bytes) -> list[bytes] | None:
        """Every rank's `data` by rank on the coordinator, None on the others."""
        if self.world_size == 1:
            return [data]
        heads = self._heads(data)
        rests: list[torch.Tensor] | None = None
        if (rest := self._rest(data, heads)) is not None:
            rests = [torch.empty_like(rest) for _ in heads] if self.is_coordinator else None
            dist.gather(rest, rests, group=self._group, group_dst=COORDINATOR)
        return _whole(heads, rests) if self.is_coordinator else None

    def all_gather(self, data: bytes) -> list[bytes]:
        """Every rank's `data` by rank, on every rank; meant for short ones."""
        return self.begin_all_gather(data)()

    def begin_all_gather(self, data: bytes) -> Callable[[], list[bytes]]:
        """As `all_gather`, but the ranks meet in the call that is returned: make it once, before any other collective.

        What a rank does in between it does while others are still on their way.
        """
        if self.world_size == 1:
            return lambda: [data]
        begun = self._begin_heads(data)

        def meet() -> list[bytes]:
            parsed = begun()
            rests: list[torch.Tensor] | None = None
            if (rest := self._rest(data, parsed)) is not None:
                rests = [torch.empty_like(rest) for _ in parsed]
                dist.all_gather(rests, rest, group=self._group)
            return _whole(parsed, rests)

        return meet

    def all_gather_long(self, data: bytes) -> list[bytes]:
        """As `all_gather`, for data that may be long, and longer on one rank than on another: nothing is padded."""
        if self.world_size == 1:
            return [data]
        heads = self._heads(data)
        lengths = [length for length, _ in heads]
        if max(lengths) <= SHORT_BYTES:
            return [short for _, short in heads]
        ends = list(itertools.accumulate(lengths))
        begin = ends[self.rank] - len(data)
        payload = np.zeros(ends[-1], np.uint8)
        payload[begin : begin + len(data)] = np.frombuffer(data, np.uint8)
        summed = torch.from_numpy(payload).to(self._device)
        dist.all_reduce(summed, group=self._group)  # all but one rank hold zeros
        whole = _bytes(summed)
        return [whole[start:end] for start, end in itertools.pairwise((0, *ends))]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([int(flag)], dtype=torch.int32, device=self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flags.item())

    def swap(self, sends: Sequence[Message], receives: Sequence[Expected]) -> None:
        """Carry every message into the memory that its peer has for it.

        Two ranks list the messages from one to the other in the same order, with the same sizes. Peers are ranks of
        this group; messages are contiguous, and none is empty.
        """
        outbox = [torch.from_numpy(message.data).to(self._device) for message in sends]
        memories = [torch.from_numpy(expected.into) for expected in receives]
        inbox = memories if self._device.type == "cpu" else [torch.empty_like(m, device=self._device) for m in memories]
        tag_to, tag_from = _counters(), _counters()
        operations = [
            dist.P2POp(dist.isend, tensor, group=self._group, tag=next(tag_to[message.peer]), group_peer=message.peer)
            for message, tensor in zip(sends, outbox, strict=True)
        ]
        operations += [
            dist.P2POp(dist.irecv, tensor, group=self._group, tag=next(tag_from[entry.peer]), group_peer=entry.peer)
            for entry, tensor in zip(receives, inbox, strict=True)
        ]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        if inbox is not memories:
            for memory, tensor in zip(memories, inbox, strict=True):
                memory.copy_(tensor)

    def _head(self, data: bytes) -> torch.Tensor:
        return self._tensor(_head_of(data), _HEAD_BYTES)

    def _heads(self, data: bytes) -> list[tuple[int, bytes]]:
        """The length and the first bytes of every rank's data. A collective."""
        mine = self._head(data)
        heads = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(heads, mine, group=self._group)
        return [_parsed(head) for head in heads]

    def _begin_heads(self, data: bytes) -> Callable[[], list[tuple[int, bytes]]]:
        """As `_heads`, but the ranks meet in the call that is returned."""
        if self._nearby is not None:
            met = self._nearby.begin(_head_of(data))
            return lambda: [_split(head) for head in met()]
        mine = self._head(data)
        heads = [torch.empty_like(mine) for _ in range(self.world_size)]
        begun = dist.all_gather(heads, mine, group=self._group, async_op=True)

        def meet() -> list[tuple[int, bytes]]:
            begun.wait()
            return [_parsed(head) for head in heads]

        return meet

    def _rest(self, data: bytes, heads: Sequence[tuple[int, bytes]]) -> torch.Tensor | None:
        """What of the data is not in its head, as long as the longest of all ranks'; None where all were short."""
        length = max(length for length, _ in heads) - SHORT_BYTES
        return self._tensor(data[SHORT_BYTES:], length) if length > 0 else None

    def _tensor(self, data: bytes, length: int) -> torch.Tensor:
        padded = np.zeros(length, np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        return torch.from_numpy(padded).to(self._device)


def _counters() -> defaultdict[int, Iterator[int]]:
    """A counter for each peer, from 0: the tags of its messages."""
    return defaultdict(itertools.count)


def _head_of(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data[:SHORT_BYTES]


def _parsed(head: torch.Tensor) -> tuple[int, bytes]:
    return _split(_bytes(head))


def _split(data: bytes) -> tuple[int, bytes]:
    (length,) = _LENGTH.unpack_from(data)
    return length, data[_LENGTH.size : _LENGTH.size + length]


def _whole(heads: Sequence[tuple[int, bytes]], rests: Sequence[torch.Tensor] | None) -> list[bytes]:
    """The data of all ranks, of their heads and what did not go into these."""
    if rests is None:
        return [short for _, short in heads]
    return [
        short + _bytes(rest[: max(0, length - SHORT_BYTES)]) for (length, short), rest in zip(heads, rests, strict=True)
    ]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
