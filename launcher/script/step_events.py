"""Decides which heartbeats are told as events. Pure but for `claim`: time is an argument.

`report` needs to know when a round trained, how far it came and which steps were done again, also of jobs that are
killed with all their nodes. So these are told: the first step, each return to an earlier one, and now and then how far
it is, often at first and then after each twentieth of the time so far, at least once a minute.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from launcher.events import EventName

_SHARE = 0.05
_SHORTEST_S, _LONGEST_S = 0.2, 60.0

NamedEvent = tuple[EventName, dict[str, Any]]
"""An event's name and fields."""


class StepTeller:
    """Counts the heartbeats of one worker, which speaks for all of its node."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._began_s = self._told_s = 0.0
        self._told_step = 0
        self._every: int | None = None

    def beat(self, step: int, now_s: float, step_s: float | None = None) -> NamedEvent | None:
        """Count `step`, done at the monotonic time `now_s`; the event to tell of it, if one is due.

        `step_s`: how long the step took, where the script knows.
        """
        before, self._step = self._step, step
        if before is None:
            self._began_s = now_s
            told: dict[str, Any] = {"step": step} | ({} if step_s is None else {"step_s": round(step_s, 6)})
            self._mark(step, now_s)
            return EventName.FIRST_STEP, told
        if step < before:
            self._mark(step, now_s)
            return EventName.STEPS_RESTARTED, {"step": step, "reached": before}
        if step > before:
            self._every = min(step - before, self._every or step - before)
        since_s = now_s - self._told_s
        if step == self._told_step or since_s < min(max(_SHARE * (now_s - self._began_s), _SHORTEST_S), _LONGEST_S):
            return None
        told = {"step": step, "step_s": round(since_s / (step - self._told_step), 6), "every": self._every}
        self._mark(step, now_s)
        return EventName.PROGRESS, told

    def _mark(self, step: int, now_s: float) -> None:
        self._told_step, self._told_s = step, now_s


def claim(channel: Path, generation: int) -> bool:
    """Whether this worker speaks for its node: the first one that beats does, as a file beside the channels shows."""
    try:
        os.close(os.open(channel.with_name(f"teller-{generation}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError:
        return False
    return True
