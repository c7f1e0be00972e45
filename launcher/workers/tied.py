"""Ties a process to the one that started it, and to the program that it stands for: it dies with the first, ends as the
second, and passes signals on in between.

`boot.py` imports this and little else, and a whole job waits for that. `signal`, like `socket`, makes enums of all its
constants, with all that `enum` needs: of a boot's 20 ms those would be half. So here are the modules below them.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import ctypes
import os
import resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

PASSED_ON: tuple[int, ...] = (
    _signal.SIGTERM,
    _signal.SIGINT,
    _signal.SIGHUP,
    _signal.SIGQUIT,
    _signal.SIGUSR1,
    _signal.SIGUSR2,
)
"""The signals that are for the program."""
_PR_SET_PDEATHSIG = 1


def die_with(parent_pid: int, signum: int = _signal.SIGKILL) -> None:
    """Ask the kernel for a signal when the parent dies, and make sure that it did not before (prctl(2))."""
    prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signum)


def prctl(option: int, value: int) -> None:
    """prctl(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def end_as(status: int) -> NoReturn:
    """End this process as another one ended, by its wait status."""
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    signum = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it has left its own core, if any
    if signum != _signal.SIGKILL:
        _signal.signal(signum, _signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    os._exit(128 + signum)  # a signal that is blocked
