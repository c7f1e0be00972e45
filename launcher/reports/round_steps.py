"""The steps of each round, as all events together tell them: when the first began, how far it came, when. Pure."""

from __future__ import annotations

import bisect
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from launcher.events import EventName, EventRecord
from launcher.rounds.failures import FailureClass

_EXACT = {EventName.WORKERS_STOPPED, EventName.WORKERS_YIELDED, EventName.WORKER_FAILED, EventName.WORKERS_DONE}
"""Events in which agents say exactly how far their workers came."""

_AT_START = (FailureClass.START_UP, FailureClass.USAGE)
_NUM_USUAL = 3  # so many steps tell what is usual, though one of them took long
_NUM_LATE = 8  # rounds that may be formed before the last event of one has been written


@dataclass
class RoundSteps:
    """What is known of one round's steps. Times are epoch seconds."""

    generation: int
    participants: frozenset[str]
    formed_ts: float
    first: EventRecord | None = None
    """The first event of that name."""
    reached: int | None = None
    """The last step that events tell of."""
    restored: tuple[float, int] | None = None
    """When the last worker had read a checkpoint before the first step, and of which step that is."""
    every: int | None = None
    """How many steps lie between two heartbeats; None if nobody told."""
    usual_step_s: float = 0.0
    """How long a step takes in other rounds."""
    saved_ts: float | None = None
    """When the state after the last step that was saved had been copied aside."""
    restarts: list[tuple[float, int, int]] = field(default_factory=list)
    """Each return to an earlier step: when that step was done, which it was, and how far the round had come."""
    first_gone_ts: float | None = None
    """When the first of its workers had ended, as far as agents tell."""
    failed_at_start: bool = False
    """Whether the program failed before it got to work."""
    _exact: int = -1
    _done: dict[int, float] = field(default_factory=dict)
    _in_order: list[tuple[int, float]] = field(default_factory=list)
    _told_step_s: list[float] = field(default_factory=list)

    def hear(self, event: EventRecord) -> None:
        """Learn from one event of this round."""
        ts, step = float(event["ts"]), event.get("step")
        if event["event"] in (EventName.WORKERS_STOPPED, EventName.WORKER_FAILED):
            self.first_gone_ts = min(ts, self.first_gone_ts or ts)
            self.failed_at_start |= event.get("failure_class") in _AT_START
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            return
        match event["event"]:
            case EventName.FIRST_STEP:
                self.first = self.first or event
                self._mark(step, ts)
            case EventName.PROGRESS:
                self._mark(step, ts)
                self._told_step_s.append(float(event.get("step_s", 0.0)))
                self.every = min(int(event.get("every") or 1), self.every or sys.maxsize)
            case EventName.STEPS_RESTARTED:
                self.restarts.append((ts, step, int(event.get("reached", step))))
                self._mark(self.restarts[-1][2], ts)
            case EventName.CHECKPOINT_STAGED:
                self._mark(step, ts - float(event.get("seconds", 0.0)))
                if self.reached == step:
                    self.saved_ts = ts
            case EventName.HANG_DETECTED:
                self._mark(step, ts - float(event.get("seconds", 0.0)))
                self._exact = max(step, self._exact)
            case EventName.RESTORED if self.first is None:
                self.restored = (ts, step)
            case name if name in _EXACT:
                self._mark(step, float(event["step_ts"]) if "step_ts" in event else None)
                self._exact = max(step, self._exact)

    def _mark(self, step: int, ts: float | None) -> None:
        self.reached = step if self.reached is None else max(step, self.reached)
        if ts is not None and ts >= self.formed_ts:
            self._done[step] = min(ts, self._done.get(step, ts))
            self._in_order = []

    @property
    def _marks(self) -> list[tuple[int, float]]:
        """Steps and when they were done, in order."""
        if not self._in_order:
            self._in_order = sorted(self._done.items())
        return self._in_order

    @property
    def highest(self) -> int:
        """The last step whose state it had at a time that is told."""
        return max(self._marks[-1][0] if self._marks else 0, self.resumed_after or 0)

    @property
    def resumed_after(self) -> int | None:
        """The step whose state this round began with; None where it tells no steps."""
        if self.first is None:
            return None
        first = int(self.first["step"])
        return self.restored[1] if self.restored and self.restored[1] <= first else max(0, first - (self.every or 1))

    @property
    def step_s(self) -> float:
        """How long a step usually takes; 0 where that is not known."""
        told = self._told_step_s
        if len(told) >= _NUM_USUAL:
            return statistics.median(told)
        marks = self._marks
        if len(marks) > 1 and marks[-1][1] > marks[0][1]:
            meanwhile_s = (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0])
            return min([meanwhile_s, *told])  # the only one that is told may be that in which the node was frozen
        if told:
            return min(told)
        return float(self.first.get("step_s", self.usual_step_s)) if self.first else 0.0

    @property
    def beat_s(self) -> float:
        """How long it usually is from one heartbeat to the next; 0 where that is not known."""
        return self.step_s * (self.every or 1)

    @property
    def first_began_ts(self) -> float | None:
        """When the first step began; None if no step is told."""
        if self.first is None:
            return None
        num_done = int(self.first["step"]) - (self.resumed_after or 0)  # more than one if it does not beat for each
        began_ts = float(self.first["ts"]) - float(self.first.get("step_s", self.step_s)) * max(1, num_done)
        return max(began_ts, self.formed_ts, self.restored[0] if self.restored else began_ts)

    def last_done_ts(self) -> float | None:
        """When the last step was done; None if no agent told."""
        return self._done.get(self.reached) if self.reached is not None and self.is_exact else None

    @property
    def is_exact(self) -> bool:
        """Whether an agent told how far the round came: workers do not tell every step."""
        return self.reached is not None and self._exact >= self.reached

    def done_ts(self, step: int) -> float | None:
        """When `step` was done, as near as events tell; None if that was not in this round."""
        marks = self._marks
        if not marks or not marks[0][0] <= step <= marks[-1][0]:
            return None
        at = bisect.bisect_left(marks, (step,))
        if marks[at][0] == step:
            return marks[at][1]
        (before, before_ts), (after, after_ts) = marks[at - 1], marks[at]
        return before_ts + (after_ts - before_ts) * (step - before) / (after - before)


def rounds_of(ordered: Sequence[EventRecord]) -> list[RoundSteps]:
    """The rounds in the order in which they were formed.

    A generation's number may come again (a store that was made anew counts from 1), and events of a round may come
    after the next one was formed: they belong to the last round of that number which their node took part in.
    """
    rounds = [
        RoundSteps(
            generation=int(event["generation"]),
            participants=frozenset(p["node_id"] for p in event.get("participants", ())),
            formed_ts=float(event["ts"]),
        )
        for event in ordered
        if event["event"] == EventName.ROUND_FORMED
    ]
    formed = [found.formed_ts for found in rounds]
    for event in ordered:
        num_before = bisect.bisect_right(formed, float(event["ts"]))
        for index in range(num_before - 1, max(num_before - _NUM_LATE, 0) - 1, -1):
            found = rounds[index]
            if found.generation == event.get("generation") and event.get("node") in found.participants:
                found.hear(event)
                break
    usual_s = statistics.median([found.step_s for found in rounds if found.step_s] or [0.0])
    every = min((found.every for found in rounds if found.every), default=None)
    for found in rounds:
        found.every, found.usual_step_s = found.every or every, usual_s
    return rounds
