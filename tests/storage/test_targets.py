"""Destinations: any tensor is filled from bytes in any order, through few slabs; the ring of a device is bounded."""

from __future__ import annotations

import itertools
import mmap
import random
import resource
from collections.abc import Sequence

import pytest
import torch

from storage.format.tensors import bytes_of
from storage.loading import targets
from storage.loading.targets import DeviceCopies, FreshSlabs, ItemTarget, PinnedRing, SlabTarget, TensorTarget

SHAPES = [(), (1,), (7,), (5, 3), (4, 1, 6), (3, 4, 5, 2), (2, 64)]


def destination(shape: Sequence[int], kind: str) -> torch.Tensor:
    if kind == "turned":
        return torch.zeros(tuple(reversed(shape))).permute(tuple(reversed(range(len(shape)))))
    if kind == "every second":
        return torch.zeros([2 * length for length in shape])[tuple(slice(None, None, 2) for _ in shape)]
    return torch.zeros(tuple(shape), dtype=torch.float64 if kind == "float64" else torch.float32)


class Bounded(FreshSlabs):
    """Counts slabs, and what is the largest."""

    def __init__(self) -> None:
        self.num_out = 0
        self.largest_bytes = 0

    def take(self, size_bytes: int) -> torch.Tensor:
        self.num_out += 1
        self.largest_bytes = max(self.largest_bytes, size_bytes)
        return super().take(size_bytes)

    def give_back(self, slab: torch.Tensor) -> None:
        self.num_out -= 1


@pytest.mark.parametrize("kind", ["turned", "every second", "float64", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slab_size", [4, 24, 1 << 20])
def test_bytes_in_any_order_fill_any_tensor(shape: Sequence[int], kind: str, slab_size: int) -> None:
    rng = random.Random(3)
    content = torch.randn(tuple(shape))
    data = bytes(bytes_of(content.contiguous()))
    tensor, slabs, finished = destination(shape, kind), Bounded(), []
    if kind == "plain":
        target: SlabTarget | TensorTarget = TensorTarget(tensor, lambda: finished.append(True))
    else:
        target = SlabTarget(tensor, torch.float32, slabs, lambda: finished.append(True), slab_size_bytes=slab_size)
    cuts = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(6))})
    pairs = list(itertools.pairwise(cuts))
    rng.shuffle(pairs)
    for start, stop in pairs:
        assert not finished
        target.write(start, memoryview(bytearray(data[start:stop])))
    assert finished == [True]
    assert torch.equal(tensor.float(), content)
    assert slabs.num_out == 0
    assert slabs.largest_bytes <= max(slab_size, 4)


def test_bytes_in_order_need_one_slab_at_a_time() -> None:
    tensor, slabs = torch.zeros(40, 100).t(), Bounded()
    target = SlabTarget(tensor, torch.float32, slabs, lambda: None, slab_size_bytes=4000)
    content = torch.randn(100, 40)
    data = bytes_of(content)
    for start in range(0, data.nbytes, 1000):
        target.write(start, data[start : start + 1000])
        assert slabs.num_out <= 1
    assert torch.equal(tensor, content)


def test_an_item_has_memory_only_while_it_is_read() -> None:
    found: list[bytes] = []
    target = ItemTarget(10, lambda memory: found.append(bytes(memory)))
    target.view(4, 6)[:] = b"efghij"
    target.filled(6)
    assert not found
    target.write(0, memoryview(bytearray(b"abcd")))
    assert found == [b"abcdefghij"]
    assert target._memory is None


class Device:
    """A device whose copies end when somebody waits for them."""

    def __init__(self) -> None:
        self.num_pinned = 0
        self.pending: list[Copy] = []

    def copies(self) -> DeviceCopies:
        def pin(size_bytes: int) -> torch.Tensor:
            self.num_pinned += 1
            return torch.empty(size_bytes, dtype=torch.uint8)

        def fence() -> Copy:
            self.pending.append(Copy(self))
            return self.pending[-1]

        return DeviceCopies(pin, fence)


class Copy:
    def __init__(self, device: Device) -> None:
        self._device = device

    def synchronize(self) -> None:
        """Ends it and, as in a stream, all before it."""
        if self in self._device.pending:
            del self._device.pending[: self._device.pending.index(self) + 1]


def test_the_ring_is_bounded_and_reuses_no_slab_that_is_still_copied() -> None:
    device = Device()
    ring = PinnedRing(device.copies(), num_slabs=3, slab_size_bytes=100)
    for _ in range(10):
        slab = ring.take(80)
        assert slab.nbytes == 80
        ring.give_back(slab)
        assert len(device.pending) <= 3
    assert (device.num_pinned, len(device.pending)) == (3, 3)  # and three copies are under way at once
    ring.drain()
    assert not device.pending
    assert ring.num_unpinned == 0


def test_what_the_ring_cannot_hold_is_ordinary_memory() -> None:
    device = Device()
    ring = PinnedRing(device.copies(), num_slabs=2, slab_size_bytes=100)
    taken = [ring.take(100) for _ in range(4)]
    assert len({slab.data_ptr() for slab in taken}) == 4
    assert (device.num_pinned, ring.num_unpinned) == (2, 2)
    assert ring.take(101).nbytes == 101
    for slab in taken:
        ring.give_back(slab)
    assert len(device.pending) == 2
    assert ring.take(1).data_ptr() == taken[0].data_ptr()
    assert len(device.pending) == 1


def test_a_tensor_fills_through_the_ring_of_its_device() -> None:
    device = Device()
    ring = PinnedRing(device.copies(), num_slabs=2, slab_size_bytes=400)
    content, tensor = torch.randn(64, 32), torch.zeros(64, 32)
    data = bytes_of(content)
    target = SlabTarget(tensor, torch.float32, ring, lambda: None, slab_size_bytes=400)
    for start in range(0, data.nbytes, 130):
        target.write(start, data[start : start + 130])
    ring.drain()
    assert torch.equal(tensor, content)
    assert device.num_pinned <= 2
    assert not device.pending


def test_the_pages_of_a_view_are_made_before_it_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, which is cheaper than one by one; small ones, whatever this machine has of huge ones."""
    monkeypatch.setattr(targets, "_HUGE_FROM_BYTES", 1 << 40)
    fresh = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a heap may have been used before
    tensor = torch.frombuffer(fresh, dtype=torch.uint8)
    view = TensorTarget(tensor, lambda: None).view(1 << 20, 62 << 20)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    view[:: mmap.PAGESIZE] = bytes(len(view[:: mmap.PAGESIZE]))
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 62 * 256 // 2
