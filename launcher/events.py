"""`events.jsonl`: one JSON object a line, appended by agents and workers alike.

Every line holds `ts` (epoch seconds), `run_id`, `node`, `generation`, `event`, then the event's own fields. A line is
one `write` to a file opened with O_APPEND, so processes that share the file never mix their lines.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Emit = Callable[..., None]
"""How the parts of the launcher report: `emit(event, generation=3, **fields)`."""


def append_event(path: Path, *, run_id: str, node: str, generation: int, event: str, fields: Mapping[str, Any]) -> None:
    """Append one event; a full disk or a vanished folder costs the event, never the job."""
    record = {
        "ts": round(time.time(), 6),
        "run_id": run_id,
        "node": node,
        "generation": generation,
        "event": event,
        **fields,
    }
    line = json.dumps(record, default=str, separators=(",", ":")) + "\n"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)
    except OSError as error:
        log.warning("event %s lost: cannot append to %s: %s", event, path, error)


class EventLog:
    """The events of one node, written to `path` and told to the log in one line each."""

    def __init__(self, path: Path | None, *, run_id: str, node: str) -> None:
        self.path = path
        self._run_id = run_id
        self._node = node

    def __call__(self, event: str, *, generation: int = 0, **fields: Any) -> None:
        """Record `event`."""
        told = " ".join(f"{key}={value}" for key, value in fields.items() if not isinstance(value, dict | list))
        log.info("[%s] generation %d: %s %s", self._node, generation, event, told)
        if self.path is not None:
            append_event(
                self.path,
                run_id=self._run_id,
                node=self._node,
                generation=generation,
                event=event,
                fields=fields,
            )
