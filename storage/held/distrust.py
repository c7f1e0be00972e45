"""Whether a state in memory is still to be gone on from, by what became of those who have. Pure, but for its lock."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass

from storage.held.papers import PartLabel

NUM_RESTORES_MAX = 3
"""So often a job goes on from one state in memory without that a newer one is staged; then the store's is taken."""
NUM_STEPS = 20
"""A state that was restored from memory is blamed for what is not healthy within so many steps, or is staged first."""


@dataclass
class _Restored:
    step: int
    num: int = 1
    is_outlived: bool = False


class Distrust:
    """What was restored from memory, and how it went on. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._restored: dict[str, _Restored] = {}
        self._last: str | None = None

    def restored(self, attempt: str, step: int) -> None:
        """The job goes on from that attempt."""
        with self._lock:
            found = self._restored.get(attempt)
            if found is None:
                self._restored = {attempt: _Restored(step)}
            else:
                found.num += 1
            self._last = attempt

    def why_not(self, staged: PartLabel) -> str | None:
        """Why nothing that is held is to be gone on from, now that this was staged; None if there is no reason."""
        with self._lock:
            found = None if self._last is None else self._restored[self._last]
            if found is None:
                return None
            if staged.healthy:
                found.is_outlived = True
                if staged.step > found.step:
                    found.num = 0
                return None
            if found.is_outlived and staged.step - found.step > NUM_STEPS:
                return None
            return f"step {found.step}, restored from memory, has led to step {staged.step}, which is not healthy"

    def num_restores(self) -> dict[str, int]:
        """How often each attempt was gone on from since a newer state was staged."""
        with self._lock:
            return {attempt: found.num for attempt, found in self._restored.items() if found.num}

    def forget(self, attempts: Collection[str] | None) -> None:
        """Those attempts are held no longer."""
        with self._lock:
            self._restored = {a: found for a, found in self._restored.items() if attempts and a not in attempts}
            if self._last not in self._restored:
                self._last = None


def worn_out(num_restores: Collection[dict[str, int]]) -> list[str]:
    """The attempts that a job has gone on from too often, by what the nodes have counted."""
    return sorted({a for counted in num_restores for a, num in counted.items() if num >= NUM_RESTORES_MAX})
