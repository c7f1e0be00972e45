"""The ranks that checkpoint together: byte strings between them, and nothing pickled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

COORDINATOR = 0


class Group:
    """Collectives over bytes on a process group; the trivial group where torch.distributed is not initialised.

    Every method is a collective: all ranks call it, in the same order. Call them from one thread only.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._active = dist.is_available() and dist.is_initialized()
        self._group = process_group
        self.rank = dist.get_rank(process_group) if self._active else 0
        self.world_size = dist.get_world_size(process_group) if self._active else 1
        if self._active:
            on_cpu = "gloo" in str(dist.get_backend(process_group)) or not torch.accelerator.is_available()
            self._device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()

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

    def _sizes(self, data: bytes) -> Sequence[int]:
        sizes = [torch.empty(1, dtype=torch.int64, device=self._device) for _ in range(self.world_size)]
        mine = torch.tensor([len(data)], dtype=torch.int64, device=self._device)
        dist.all_gather(sizes, mine, group=self._group)
        return [int(size.item()) for size in sizes]

    def _tensor(self, data: bytes, length: int) -> torch.Tensor:
        padded = np.zeros(length, np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        return torch.from_numpy(padded).to(self._device)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
