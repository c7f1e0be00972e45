"""Shared memory in this process's addresses, and its pages: huge ones, wherever the kernel can make some."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

HUGE_PAGE_BYTES = 2 * 1024 * 1024
PAGE_BYTES = mmap.PAGESIZE
MADE_FROM_BYTES = 128 * 1024
"""Of so much the pages are made ahead; those of less as they are touched."""
_AT_ONCE_BYTES = 64 * 1024 * 1024
_MADV_POPULATE_WRITE = 23
"""Linux 5.14; see madvise(2). Python has a name for it from 3.13 on."""
_MADV_COLLAPSE = 25
"""Linux 6.1, whatever the system's settings for huge pages of shared memory are."""
_COLLAPSE_S_MAX = 0.25
"""For so much as is made at once (of less accordingly less); small pages take a third of it. Where free memory is in
pieces the kernel moves what lies between them, which may take any time."""
_COLLAPSE_AHEAD_S_MAX = 0.5
"""The same where nobody waits yet: to map, read and free small pages takes longer each time."""
_WALL_MAX = 4
"""So many times as long it may take by the clock on the wall."""
_COSTLY_S = 0.002
"""For one huge page. One that is to be had takes a tenth of that, and small pages for as much a third."""
_WITHOUT_BYTES = 1024 * 1024 * 1024
"""After a costly one: looking again costs a sixtieth of what small pages for so much take."""
_WITHOUT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0
_FAILED = ctypes.c_void_p(-1).value


def mapped(fd: int, size_bytes: int, before_end: Callable[[], object] = lambda: None) -> Any:
    """All of a file of that size, which is not empty, as an array of bytes that is mapped for as long as anything looks
    at it. It begins where a huge page may, so that one entry of the processor's tables leads to 2 MiB of it; `mmap` has
    no say in that. Raises OSError.

    Args:
        before_end: called right before it is mapped no more; must not look at it.
    """
    libc, reach = _libc(), size_bytes + HUGE_PAGE_BYTES
    found = libc.mmap(None, reach, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    if found == _FAILED:
        raise _last_error()
    start = -(-found // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = start + -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
    access = mmap.PROT_READ | mmap.PROT_WRITE
    if libc.mmap(start, size_bytes, access, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) == _FAILED:
        error = _last_error()
        libc.munmap(found, reach)
        raise error
    for begin, stop in ((found, start), (end, found + reach)):
        if begin < stop:
            libc.munmap(begin, stop - begin)
    memory = (ctypes.c_ubyte * size_bytes).from_address(start)
    # not when the interpreter ends: threads may still look at it then
    weakref.finalize(memory, _end, before_end, start, size_bytes).atexit = False
    return memory


def _end(before_end: Callable[[], object], start: int, size_bytes: int) -> None:
    try:
        before_end()
    finally:
        _libc().munmap(start, size_bytes)


def advise_huge(address: int, size_bytes: int) -> None:
    """Have huge pages made by themselves of what lies in there, where the system's settings leave that to who asks."""
    first, last = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, (address + size_bytes) // HUGE_PAGE_BYTES
    if first < last * HUGE_PAGE_BYTES:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            _advise(first, last * HUGE_PAGE_BYTES - first, mmap.MADV_HUGEPAGE)


def make_pages(address: int, size_bytes: int) -> None:
    """Have the pages made of what is filled next, by one call: one by one, as they are written, they take longer.

    Where the first one is there, so are the others as a rule, and to look for them takes time as well. What is in them
    already stays; what cannot be made now is made then.
    """
    first, last = whole_pages(address, size_bytes)
    if first < last and not is_made(first):
        with contextlib.suppress(OSError):  # a kernel that makes none ahead
            _advise(first, last - first, _MADV_POPULATE_WRITE)


def whole_pages(address: int, size_bytes: int) -> tuple[int, int]:
    """Where the pages that lie in there as a whole begin and end; not before they begin, only if there are some."""
    return -(-address // PAGE_BYTES) * PAGE_BYTES, (address + size_bytes) // PAGE_BYTES * PAGE_BYTES


def is_made(address: int) -> bool:
    """Whether there is memory behind a page (mincore(2))."""
    found = ctypes.c_ubyte()
    return _libc().mincore(address, PAGE_BYTES, ctypes.byref(found)) == 0 and bool(found.value & 1)


class HugePages:
    """Advises huge pages for memory that is filled next, wherever they cost no more than small ones.

    The first of each piece of memory is made at once, to see. A virtual machine may have to ask its host for what lies
    free in large blocks, small piece by small piece: 5 ms a huge page, seven times what small pages take, which come
    from what has been in use. After a costly one none is asked for in the next GiB, so that looking costs little.
    Thread-safe: who looks at the same time looks once too often.
    """

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock  # of this thread alone: what others do meanwhile says nothing of a page
        self.are_costly = False
        """Whether the last one was."""
        self._without_bytes = 0

    def advise(self, address: int, size_bytes: int) -> bool:
        """Advise them for what lies in there, which keeps what it holds; whether that was done."""
        first = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        last = (address + size_bytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if first >= last:
            return False
        if self.are_costly and self._without_bytes < _WITHOUT_BYTES:
            self._without_bytes += size_bytes
            return False
        self._without_bytes = 0
        with contextlib.suppress(OSError):  # a kernel without huge pages, or one that makes none ahead
            _advise(first, HUGE_PAGE_BYTES, mmap.MADV_HUGEPAGE)
            began_s = self._clock()
            _advise(first, PAGE_BYTES, _MADV_POPULATE_WRITE)
            self.are_costly = self._clock() - began_s > _COSTLY_S
            if not self.are_costly:
                _advise(first, last - first, mmap.MADV_HUGEPAGE)
                return True
        return False

    def make(self, address: int, size_bytes: int, within: tuple[int, int]) -> bool:
        """Make those that a piece of the memory lies in for which they were advised, which is `within` two addresses.
        False as soon as one is costly, here or elsewhere: what of that memory is not made yet has small ones then.
        """
        begin, stop = within
        at = max(address // HUGE_PAGE_BYTES, -(-begin // HUGE_PAGE_BYTES)) * HUGE_PAGE_BYTES
        with contextlib.suppress(OSError):  # no memory is left
            while not self.are_costly and at < address + size_bytes and at + HUGE_PAGE_BYTES <= stop:
                began_s = self._clock()
                _advise(at, PAGE_BYTES, _MADV_POPULATE_WRITE)
                self.are_costly = self._clock() - began_s > _COSTLY_S
                at += HUGE_PAGE_BYTES
            if self.are_costly and at < stop:
                self._without_bytes = 0
                _advise(at, stop - at, mmap.MADV_NOHUGEPAGE)
        return not self.are_costly


def populate(fd: int, address: int, begin: int, stop: int, *, is_ahead: bool = False, has_huge: bool = True) -> bool:
    """Have all pages made from one of these bytes to the other, of a file that is mapped at `address`, and enter them
    into this process's tables. What is in them already stays. Raises OSError.

    Args:
        is_ahead: nobody waits for it, so that huge pages may take longer to be had, and are looked for again now and
            then: what lies free changes.
        has_huge: whether to ask for huge pages.

    Returns:
        Whether to ask for them in what follows.
    """
    begin -= begin % PAGE_BYTES
    seconds_max = _COLLAPSE_AHEAD_S_MAX if is_ahead else _COLLAPSE_S_MAX
    for start in range(begin, stop, _AT_ONCE_BYTES):
        length = min(_AT_ONCE_BYTES, stop - start)
        if has_huge or (is_ahead and start % _AT_ONCE_BYTES == 0):
            has_huge = _make_huge(address, start, start + length, seconds_max * length / _AT_ONCE_BYTES)
        try:
            _advise(address + start, length, _MADV_POPULATE_WRITE)
        except OSError as error:
            if error.errno not in _WITHOUT:
                raise
            os.posix_fallocate(fd, start, length)
            memory = (ctypes.c_ubyte * length).from_address(address + start)
            pages = np.frombuffer(memoryview(memory), np.uint8)[::PAGE_BYTES]
            np.bitwise_or(pages, 0, out=pages)
    return has_huge


def _make_huge(address: int, begin: int, stop: int, seconds_max: float) -> bool:
    """Make huge pages of all that lies between, and say whether that is worth while: whether there were any to be had,
    within so many seconds. Where there were none, it stays as it is.

    That takes a tenth of the time that small pages take, and whoever copies into them, or maps them, is the faster. The
    seconds are the processor's: who has it meanwhile says nothing of a page, unless it is for very long.
    """
    first, last = -(-begin // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, stop - stop % HUGE_PAGE_BYTES
    if first >= last:
        return True
    began_s, began_cpu_s = time.monotonic(), time.thread_time()
    try:
        for start in range(first, last, HUGE_PAGE_BYTES):  # the kernel takes no page of a file that has none there
            _advise(address + start, PAGE_BYTES, _MADV_POPULATE_WRITE)
        _advise(address + first, last - first, _MADV_COLLAPSE)
    except OSError:
        return False
    is_soon = time.monotonic() - began_s <= _WALL_MAX * seconds_max
    return is_soon and time.thread_time() - began_cpu_s <= seconds_max


def _advise(address: int, size_bytes: int, advice: int) -> None:
    """madvise(2), during which other threads run, as they do not in Python's own. Raises OSError."""
    if _libc().madvise(address, size_bytes, advice):
        raise _last_error()


def _last_error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    libc.mmap.restype = pointer
    libc.mmap.argtypes = (pointer, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.munmap.argtypes = (pointer, size)
    libc.madvise.argtypes = (pointer, size, ctypes.c_int)
    libc.mincore.argtypes = (pointer, size, ctypes.POINTER(ctypes.c_ubyte))
    return libc
