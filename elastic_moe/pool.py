"""Large blocks that every step on a CPU takes and gives back: each in the place of one before it of the same size.

In malloc's heap none of them would find that place again. torch asks for aligned blocks, for which malloc looks for a
little more than it has kept of the one that was freed; and what layers leave for the backward pass settles in between.
So each layer would take room of its own for what only one or two need at a time.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import mmap
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from storage import HugePages

_LEAST_BYTES = 1 << 20
_ALIGNMENT = mmap.PAGESIZE
_AT_ONCE_BYTES = 32 << 20
_MADV_POPULATE_WRITE = 23
"""Linux 5.14; see madvise(2). Python has a name for it from 3.13 on."""

_huge_pages = HugePages()  # what is learnt of this machine holds for all of a process

Place = tuple[mmap.mmap, int]


class Pool:
    """Memory for tensors on the CPU; what is small is left to malloc."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Place]] = defaultdict(list)
        self._mapped: mmap.mmap | None = None
        self._next = 0

    def take(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of any content; its place is taken again once nothing looks at it any more."""
        num_bytes = math.prod(size) * dtype.itemsize
        if num_bytes < _LEAST_BYTES:
            return torch.empty(*size, dtype=dtype)
        free = self._free[num_bytes]
        mapped, start = place = free.pop() if free else self._carve(num_bytes)
        memory = (ctypes.c_ubyte * num_bytes).from_buffer(mapped, start)
        weakref.finalize(memory, free.append, place).atexit = False
        return torch.frombuffer(memory, dtype=dtype).view(*size)

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor of any content, of the shape and type of another."""
        return self.take(tensor.shape, tensor.dtype)

    def expect(self, num_bytes: int) -> mmap.mmap:
        """Map memory for what is taken next."""
        self._mapped, self._next = map_memory(num_bytes), 0
        return self._mapped

    def _carve(self, num_bytes: int) -> Place:
        reach = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        mapped = self._mapped
        if mapped is None or len(mapped) - self._next < reach:
            mapped = self.expect(reach)
            start, stop = _span(mapped)
            _huge_pages.advise(start, stop - start)
        place = mapped, self._next
        self._next += reach
        return place


def map_memory(num_bytes: int) -> mmap.mmap:
    """Zeros, whose pages the system makes when they are first written, or `make_pages` before."""
    return mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def make_pages(memory: Iterable[mmap.mmap | Tensor]) -> threading.Thread:
    """Have the pages made of what will be written soon, in this order, by a thread beside; they keep what they hold.

    The kernel has to clear each page, and a virtual machine to ask its host for it: up to seconds a GiB, in which
    this process would wait for each page as it comes to it, and in which it may read a checkpoint instead. They are
    huge ones for as long as those cost no more than small ones; what becomes small ones then, the kernel may make
    huge ones of in its own time.
    """
    large = [each for each in memory if _num_bytes(each) >= _LEAST_BYTES]
    thread = threading.Thread(target=_make_pages, args=(large,), name="elastic-moe-pages", daemon=True)
    if large:
        thread.start()
    return thread


def _make_pages(memory: Sequence[mmap.mmap | Tensor]) -> None:
    spans = [_span(each) for each in memory]
    are_made = all(_make(start, stop) for first, last in spans for start, stop in _pieces(first, last))
    if are_made or not _huge_pages.are_costly:  # an old kernel, or no memory is left: they are made as they are written
        for first, last in spans:
            _madvise(first, last - first, mmap.MADV_HUGEPAGE)


def _pieces(first: int, last: int) -> Iterator[tuple[int, int]]:
    """What lies between, so much at once that it soon shows what pages cost, and cut where a huge page may begin."""
    starts = [first, *range(first // _AT_ONCE_BYTES * _AT_ONCE_BYTES + _AT_ONCE_BYTES, last, _AT_ONCE_BYTES)]
    return itertools.pairwise([*starts, last])


def _make(start: int, stop: int) -> bool:
    _huge_pages.advise(start, stop - start)
    return not _madvise(start, stop - start, _MADV_POPULATE_WRITE)


def _span(memory: mmap.mmap | Tensor) -> tuple[int, int]:
    """The addresses of its whole pages: the first one, and the one after the last."""
    begin = memory.data_ptr() if isinstance(memory, Tensor) else ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))
    return -(-begin // _ALIGNMENT) * _ALIGNMENT, (begin + _num_bytes(memory)) // _ALIGNMENT * _ALIGNMENT


def _num_bytes(memory: mmap.mmap | Tensor) -> int:
    return memory.nbytes if isinstance(memory, Tensor) else len(memory)


def _madvise(address: int, num_bytes: int, advice: int) -> int:
    """madvise(2), during which other threads run, as they do not in Python's own."""
    return int(_libc().madvise(address, num_bytes, advice))


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc
