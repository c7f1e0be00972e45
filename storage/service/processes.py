"""Whether a process still runs: a pid alone may be another's by now, so it goes with the time at which it began.

And with the namespace that it is of: in another one the same number is another process, or none.
"""

from __future__ import annotations

import os
from pathlib import Path

_STATE, _NUM_THREADS, _START = 0, 17, 19  # of the fields behind the name, see proc_pid_stat(5)


def began_at(pid: int) -> int:
    """When the process began, in ticks since this machine did; 0 if that is not known, or it is gone."""
    fields = _fields(pid)
    return int(fields[_START]) if len(fields) > _START else 0


def space() -> int:
    """The namespace of this process's pids; 0 if that is not known."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def is_elsewhere(of_space: int) -> bool:
    """Whether processes of that namespace cannot be told apart from here: it is another one."""
    return bool(of_space) and space() not in (0, of_space)


def is_alive(pid: int, began: int = 0, of_space: int = 0) -> bool:
    """Whether the process runs that began then (0: any of that pid), and is not only waited for by its parent.

    One of another namespace (0: of this one) counts as alive: nobody here may speak for it.
    """
    if is_elsewhere(of_space):
        return True
    fields = _fields(pid)
    if len(fields) <= _START:
        return False
    if fields[_STATE] in ("Z", "X") and int(fields[_NUM_THREADS]) <= 1:  # its first thread may have ended alone
        return False
    return not began or began == began_at(pid)


def _fields(pid: int) -> list[str]:
    try:
        os.kill(pid, 0)
        # its name is any bytes: a text that was cut to fifteen of them may end within a letter
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, OverflowError):
        return []
