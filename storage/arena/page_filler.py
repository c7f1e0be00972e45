"""Fills memory that nobody has touched yet: the kernel makes its pages with what they are to hold (userfaultfd(2)).

A page that is made first (`make_pages`) is cleared for nothing, and what is read into it goes the longer way. To read
into a buffer that stays in the processor's cache, and to have pages made of that, takes two thirds of the time; and
what was damaged on its way gets no further than that buffer.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import mmap
import os
import platform
import struct
from collections.abc import Iterator, Sequence
from typing import Final

from storage.arena.mapping import MADE_FROM_BYTES, PAGE_BYTES, is_made, make_pages, whole_pages
from storage.stores.buffers import address_of

log = logging.getLogger(__name__)

_SYSCALLS: Final = {"x86_64": 323, "aarch64": 282}
_UFFD_API: Final = 0xAA
_API, _REGISTER, _UNREGISTER, _COPY = 0xC018AA3F, 0xC020AA00, 0x8010AA01, 0xC028AA03
"""Of linux/userfaultfd.h. On machines where such numbers are made otherwise the first of them is refused."""
_USER_MODE_ONLY: Final = 1
"""What every user may ask for; Linux 5.11."""
_MODE_WP, _MODE_DONTWAKE = 2, 1
_HAS_WP: Final = 1
"""Of the features that the kernel tells of: it knows write protection (UFFD_FEATURE_PAGEFAULT_FLAG_WP)."""
_BUFFER_BYTES: Final = 5 * 1024 * 1024
"""What is read at once out of memory, and an eighth, is less."""


class PageFiller:
    """Gives memory to read into in place of some that has no pages yet. For any number of threads; to be closed.

    Where the kernel has no such call, or a filter forbids it, pages are made first, and read into.
    """

    def __init__(self) -> None:
        self._buffers: list[mmap.mmap] = []
        self._fd = _opened()

    @contextlib.contextmanager
    def instead_of(self, memories: Sequence[memoryview], *, in_place: bool = False) -> Iterator[Sequence[memoryview]]:
        """Memory for what belongs into each of `memories`: itself, with its pages, or, where it has none, a part of a
        buffer, from which it is filled once this context ends well.

        `in_place`: give themselves, since somebody will look at what was read for longer than that.
        """
        fresh = [number for number, memory in enumerate(memories) if _is_fresh(memory)]
        if in_place or self._fd < 0 or sum(memories[number].nbytes for number in fresh) > _BUFFER_BYTES:
            for number in fresh:
                make_pages(address_of(memories[number]), memories[number].nbytes)
            fresh = []
        if not fresh:
            yield memories
            return
        buffer = self._buffers.pop() if self._buffers else _buffer()
        given, left = list(memories), memoryview(buffer)
        for number in fresh:
            given[number], left = left[: memories[number].nbytes], left[memories[number].nbytes :]
        yield given
        for number in fresh:
            self._fill(memories[number], given[number])
        self._buffers.append(buffer)

    def _fill(self, memory: memoryview, data: memoryview) -> None:
        address = address_of(memory)
        first, last = whole_pages(address, memory.nbytes)
        low, high = first - address, last - address
        try:
            self._make(first, data[low:high])
        except OSError as error:  # no private memory, or others have touched it meanwhile
            log.debug("%d bytes are copied in place of being made pages of: %s", memory.nbytes, error)
            make_pages(address, memory.nbytes)
            memory[:] = data
            return
        memory[:low], memory[high:] = data[:low], data[high:]

    def _make(self, address: int, data: memoryview) -> None:
        """Make pages of the data. Raises OSError.

        What is registered for write protection alone, of which none is asked for, others may touch as ever; the kernel
        makes pages there as anywhere. (Registered for missing pages, whoever touches one would wait for us.)
        """
        pages = struct.pack("QQ", address, data.nbytes)
        fcntl.ioctl(self._fd, _REGISTER, bytearray(pages + struct.pack("QQ", _MODE_WP, 0)))
        try:
            request = struct.pack("QQQQq", address, address_of(data), data.nbytes, _MODE_DONTWAKE, 0)
            fcntl.ioctl(self._fd, _COPY, bytearray(request))
        finally:  # so that what lies side by side is one mapping again: a process may have so many only
            fcntl.ioctl(self._fd, _UNREGISTER, bytearray(pages))

    def close(self) -> None:
        """Let go of the buffers and the descriptor, once nobody fills any more. Closing twice is harmless."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        self._buffers.clear()


def _opened() -> int:
    """A descriptor to have pages made by; -1 where there is none to be had."""
    number = _SYSCALLS.get(platform.machine())
    if number is None:
        return -1
    fd = int(ctypes.CDLL(None, use_errno=True).syscall(number, os.O_CLOEXEC | _USER_MODE_ONLY))
    if fd < 0:
        log.debug("pages are made and then filled: %s", os.strerror(ctypes.get_errno()))
        return -1
    told = bytearray(struct.pack("QQQ", _UFFD_API, 0, 0))
    try:
        fcntl.ioctl(fd, _API, told)
    except OSError as error:
        log.debug("pages are made and then filled: %s", error)
    if struct.unpack("QQQ", told)[1] & _HAS_WP:
        return fd
    os.close(fd)
    return -1


def _buffer() -> mmap.mmap:
    """Not of numpy's: it asks for huge pages, which may have to be made first."""
    return mmap.mmap(-1, _BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _is_fresh(memory: memoryview) -> bool:
    if memory.nbytes < MADE_FROM_BYTES:
        return False
    first, last = whole_pages(address_of(memory), memory.nbytes)
    return last - first >= PAGE_BYTES and not is_made(first)
