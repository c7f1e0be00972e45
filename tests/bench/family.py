"""All that a benchmark has started ends with it, also where a signal ends the benchmark."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil

_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_END_S = 30.0


@contextlib.contextmanager
def ends_with_its_family(folder: Path) -> Iterator[None]:
    """Kill what is left below this process, and every service that has its socket in `folder`, when the block ends.

    A signal to end becomes a SystemExit in the block, so that it is left as it would be after an error.
    """

    left: list[psutil.Process] = []

    def end(number: int, frame: object) -> NoReturn:
        for each in _ENDING:
            signal.signal(each, signal.SIG_IGN)  # one is enough: the second would interrupt the tidying up
        left.extend(psutil.Process().children(recursive=True))  # now: the children of who is killed are nobody's
        raise SystemExit(128 + number)

    before = [signal.signal(each, end) for each in _ENDING]
    try:
        yield
    finally:
        left += [*psutil.Process().children(recursive=True), *services(folder)]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=_END_S)
        for each, handler in zip(_ENDING, before, strict=True):
            signal.signal(each, handler)


def services(folder: Path) -> list[psutil.Process]:
    """The checkpoint services, keepers included, whose sockets are in `folder`: they are nobody's children."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            is_service = any("storage.service" in word for word in line)  # it may be started by `-c`, too
            if is_service and any(word.startswith(f"{folder}/") for word in line):
                found.append(process)
    return found
