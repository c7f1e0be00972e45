"""Reads the events of log folders, whatever a full disk, a kill or a log rotation has made of the files."""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Iterable
from pathlib import Path

from launcher.events import EventRecord

_NAME = "events.jsonl"
_CONTENT_BYTES_MAX = 1 << 30  # of a packed file, a thousandth of which it may be
_DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # a script's own NaN, say: JSON has no such number
_BEGIN = b'{"ts":'  # of every line as it is written


def find_files(paths: Iterable[Path]) -> list[Path]:
    """Find the event files that the paths name, each once; in folders also those that were rotated away.

    Raises:
        OSError: a path does not exist, or is neither a file nor a folder.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if not path.is_file() and not path.is_dir():
            raise OSError(f"{path}: a pipe or a device, and no file of events")
        files = sorted(p for p in path.rglob(f"{_NAME}*") if p.is_file()) if path.is_dir() else [path]
        found.update((file.resolve(), file) for file in files)
    return list(found.values())


def read_events(files: Iterable[Path]) -> tuple[list[EventRecord], int]:
    """Read the events of the files, each once; and count the lines that are none (a job may be writing its last).

    A line that was cut short, on a full disk say, has the next one in it: that is found again.

    Raises:
        OSError: a file cannot be read.
    """
    events: dict[bytes, EventRecord] = {}  # copies of a file, and what rotation copied, count once
    num_unreadable = 0
    for file in files:
        for line in filter(bytes.strip, _content(file).split(b"\n")):
            event = _event(line)
            if event is None:
                num_unreadable += 1
                line = line[max(line.rfind(_BEGIN), 0) :]
                event = _event(line)
            if event is not None:
                events[line] = event
    return list(events.values()), num_unreadable


def _content(file: Path) -> bytes:
    data = file.read_bytes()
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
            content = packed.read(_CONTENT_BYTES_MAX + 1)
    except (EOFError, zlib.error) as error:
        raise OSError(f"{file}: not whole as gzip: {error}") from error
    if len(content) > _CONTENT_BYTES_MAX:
        raise OSError(f"{file}: more than {_CONTENT_BYTES_MAX >> 20} MiB once it is unpacked")
    return content


def _event(line: bytes) -> EventRecord | None:
    try:
        found = _DECODER.decode(line.decode())
        ts = found["ts"]
        is_time = isinstance(ts, int | float) and not isinstance(ts, bool) and math.isfinite(ts)
        is_event = is_time and isinstance(found["event"], str)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None
    return found if is_event else None
