"""Slots of this node's workers that the service holds as well, so that no worker has to free one as it ends.

The kernel frees memory before it says that a process has ended, a quarter of a second a GiB where pages are small, and
a job that changes its workers waits for that. So the service closes a worker's slots once that has gone: behind the
next one's restore, with little of the processor; but at once where memory is short. It maps none, and hands none on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence

from storage.arena.free_memory import free_bytes
from storage.held.truce import Truce
from storage.priority import step_back
from storage.service.channel import close_all
from storage.service.held_messages import GuardSlot, UnguardSlots
from storage.service.server import Server
from storage.service.sessions import ServiceCaller

log = logging.getLogger(__name__)

NUM_GUARDED_MAX = 16
"""Of one connection: an arena has five slots at most, and a live state one more."""
_LOOK_S = 0.2
_LONGEST_S = 30.0


class GuardedSlots:
    """Handles the messages about them.

    Args:
        truce: while it lasts nothing is freed, unless memory is short.
        free: how much memory there is.
    """

    def __init__(self, truce: Truce, free: Callable[[], int | None] = free_bytes) -> None:
        self._truce = truce
        self._free = free
        self._lock = threading.Lock()
        self._slots: dict[ServiceCaller, dict[int, int]] = {}  # descriptors by inode
        self._is_closed = threading.Event()

    def serve(self, server: Server) -> None:
        """Have the server's messages of slots come here; before it runs."""
        server.handle(GuardSlot, self._guard)
        server.handle(UnguardSlots, self._unguard)
        server.on_leave.append(self._left)

    def close(self) -> None:
        """Free nothing any more: the end of this process does."""
        self._is_closed.set()

    @property
    def size_bytes(self) -> int:
        """Of all that is guarded for workers that are connected."""
        with self._lock:
            return _size_of([fd for slots in self._slots.values() for fd in slots.values()])

    def _guard(self, caller: ServiceCaller, told: GuardSlot, fds: list[int]) -> None:
        with self._lock:
            slots = self._slots.setdefault(caller, {})
            for fd in fds:
                inode = os.fstat(fd).st_ino
                if inode in slots or len(slots) >= NUM_GUARDED_MAX:
                    os.close(fd)
                else:
                    slots[inode] = fd

    def _unguard(self, caller: ServiceCaller, told: UnguardSlots, fds: list[int]) -> None:
        with self._lock:
            slots = self._slots.get(caller, {})
            gone = [slots.pop(inode) for inode in told.inodes if inode in slots]
        close_all(gone)  # the worker wants their room

    def _left(self, caller: ServiceCaller) -> None:
        with self._lock:
            left = list(self._slots.pop(caller, {}).values())
        if not left:
            return
        try:
            threading.Thread(target=self._free_behind, args=(left,), name="free-slots", daemon=True).start()
        except RuntimeError as error:  # there can be no more threads
            log.warning("slots of process %d are freed at once: %s", caller.hello.pid, error)
            close_all(left)

    def _free_behind(self, fds: Sequence[int]) -> None:
        size_bytes = _size_of(fds)
        if not (is_short := self._is_short(size_bytes)):
            step_back()
            waited_s = 0.0
            while self._truce.is_on and waited_s < _LONGEST_S and not self._is_closed.wait(_LOOK_S):
                waited_s += _LOOK_S
                if is_short := self._is_short(size_bytes):
                    break
        if is_short:
            log.warning("memory is short: %d bytes that workers have left are freed at once", size_bytes)
        close_all(fds)

    def _is_short(self, size_bytes: int) -> bool:
        """Whether what is left is less than what lies here for nothing."""
        free = self._free()
        return free is not None and free < size_bytes


def _size_of(fds: Sequence[int]) -> int:
    size_bytes = 0
    for fd in fds:
        with contextlib.suppress(OSError):
            size_bytes += os.fstat(fd).st_size
    return size_bytes
