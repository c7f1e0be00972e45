"""JSON lines as other processes append them: read what is complete, remember how far, wait for the rest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Tail:
    """Follows one file of JSON lines that may not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def read(self) -> list[Record]:
        """The records that were completed since the last call; a line still being written waits for the next."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [json.loads(line) for line in complete.splitlines() if line.strip()]


def merge(*streams: Iterable[Record]) -> list[Record]:
    """Records of several files in the order of their time stamps."""
    return sorted((record for stream in streams for record in stream), key=lambda record: record["ts"])


def last_by_step(metrics: Iterable[Record]) -> dict[int, Record]:
    """For each step the last record of it: a step that was done again replaces the one that was lost."""
    found = {record["step"]: record for record in metrics}
    return dict(sorted(found.items()))


def by_generation(metrics: Iterable[Record]) -> Iterator[tuple[int, list[Record]]]:
    """Each generation's records, in the order of the generations."""
    generations: dict[int, list[Record]] = {}
    for record in metrics:
        generations.setdefault(record["generation"], []).append(record)
    yield from sorted(generations.items())
