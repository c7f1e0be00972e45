"""`Slot`: memory that other processes get by its descriptor. It has no name, so `kill -9` leaves nothing of it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from storage.arena.free_memory import free_bytes
from storage.arena.mapping import HUGE_PAGE_BYTES, PAGE_BYTES, advise_huge, mapped, populate
from storage.arena.memory_file import keeps_its_size, memory_file, room_for, seal

_UNASKED_BYTES = 1024 * 1024
"""So little is taken without asking what is free, which takes longer than taking it."""
_PARTS_MAX = 1024  # of one system call
_LACKS = (errno.ENOMEM, errno.ENOSPC, errno.EFBIG, errno.EFAULT)
"""The last as what the pages of a file meet whose file system is full."""


class Slot:
    """Bytes in memory that is there, whole, from the beginning: whoever writes to it meets no lack of memory.

    The memory goes when the last process that has its descriptor or a view of it has let go, or was killed. Its size is
    sealed (see `memory_file`), so no holder of the descriptor can take pages away from another (a SIGBUS). Not
    thread-safe.

    Attributes:
        is_pinned: whether devices copy to it by themselves, see `storage.arena.device.pin`.
        laid_out: what its owner has laid over it, to be used again with the next content; let go of with the slot.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self._ends = contextlib.ExitStack()
        # of a slot that nobody has any more, too
        self._close = weakref.finalize(self, _close, fd, self._ends)
        self.size_bytes = size_bytes
        self.is_pinned = False
        self.laid_out: Any = None
        self._has_huge = True

    @functools.cached_property
    def _map(self) -> Any:
        # what is to be done before is done then: of a circle that is collected the parts end in any order
        return mapped(self.fd, self.size_bytes, self._ends.close)

    @functools.cached_property
    def memory(self) -> memoryview:
        """All of it, writable. It is mapped when it is first looked at; raises OSError."""
        return memoryview(self._map).cast("B")

    @functools.cached_property
    def address(self) -> int:
        """Where `memory` begins in this process."""
        return ctypes.addressof(self._map)

    @classmethod
    def create(cls, size_bytes: int) -> Self:
        """A slot of at least that size, in huge pages where the kernel has some.

        Raises:
            MemoryError: this machine, or this process's cgroup, has not so much memory left.
        """
        slot = cls.create_empty(size_bytes)
        try:
            slot.populate(0, slot.size_bytes)
        except BaseException:
            slot.close()
            raise
        return slot

    @classmethod
    def create_empty(cls, size_bytes: int) -> Self:
        """The same, but that nothing may be written to any of it before `populate`. Raises MemoryError."""
        page_bytes = HUGE_PAGE_BYTES if size_bytes >= HUGE_PAGE_BYTES else PAGE_BYTES
        size_bytes = max(1, -(-size_bytes // page_bytes)) * page_bytes
        _ask_for(size_bytes)
        with contextlib.ExitStack() as on_failure, _told(size_bytes):
            slot = cls(memory_file("elastic-moe-slot"), size_bytes)
            on_failure.callback(slot.close)
            room_for(slot.fd, size_bytes)
            os.ftruncate(slot.fd, size_bytes)
            advise_huge(slot.address, size_bytes)
            seal(slot.fd)
            on_failure.pop_all()
        return slot

    @classmethod
    def of(cls, parts: Sequence[bytes | memoryview]) -> Self:
        """A slot that holds those, one after the other, and is as long as they are. Raises MemoryError."""
        size_bytes = sum(len(part) for part in parts)
        _ask_for(size_bytes)
        with contextlib.ExitStack() as on_failure, _told(size_bytes):
            slot = cls(memory_file("elastic-moe-slot"), size_bytes)
            on_failure.callback(slot.close)
            room_for(slot.fd, size_bytes)
            for at in range(0, len(parts), _PARTS_MAX):
                written = os.writev(slot.fd, parts[at : at + _PARTS_MAX])
                if written != sum(len(part) for part in parts[at : at + _PARTS_MAX]):
                    raise OSError(errno.ENOSPC, f"only {written} bytes were taken")
            seal(slot.fd)
            on_failure.pop_all()
        return slot

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """The slot behind a descriptor that another process has sent, which belongs to the slot from here on.

        Raises:
            ValueError: it is no slot: its size could change. The descriptor is closed.
        """
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(os.close, fd)
            try:
                if not keeps_its_size(fd):
                    raise ValueError("the memory that was sent can be made smaller by its sender; it is no slot")
                slot = cls(fd, os.fstat(fd).st_size)
                on_failure.pop_all()
                on_failure.callback(slot.close)
                _ = slot.memory
            except OSError as error:
                raise ValueError(f"the descriptor that was sent is no slot: {error}") from None
            on_failure.pop_all()
        return slot

    @property
    def fd(self) -> int:
        """The descriptor, which stays the slot's. Raises ValueError if it is closed."""
        if not self._close.alive:
            raise ValueError("the slot is closed")
        return self._fd

    def before_close(self, call: Callable[[], object]) -> None:
        """Have `call`, which must not hold this slot, made when it is closed, or its memory is about to go."""
        self._ends.callback(call)

    def close(self) -> None:
        """Let go of it; closing twice is harmless. Tensors over it stay valid, and keep its memory until they go."""
        if not self._close.alive:
            return
        self._close()
        self.laid_out = None
        if (memory := self.__dict__.get("memory")) is not None:  # as `cached_property` keeps it
            memory.release()
        self.__dict__.pop("_map", None)  # it goes with the last view of it

    def populate(self, begin: int, stop: int, *, is_ahead: bool = False) -> None:
        """Have all pages from one of these bytes to the other made, and entered into this process's tables, so that no
        copy waits for that. What is in them already stays. `is_ahead`: nobody waits for this either.

        Raises MemoryError.
        """
        with _told(self.size_bytes):
            self._has_huge = populate(self._fd, self.address, begin, stop, is_ahead=is_ahead, has_huge=self._has_huge)


def _ask_for(size_bytes: int) -> None:
    if size_bytes > _UNASKED_BYTES and (free := free_bytes()) is not None and size_bytes > free:
        raise _lack(size_bytes, f"only {_mib(free)} are free")


def _close(fd: int, ends: contextlib.ExitStack) -> None:
    try:
        ends.close()
    finally:
        os.close(fd)


@contextlib.contextmanager
def _told(size_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _LACKS:
            raise _lack(size_bytes, error.strerror or str(error)) from None
        raise MemoryError(f"{_mib(size_bytes)} of the state cannot be staged: {error.strerror or error}") from None


def _lack(size_bytes: int, why: str) -> MemoryError:
    return MemoryError(f"no room to stage {_mib(size_bytes)} of the state: {why}")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB"
