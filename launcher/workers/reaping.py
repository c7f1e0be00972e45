"""Kills workers, and helps the kernel to free their memory: it does so on one processor, while a whole job waits."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future

_PROCESS_MRELEASE = 448
"""process_mrelease(2), Linux 5.15; the same number on all machines. Without it the process frees all itself."""


def kill_group(pid: int) -> None:
    """Kill a process with its group, and free its memory from here as well, on a thread of its own.

    Raises:
        ProcessLookupError: it is gone.
    """
    killed = Future[None]()
    try:
        threading.Thread(target=_kill_and_free, args=(pid, killed), name="free-memory", daemon=True).start()
    except RuntimeError:  # there can be no more threads
        os.killpg(pid, signal.SIGKILL)
    else:
        killed.result()


def _kill_and_free(pid: int, killed: Future[None]) -> None:
    """At once after another: the first of the two to find the memory in use frees some of it, a late one none."""
    fd = -1
    with contextlib.suppress(OSError, AttributeError):  # this kernel, or this Python, has no such descriptors
        fd = os.pidfd_open(pid)
    _syscall()  # found beforehand: in 0.1 ms all threads of it may be beyond help
    try:
        os.killpg(pid, signal.SIGKILL)
    except BaseException as error:  # noqa: BLE001 - of whoever waits for it
        killed.set_exception(error)
        _close(fd)
        return
    killed.set_result(None)
    if fd >= 0:
        free_memory(fd)


def free_memory(fd: int) -> bool:
    """Free the private memory of a process that was killed, beside its own end; whether there was some left to free.

    Closes the descriptor.
    """
    try:
        return int(_syscall()(_PROCESS_MRELEASE, fd, 0)) == 0
    finally:
        _close(fd)


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


@functools.cache
def _syscall() -> Callable[[int, int, int], int]:
    found: Callable[[int, int, int], int] = ctypes.CDLL(None, use_errno=True).syscall
    return found
