"""Writes files of which nobody sees a half, and none is left where the disk is full or somebody interrupts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path`, with the same ending, which then takes its name.

    What is no file, such as /dev/stdout, is written as it is.

    Raises:
        OSError: `write`'s, or it cannot be renamed.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        write(path)
        return
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
