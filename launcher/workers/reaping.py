"""Kills workers, and helps the kernel to free their memory: it does so on one processor, while a whole job waits."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import threading

_PROCESS_MRELEASE = 448
"""process_mrelease(2), Linux 5.15; the same number on all machines. Without it the process frees all itself."""


def kill_group(pid: int) -> None:
    """Kill a process with its group, and free its memory from here as well, on a thread of its own.

    Raises:
        ProcessLookupError: it is gone.
    """
    fd = -1
    with contextlib.suppress(OSError, AttributeError):  # this kernel, or this Python, has no such descriptors
        fd = os.pidfd_open(pid)
    try:
        os.killpg(pid, signal.SIGKILL)
    except BaseException:
        _close(fd)
        raise
    if fd < 0:
        return
    try:
        threading.Thread(target=free_memory, args=(fd,), name="free-memory", daemon=True).start()
    except RuntimeError:  # there can be no more threads
        _close(fd)


def free_memory(fd: int) -> bool:
    """Free the private memory of a process that was killed, beside its own end; whether there was some left to free.

    Closes the descriptor.
    """
    try:
        return int(_libc().syscall(_PROCESS_MRELEASE, fd, 0)) == 0
    finally:
        _close(fd)


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
