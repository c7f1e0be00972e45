"""Keeps an agent and its workers from failing when their console goes away.

Workers write to what the agent was given as stdout and stderr. Where that is a pipe whose reader goes (`| head`), or a
file on a disk that fills, a `print` in a script would raise, and the job would end of it. So whatever is no terminal is
reached through a pump (`pump.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading

from launcher.events import Emit, EventName
from launcher.lifecycle import Lifecycle
from launcher.workers import pump

log = logging.getLogger(__name__)

_DRAIN_S = 2.0
_STREAMS = {1: "stdout", 2: "stderr"}


class Console(Lifecycle):
    """Between `start` and `close`, this process's stdout and stderr, and its children's, lead through a pump."""

    def __init__(self) -> None:
        self._given: dict[int, int] = {}
        self._pump: subprocess.Popen[bytes] | None = None
        self._notices = -1
        self._listener: threading.Thread | None = None

    def start(self) -> None:
        """Lead the output through a pump; where that cannot be done, it goes on as it is, which is logged."""
        try:
            self._start()
        except OSError as error:
            log.warning("output goes straight to the console, and ends with it: %s", error)

    def _start(self) -> None:
        targets: dict[tuple[int, int], list[int]] = {}  # two names for one file keep their lines in order
        for fd in _STREAMS:
            if (file := _file_that_may_fail(fd)) is not None:
                targets.setdefault(file, []).append(fd)
        if not targets:
            return
        with contextlib.ExitStack() as stack:
            told, writes, passed = [], {}, []
            self._notices, notice_w = os.pipe()
            stack.callback(os.close, notice_w)
            for fds in targets.values():
                read, write = os.pipe()
                given = os.dup(fds[0])
                for opened in (read, write, given):
                    stack.callback(os.close, opened)
                told.append(f"{read}:{given}:{' and '.join(_STREAMS[fd] for fd in fds)}")
                passed += [read, given]
                writes.update(dict.fromkeys(fds, write))
            self._pump = subprocess.Popen(
                [sys.executable, "-I", "-S", pump.__file__, str(notice_w), *told],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[notice_w, *passed],
                start_new_session=True,  # Ctrl-C ends the job first, and its last words are still to come
            )
            _flush()
            for fd, write in writes.items():
                self._given[fd] = os.dup(fd)
                os.dup2(write, fd)

    def tell(self, emit: Emit) -> None:
        """Record as events what the pump tells, what it has told before included."""
        if self._pump is not None:
            self._listener = threading.Thread(target=self._listen, args=(emit,), name="console", daemon=True)
            self._listener.start()

    def _listen(self, emit: Emit) -> None:
        with os.fdopen(os.dup(self._notices)) as notices:
            for line in notices:
                stream, _, reason = line.rstrip().partition(": ")
                emit(EventName.CONSOLE_LOST, stream=stream, reason=reason)

    def close(self) -> None:
        """Give back what was given, once all has gone through, or after a while: others may hold it, or be slow."""
        pump, self._pump = self._pump, None
        if pump is None:
            return
        _flush()
        for fd, given in self._given.items():
            os.dup2(given, fd)
            os.close(given)
        with contextlib.suppress(subprocess.TimeoutExpired):
            pump.wait(_DRAIN_S)
            if self._listener is not None:
                self._listener.join(_DRAIN_S)
        os.close(self._notices)


def _file_that_may_fail(fd: int) -> tuple[int, int] | None:
    """Identify the file that a descriptor is open on; None for a terminal or /dev/null, and for a closed descriptor."""
    try:
        found = os.fstat(fd)
    except OSError:
        return None
    if os.isatty(fd) or found.st_rdev == os.stat(os.devnull).st_rdev:
        return None
    return found.st_dev, found.st_ino


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
