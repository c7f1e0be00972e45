"""The ranks that checkpoint together: byte strings between them, and nothing pickled."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from storage.format.columns import Array
from storage.ranks.devices import collective_device

COORDINATOR = 0


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
        self._group = process_group
        self.rank = dist.get_rank(process_group) if self._active else 0
        self.world_size = dist.get_world_size(process_group) if self._active else 1
        if self._active:
            self._device = collective_device(process_group)

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank decides for all."""
        return self.rank == COORDINATOR

    def broadcast(self, data: bytes | None) -> bytes:
        """The coordinator's `data` on every rank; the others' is ignored."""
        if self.world_size == 1:
            assert data is not None
            return data
        size = torch.tensor([len(data) if data is not None else 0], dtype=torch.int64, device=self._device)
        dist.broadcast(size, group=self._group, group_src=COORDINATOR)
        payload = self._tensor(data or b"", int(size.item()))
        if payload.numel():
            dist.broadcast(payload, group=self._group, group_src=COORDINATOR)
        return _bytes(payload)

    def gather(self, data: bytes) -> list[bytes] | None:
        """Every rank's `data` by rank on the coordinator, None on the others."""
        if self.world_size == 1:
            return [data]
        sizes = self._sizes(data)
        payload = self._tensor(data, max(sizes))
        if not payload.numel():
            return [b""] * self.world_size if self.is_coordinator else None
        gathered = [torch.empty_like(payload) for _ in sizes] if self.is_coordinator else None
        dist.gather(payload, gathered, group=self._group, group_dst=COORDINATOR)
        if gathered is None:
            return None
        return [_bytes(part[:size]) for part, size in zip(gathered, sizes, strict=True)]

    def all_gather(self, data: bytes) -> list[bytes]:
        """Every rank's `data` by rank, on every rank; meant for short ones."""
        if self.world_size == 1:
            return [data]
        sizes = self._sizes(data)
        payload = self._tensor(data, max(sizes))
        if not payload.numel():
            return [b""] * self.world_size
        gathered = [torch.empty_like(payload) for _ in sizes]
        dist.all_gather(gathered, payload, group=self._group)
        return [_bytes(part[:size]) for part, size in zip(gathered, sizes, strict=True)]

    def all_gather_long(self, data: bytes) -> list[bytes]:
        """As `all_gather`, for data that may be long, and longer on one rank than on another: nothing is padded."""
        if self.world_size == 1:
            return [data]
        ends = list(itertools.accumulate(self._sizes(data)))
        begin = ends[self.rank] - len(data)
        payload = np.zeros(ends[-1], np.uint8)
        payload[begin : begin + len(data)] = np.frombuffer(data, np.uint8)
        summed = torch.from_numpy(payload).to(self._device)
        if ends[-1]:
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

    def _sizes(self, data: bytes) -> Sequence[int]:
        sizes = [torch.empty(1, dtype=torch.int64, device=self._device) for _ in range(self.world_size)]
        mine = torch.tensor([len(data)], dtype=torch.int64, device=self._device)
        dist.all_gather(sizes, mine, group=self._group)
        return [int(size.item()) for size in sizes]

    def _tensor(self, data: bytes, length: int) -> torch.Tensor:
        padded = np.zeros(length, np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        return torch.from_numpy(padded).to(self._device)


def _counters() -> defaultdict[int, Iterator[int]]:
    """A counter for each peer, from 0: the tags of its messages."""
    return defaultdict(itertools.count)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
