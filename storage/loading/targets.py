"""Where bytes of a checkpoint go: straight into a tensor's memory, or through a slab of host memory into any tensor.

A target counts what it was given, and finishes by itself when that is all. Bytes come in any order, each once. Targets
belong to one thread; only `view` is called from others.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from storage.arena.mapping import MADE_FROM_BYTES, HugePages, advise_huge, make_pages
from storage.format.tensors import bytes_of
from storage.verified.source import scratch

log = logging.getLogger(__name__)

SLAB_SIZE_BYTES = 8 * 1024 * 1024
NUM_PINNED_SLABS = 8
_HUGE_FROM_BYTES = 4 * 1024 * 1024
_huge_pages = HugePages()  # what one restore has learnt of this machine holds for the next


class Target(Protocol):
    """What takes a certain number of bytes, counted from 0."""

    is_direct: bool
    """Whether `view` may be filled from outside."""

    def view(self, at: int, size_bytes: int, *, is_made: bool = True) -> memoryview:
        """That part of the destination, if it is a direct one; whoever fills it says so with `filled`.

        `is_made`: with its pages; else whoever fills it sees to them.
        """

    def filled(self, size_bytes: int) -> None:
        """Note that so many bytes were put into views."""

    def write(self, at: int, data: memoryview) -> None:
        """Put bytes at `at`."""


class _Counted:
    """A direct target, which calls `finish` once it was given `size_bytes`."""

    is_direct = True

    def __init__(self, size_bytes: int, finish: Callable[[], None]) -> None:
        self._missing_bytes = size_bytes
        self._finish = finish

    def view(self, at: int, size_bytes: int, *, is_made: bool = True) -> memoryview:
        raise NotImplementedError

    def filled(self, size_bytes: int) -> None:
        self._missing_bytes -= size_bytes
        if not self._missing_bytes:
            self._finish()

    def write(self, at: int, data: memoryview) -> None:
        self.view(at, data.nbytes)[:] = data
        self.filled(data.nbytes)


class TensorTarget(_Counted):
    """The memory of a contiguous CPU tensor."""

    def __init__(self, tensor: torch.Tensor, finish: Callable[[], None]) -> None:
        super().__init__(tensor.nbytes, finish)
        self._memory, self._address = bytes_of(tensor), tensor.data_ptr()
        self._span = self._address, self._address + tensor.nbytes
        # memory that nobody has touched is made as it is filled
        self._has_huge = tensor.nbytes >= _HUGE_FROM_BYTES and _huge_pages.advise(tensor.data_ptr(), tensor.nbytes)
        self._is_advised = self._has_huge

    def view(self, at: int, size_bytes: int, *, is_made: bool = True) -> memoryview:
        """A part of the tensor. Huge pages are there in any case: to make them takes next to nothing."""
        if size_bytes >= MADE_FROM_BYTES:
            self._has_huge = self._has_huge and _huge_pages.make(self._address + at, size_bytes, self._span)
            if is_made or self._has_huge:
                make_pages(self._address + at, size_bytes)
        return self._memory[at : at + size_bytes]

    def filled(self, size_bytes: int) -> None:
        """See `Target.filled`."""
        super().filled(size_bytes)
        if self._is_advised and not (self._has_huge or self._missing_bytes):  # the kernel may make them in its own time
            advise_huge(self._address, self._memory.nbytes)


class ItemTarget(_Counted):
    """A whole item in memory of its own, which is there from the first byte until `finish` has taken it."""

    def __init__(self, size_bytes: int, finish: Callable[[memoryview], None]) -> None:
        super().__init__(size_bytes, self._hand_over)
        self._size_bytes = size_bytes
        self._take = finish
        self._memory: memoryview | None = None
        self._lock = threading.Lock()

    def view(self, at: int, size_bytes: int, *, is_made: bool = True) -> memoryview:
        """A part of the item."""
        with self._lock:
            if self._memory is None:
                self._memory = scratch(self._size_bytes)
            return self._memory[at : at + size_bytes]

    def _hand_over(self) -> None:
        memory, self._memory = self._memory, None
        assert memory is not None
        self._take(memory)


class Slabs(Protocol):
    """Lends host memory, a slab at a time."""

    def take(self, size_bytes: int) -> torch.Tensor:
        """Lend a slab of so many bytes (uint8)."""

    def give_back(self, slab: torch.Tensor) -> None:
        """Take a slab back: its content was copied, or the copy is under way on the current stream of its device."""


class FreshSlabs:
    """Lends ordinary memory, and keeps none."""

    def take(self, size_bytes: int) -> torch.Tensor:
        """Lend a slab of so many bytes (uint8)."""
        return torch.empty(size_bytes, dtype=torch.uint8)

    def give_back(self, slab: torch.Tensor) -> None:
        """Do nothing: the slab goes with the last reference to it."""


class Fence(Protocol):
    """A point in a device's stream of work, as torch.cuda.Event is one."""

    def synchronize(self) -> None:
        """Wait until the device has come so far."""


@dataclass(frozen=True)
class DeviceCopies:
    """What the ring needs of a device: `pin(size_bytes)`, memory that it copies from by itself, and `fence()`, which
    marks what was asked of it so far.
    """

    pin: Callable[[int], torch.Tensor]
    fence: Callable[[], Fence]


def cuda_copies(device: torch.device) -> DeviceCopies:
    """How pinned memory is had, and copies from it are waited for, on a CUDA device."""
    return DeviceCopies(
        lambda size_bytes: torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True),
        lambda: torch.cuda.current_stream(device).record_event(),
    )


class PinnedRing:
    """A few slabs of pinned memory, each used again when the copy out of it has ended.

    While all of them are waiting for bytes, further ones are ordinary memory, from which a device copies more slowly.
    """

    def __init__(
        self, copies: DeviceCopies, num_slabs: int = NUM_PINNED_SLABS, slab_size_bytes: int = SLAB_SIZE_BYTES
    ) -> None:
        self._copies = copies
        self._num_slabs = num_slabs
        self._slab_size_bytes = slab_size_bytes
        self._whole: dict[int, torch.Tensor] = {}
        self._free: deque[tuple[torch.Tensor, Fence | None]] = deque()
        self.num_unpinned = 0

    def take(self, size_bytes: int) -> torch.Tensor:
        """Lend a slab of so many bytes (uint8); wait for the device while it still copies from the oldest one."""
        if size_bytes <= self._slab_size_bytes and len(self._whole) < self._num_slabs:
            slab = self._copies.pin(self._slab_size_bytes)
            self._whole[slab.data_ptr()] = slab
            self._free.appendleft((slab, None))
        if size_bytes > self._slab_size_bytes or not self._free:
            self.num_unpinned += 1
            return torch.empty(size_bytes, dtype=torch.uint8)
        slab, fence = self._free.popleft()
        if fence is not None:
            fence.synchronize()
        return slab[:size_bytes]

    def give_back(self, slab: torch.Tensor) -> None:
        """Take a slab back, once the copy out of it was asked of the device."""
        whole = self._whole.get(slab.data_ptr())
        if whole is not None:
            self._free.append((whole, self._copies.fence()))

    def drain(self) -> None:
        """Wait until every copy has ended."""
        for _, fence in self._free:
            if fence is not None:
                fence.synchronize()
        if self.num_unpinned:
            log.debug("%d slabs were copied to the device from ordinary memory", self.num_unpinned)


def fill(place: torch.Tensor, content: torch.Tensor, overflowed: Callable[[int], None] | None = None) -> None:
    """Copy numbers into a tensor of the same shape, of any dtype and device; see `SlabTarget`."""
    if content.is_complex() and not place.is_complex():
        content = content.real  # as copy_ does, with a warning
    if overflowed is not None:
        overflowed(int((_finite(content) & ~_finite(content.to(place.dtype))).sum()))
    with torch.inference_mode(place.is_inference()):  # one such cannot be changed outside
        place.copy_(content, non_blocking=content.is_pinned())


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    # of the small types torch knows none that is not finite
    return (tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite()


@dataclass
class _Slab:
    memory: torch.Tensor
    missing_bytes: int


class SlabTarget:
    """A tensor of any device, dtype and strides, filled a slab of a few MiB at a time.

    Args:
        tensor: of shape `lengths`.
        dtype: of the bytes that come, which are the tensor's elements in row-major order.
        slabs: where slabs come from.
        finish: called when the tensor is full.
        overflowed: told how many finite numbers of each slab have become infinite or nan, where that may be.
    """

    is_direct = False

    def __init__(
        self,
        tensor: torch.Tensor,
        dtype: torch.dtype,
        slabs: Slabs,
        finish: Callable[[], None],
        slab_size_bytes: int = SLAB_SIZE_BYTES,
        overflowed: Callable[[int], None] | None = None,
    ) -> None:
        self._overflowed = overflowed
        self._tensor = tensor
        self._dtype = dtype
        self._slabs = slabs
        self._finish = finish
        self._missing_bytes = tensor.numel() * dtype.itemsize
        # a slab is some rows along dimension `dim`, a row being all of the dimensions after it
        lengths: Sequence[int] = tensor.shape
        dim = 0
        while dim < len(lengths) and math.prod(lengths[dim:]) * dtype.itemsize > slab_size_bytes:
            dim += 1
        self._lead = tuple(lengths[: max(dim - 1, 0)])
        self._num_rows = lengths[dim - 1] if dim else 1
        self._row = tuple(lengths[dim:])
        self._row_bytes = math.prod(self._row) * dtype.itemsize
        self._rows_per_slab = max(1, slab_size_bytes // self._row_bytes) if dim else 1
        self._has_rows = dim > 0
        self._open: dict[tuple[int, int], _Slab] = {}

    def view(self, at: int, size_bytes: int, *, is_made: bool = True) -> memoryview:
        """Never called: this target has no memory to show."""
        raise NotImplementedError

    def filled(self, size_bytes: int) -> None:
        """Never called: nobody has a view."""
        raise NotImplementedError

    def write(self, at: int, data: memoryview) -> None:
        """Put bytes at `at`, and copy the slabs that are full."""
        while data.nbytes:
            lead, row = divmod(at // self._row_bytes, self._num_rows)
            number = row // self._rows_per_slab
            first = number * self._rows_per_slab
            rows = min(self._rows_per_slab, self._num_rows - first)
            begin = (lead * self._num_rows + first) * self._row_bytes
            size = rows * self._row_bytes
            slab = self._open.get((lead, number))
            if slab is None:
                slab = self._open[lead, number] = _Slab(self._slabs.take(size), size)
            taken = min(data.nbytes, begin + size - at)
            bytes_of(slab.memory)[at - begin : at - begin + taken] = data[:taken]
            slab.missing_bytes -= taken
            if not slab.missing_bytes:
                self._flush(self._open.pop((lead, number)), lead, first, rows)
            at, data = at + taken, data[taken:]

    def _flush(self, slab: _Slab, lead: int, first: int, rows: int) -> None:
        shape = (rows, *self._row) if self._has_rows else self._row
        content = slab.memory.view(self._dtype).reshape(shape)
        place = self._tensor[tuple(int(i) for i in np.unravel_index(lead, self._lead))] if self._lead else self._tensor
        place = place[first : first + rows] if self._has_rows else place
        fill(place, content, self._overflowed)
        self._slabs.give_back(slab.memory)
        self._missing_bytes -= rows * self._row_bytes
        if not self._missing_bytes:
            self._finish()
