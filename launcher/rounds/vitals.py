"""What a node tells of its workers now and then, for people who ask how a job is: no decision depends on it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Vitals:
    """Times are epoch seconds by the node's clock, 0 where there is none; steps are -1 then.

    `beat_ts`: the last heartbeat of that worker which has been silent for the longest. `failure` in one line.
    """

    generation: int = 0
    step: int = -1
    beat_ts: float = 0.0
    failure_ts: float = 0.0
    failure: str = ""
    checkpoint_step: int = -1
    checkpoint_ts: float = 0.0

    def to_json(self) -> bytes:
        """Return it as it is stored."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Vitals:
        """Read what a node has told; a later version may tell more. Raises ValueError or TypeError for all else."""
        told: Any = json.loads(data)
        if not isinstance(told, dict):
            raise TypeError("no object")
        known = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        return cls(**{name: _typed(known[name], value) for name, value in told.items() if name in known})


def _typed(kind: type, value: object) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value!r} is no time")
    return kind(value)
