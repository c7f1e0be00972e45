"""Finds processes by descent, so what a worker has started in whatever way, and ends them in bounded time.

A process whose parent ends becomes a child of the nearest ancestor that has asked for orphans (PR_SET_CHILD_SUBREAPER,
prctl(2)). So nothing below such an ancestor gets out of its reach: no session of its own, no double fork, no empty
environment leads past it. Standard library only, and little of it: `boot.py` imports this before every cold worker.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time

from launcher.workers.tied import prctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

_PR_SET_CHILD_SUBREAPER = 36
_LOOK_S = 0.01
_MAX_PASSES = 32
GRACE_S = 1.0
"""The time from SIGTERM to SIGKILL for what a worker leaves that failed or was stopped."""
GRACE_AFTER_SUCCESS_S = 5.0
"""The same for what a worker leaves that ended well: it may still be writing what it was left to write."""
KILL_S = 5.0
"""The time for SIGKILL to have its effect: a process may wait in the kernel for a device or a file server."""


class Process:
    """A process that was seen, known by its pid and by when it started: the pid may be another's later."""

    __slots__ = ("name", "pid", "started_ticks")

    def __init__(self, pid: int, name: str, started_ticks: int) -> None:
        self.pid, self.name, self.started_ticks = pid, name, started_ticks

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"

    def send(self, signum: int) -> None:
        """Send it a signal, if it is still there and still this one."""
        try:
            fd = os.pidfd_open(self.pid)
        except (OSError, AttributeError) as error:
            # before Linux 5.3, or a Python built for one
            if (isinstance(error, AttributeError) or error.errno == errno.ENOSYS) and self._is_there():
                os.kill(self.pid, signum)
            return
        try:
            if self._is_there():  # looked at while the descriptor holds the pid
                signal.pidfd_send_signal(fd, signum)
        except OSError:
            pass  # gone meanwhile, or another user's
        finally:
            os.close(fd)

    def _is_there(self) -> bool:
        now = look_up(self.pid)
        return now is not None and now.started_ticks == self.started_ticks


ProcessesByPid = dict[int, Process]


def look_up(pid: int) -> Process | None:
    """Find a process by its pid; None if there is none, or only its zombie (proc(5))."""
    head, _, tail = _read(f"/proc/{pid}/stat").rpartition(")")
    fields = tail.split()
    if len(fields) < 20 or (fields[0] in "ZX" and int(fields[17]) <= 1):  # its first thread may have ended alone
        return None
    return Process(pid, head.partition("(")[2], int(fields[19]))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def descendants(roots: Iterable[int], without: Collection[int] = ()) -> ProcessesByPid:
    """Find all living descendants of `roots`, except `without` and what is below those."""
    children = children_by_parent()
    found: ProcessesByPid = {}
    queue = [child for root in roots for child in children(root)]
    while queue:
        pid = queue.pop()
        if pid in found or pid in without:
            continue
        queue += children(pid)
        if process := look_up(pid):
            found[pid] = process
    return found


def children_by_parent() -> Callable[[int], list[int]]:
    """Return a function from a process to its children, zombies too; it asks the kernel, or looks at all processes."""
    if os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        return _told_children
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        fields = _read(f"/proc/{name}/stat").rpartition(")")[2].split() if name.isdigit() else []
        if len(fields) > 1:
            found.setdefault(int(fields[1]), []).append(int(name))
    return lambda pid: found.get(pid, [])


def _told_children(pid: int) -> list[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    return [int(child) for thread in threads for child in _read(f"/proc/{pid}/task/{thread}/children").split()]


def end(
    find: Callable[[], ProcessesByPid], grace_s: float, within_s: float = KILL_S
) -> tuple[list[Process], list[Process]]:
    """End all that `find` finds, and what those start meanwhile: SIGTERM first, SIGKILL after `grace_s`.

    Returns:
        The processes that there were, and those that are still there `within_s` after the first SIGKILL.
    """
    known: ProcessesByPid = {}
    asked: set[int] = set()
    found = find()
    grace_ends_s = time.monotonic() + grace_s
    while found and time.monotonic() < grace_ends_s:
        known.update(found)
        for pid in found.keys() - asked:
            found[pid].send(signal.SIGTERM)
            found[pid].send(signal.SIGCONT)
        asked |= found.keys()
        time.sleep(_LOOK_S)
        found = find()
    ends_s = time.monotonic() + within_s
    while found:
        _stop(find)  # what is stopped starts nothing while the others are killed
        found = find()
        known.update(found)
        for process in found.values():
            process.send(signal.SIGKILL)
        time.sleep(_LOOK_S / 5)
        found = find()
        if time.monotonic() >= ends_s:
            break
    return list(known.values()), list(found.values())


def _stop(find: Callable[[], ProcessesByPid]) -> None:
    stopped: set[int] = set()
    for _ in range(_MAX_PASSES):
        found = find()
        if found.keys() <= stopped:
            return
        for pid in found.keys() - stopped:
            found[pid].send(signal.SIGSTOP)
        stopped |= found.keys()


def grace_after(status: int) -> float:
    """Say how long what a worker left has between SIGTERM and SIGKILL, by the wait status with which the worker ended.

    A worker that was killed was to be gone at once: its node may no longer hold its lease.
    """
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return 0.0
    return GRACE_S if status else GRACE_AFTER_SUCCESS_S


def adopt_orphans() -> None:
    """Become the parent of every descendant whose parent ends.

    Raises:
        OSError: the kernel refuses.
    """
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def leave_orphans() -> None:
    """Take no more orphans: they go to whoever took them before.

    Raises:
        OSError: the kernel refuses.
    """
    prctl(_PR_SET_CHILD_SUBREAPER, 0)


def hear_of_children() -> None:
    """Have the ends of this process's children told, where whoever started it ignores those of its own (SIGCHLD).

    That is inherited, and nobody could wait for a child: none of their exit codes would be known. Only the main thread
    can see to it.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
