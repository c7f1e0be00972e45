"""stdin, stdout and stderr of a command: closed from the start, full, or without a reader."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAMES = ("stdin", "stdout", "stderr")


def open_closed() -> None:
    """Open streams that were closed (`>&-`) on nothing: else the next file or socket has their number, and what was
    meant for nobody is written into it.
    """
    for fd, name in enumerate(_NAMES):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            os.set_inheritable(fd, True)
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115


def take_any_text() -> None:
    """Have stdout write `\\xNN` for what its encoding lacks, as stderr does: names, in a locale without UTF-8."""
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and (out.errors == "strict" or out.encoding.lower() != "utf-8"):
        out.reconfigure(errors="backslashreplace")


class _Outliving(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            _lead_nowhere(self.fileno())
            return len(memoryview(data).cast("B"))


def outlive_reader() -> None:
    """Drop what is written after the reader (`| head`) has gone, so that what the command does it does to its end, and
    its exit code is true: of a copy, a check, or nodes that are waited for.
    """
    for fd, name in enumerate(_NAMES[1:], start=1):
        before = getattr(sys, name)
        if not isinstance(before, io.TextIOWrapper):
            continue
        before.flush()
        file = io.BufferedWriter(_Outliving(fd, "w", closefd=False))
        after = io.TextIOWrapper(
            file,
            encoding=before.encoding,
            errors=before.errors,
            line_buffering=before.line_buffering,
            write_through=before.write_through,
        )
        setattr(sys, name, after)


def flush() -> None:
    """Write what stdout holds; if that fails, drop it."""
    try:
        sys.stdout.flush()
    except OSError:
        drop_rest()


def drop_rest(fd: int = 1) -> None:
    """Drop what stdout (or stderr) still holds: Python would complain once more when it flushes it at exit."""
    with contextlib.suppress(OSError, ValueError):  # a stream of a test's
        _lead_nowhere(getattr(sys, _NAMES[fd]).fileno())


def _lead_nowhere(fd: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, fd)
    os.close(nowhere)
