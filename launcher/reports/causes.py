"""The parts of which the account of a job's time is made."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    """What a second was spent on."""

    TRAINING = "training"
    CHECKPOINT = "checkpoint stall"
    LOST_WORK = "work lost and done again"
    WAITING = "waiting for nodes"
    START = "first start"
    NODE_LOSS = "node loss"
    STORE = "store outage"
    HANG = "hang"
    FAILURE = "worker failure"
    DRAIN = "drain"
    JOIN = "join"
    OTHER = "other restart"
    IDLE = "not running"


EXPLAINS = (Cause.OTHER, Cause.JOIN, Cause.DRAIN, Cause.FAILURE, Cause.STORE, Cause.NODE_LOSS, Cause.HANG)
"""The later of two explains the other: workers fail because a node is lost, nodes stop because workers fail."""


@dataclass(frozen=True)
class Interruption:
    """Why and for how long a job did not train. Times are epoch seconds; None where it did not come to that."""

    cause: Cause
    root: str
    """What began it, in one line."""
    nodes: tuple[str, ...]
    """The nodes in which it began: that were lost, left or joined, or whose worker was the first to fail."""
    victims: tuple[str, ...]
    """Failures that came with it, in the order of their time stamps."""
    generation: int
    """The generation that it ended."""
    began_ts: float
    """When the last step before it was done."""
    formed_ts: float | None
    resumed_ts: float | None
    """When a step began again; None if something else came in between, or the job ended."""
    ended_ts: float | None
    """When it resumed, gave way to another interruption, or the job ended."""
    followed_by: str
    """What came in between; "" if it resumed, or the job ended."""
    steps_redone: int | None
    """Steps that were trained and then lost; None where events do not tell."""

    @property
    def seconds(self) -> float | None:
        """How long it lasted; None if it had not ended."""
        return None if self.ended_ts is None else self.ended_ts - self.began_ts


class StoreKind(StrEnum):
    """What a store is for."""

    JOB = "job store"
    """The one where nodes meet."""
    CHECKPOINTS = "checkpoint store"


@dataclass(frozen=True)
class Outage:
    """A time in which nodes or workers had no answer from a store."""

    store: StoreKind
    where: str
    """The checkpoint store's URL."""
    nodes: tuple[str, ...]
    """The nodes that said so."""
    reason: str
    began_ts: float
    ended_ts: float | None


@dataclass(frozen=True)
class Goodput:
    """The account of one run."""

    began_ts: float
    ended_ts: float
    seconds: Mapping[Cause, float]
    interruptions: tuple[Interruption, ...]
    outages: tuple[Outage, ...]
    outcome: str
    """What the last `finished` event says; "" without such an event."""
    end: str
    """How the last nodes ended, if there is no outcome; "" if they may still run."""
    last_step: int | None
    steps_redone: int
    """Steps that were done more than once, as far as events tell."""

    @property
    def wall_s(self) -> float:
        """From the first event to the last."""
        return self.ended_ts - self.began_ts

    @property
    def fraction(self) -> float:
        """The part of the wall time in which the job made progress that it kept."""
        return min(1.0, max(0.0, self.seconds[Cause.TRAINING] / self.wall_s)) if self.wall_s > 0 else 0.0


class Spans:
    """The union of spans of time, asked how much of others it covers: a search in it, however many there are."""

    def __init__(self, spans: Iterable[tuple[float, float]]) -> None:
        self._begins: list[float] = []
        self._ends: list[float] = []
        for begin, end in sorted(spans):
            if end <= begin:
                continue
            if self._ends and begin <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._begins.append(begin)
                self._ends.append(end)
        lengths = (end - begin for begin, end in zip(self._begins, self._ends, strict=True))
        self._before = list(itertools.accumulate(lengths, initial=0.0))

    def within(self, begin: float, end: float) -> float:
        """How much of the time from `begin` to `end` is covered."""
        return self._upto(end) - self._upto(begin) if end > begin else 0.0

    def _upto(self, ts: float) -> float:
        at = bisect.bisect_right(self._begins, ts) - 1
        return self._before[at] + min(ts, self._ends[at]) - self._begins[at] if at >= 0 else 0.0
