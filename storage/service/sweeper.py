"""A process that outlives a service which no agent looks after: what is left of that, when it was killed, is cleared.

A save of which nothing is left is said to have failed, and the files go. Imports nothing but Python's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

SWEEP = "--sweep"
"""To the service's program: tell what is left to be told, and end."""


class Sweeper:
    """A fork of the keeper, made while that has one thread, that waits for its end and for that of its services.

    Args:
        lock: a descriptor that it must not hold.
    """

    def __init__(self, lock: int) -> None:
        reading, self._writing = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            self._sweep(reading, lock)
        os.close(reading)

    def close(self) -> None:
        """End it: there is nothing left to sweep."""
        with contextlib.suppress(OSError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._writing)

    def _sweep(self, reading: int, lock: int) -> None:
        try:
            os.setsid()
            os.close(self._writing)
            os.close(lock)
            while os.read(reading, 1):
                pass
            program = [argument for argument in sys.orig_argv if argument not in ("--detach", SWEEP)]
            os.execve(sys.executable, [*program, SWEEP], os.environ)
        finally:
            os._exit(1)
