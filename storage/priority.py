"""Who lets others go first: threads that store and copy behind a training, and none that anybody waits for.

A process cannot take back what it has given up of its priority, so it is given up thread by thread, as Linux has it. A
thread hands its priority on to those that it starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import threading
from collections.abc import Iterator

_IOPRIO_SYSCALLS = {"x86_64": 251, "aarch64": 30}
_IOPRIO_LEAST = (2 << 13) | 7  # best effort, the last of its levels: idle would starve beside a busy disk


class _Background:
    """What threads in the background step back to; None: they do not."""

    niceness: int | None = None


def let_background_step_back(niceness: int) -> None:
    """In this process, have `step_back` mean that niceness; before it, it means nothing."""
    _Background.niceness = niceness


def step_back() -> None:
    """Let other threads and processes have the processor and the disk before the calling thread, for good."""
    if _Background.niceness is None:
        return
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _Background.niceness)
    if (number := _IOPRIO_SYSCALLS.get(os.uname().machine)) is not None:
        _libc().syscall(number, 1, 0, _IOPRIO_LEAST)


def wait_for_turn() -> None:
    """Let the calling thread interrupt nobody when there is something for it to do: it has the share of the processor
    that it had, but begins when whoever runs there has had a turn (SCHED_BATCH).

    Who is woken by a training, as by a save that is handed over, would else have the processor before that goes on.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # of this thread


class _Collections:
    """Whether a thread of this process is `without_collections`."""

    are_off = False


def _collect_in_child() -> None:
    """A process that is forked meanwhile, as a loader of data, lacks the thread that would end it."""
    if _Collections.are_off:
        gc.enable()


os.register_at_fork(after_in_child=_collect_in_child)


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Let Python look for no cycles within the block, or the function that this decorates: with each quarter of objects
    that come to those there are it looks through all of them, and of a state with many tensors many are made at once.
    """
    if not gc.isenabled():  # by who will have it again
        yield
        return
    _Collections.are_off = True
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        _Collections.are_off = False


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
