"""Where the time of a restore goes."""

from __future__ import annotations

import time
from collections.abc import Callable


class Phases:
    """Seconds by phase, each from the end of the one before. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = self._last_s = clock()
        self._seconds: dict[str, float] = {}

    def ended(self, phase: str) -> None:
        """What was done since the last call was that; one phase may come several times."""
        now_s = self._clock()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now_s - self._last_s
        self._last_s = now_s

    def told(self) -> dict[str, object]:
        """The fields `seconds`, of all, and `phases`."""
        phases = {name: round(seconds, 3) for name, seconds in self._seconds.items()}
        return {"seconds": round(self._clock() - self._began_s, 3), "phases": phases}
