"""Where a job's time went. Pure: events in, seconds by cause out; they add up to the wall time.

The events of all nodes, in the order of their time stamps, drive one state machine for the job as a whole::

    FORMING ──round_formed──► STARTING ──first step──► TRAINING ──loss, failure, yield──► STOPPING ──┐
                                 ▲   └──loss, failure──► STOPPING                                    │
                                 └───────────────────────────round_formed────────────────────────────┘
    any ──finished──► CLOSED ──node_joined──► FORMING

Training counts from the start of the first step (`first_step`; scripts that do not tell it: from their last worker's
start) to the moment at which a node noticed that it is over. What a fault costs before anybody notices it therefore
counts as training, unless it is work that was lost: what was trained after the state that the next round restored.
Clocks of different hosts are taken as they are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from launcher.rounds.records import SUCCEEDED
from launcher.wording import Event, describe_failure, describe_fields, describe_root_cause


class Cause(StrEnum):
    """What a second was spent on."""

    TRAINING = "training"
    CHECKPOINT = "checkpoint stall"
    LOST_WORK = "work lost and done again"
    START = "first start"
    NODE_LOSS = "node loss"
    HANG = "hang"
    FAILURE = "worker failure"
    DRAIN = "drain"
    JOIN = "join"
    OTHER = "other restart"
    IDLE = "not running"


# The later of two explains the other: workers fail because a node is lost, nodes stop because workers fail.
_RANK = (Cause.OTHER, Cause.JOIN, Cause.DRAIN, Cause.FAILURE, Cause.NODE_LOSS, Cause.HANG)


@dataclass(frozen=True)
class Interruption:
    """Why and for how long a job did not train. Times are epoch seconds; None where it did not come to that."""

    cause: Cause
    root: str
    """What began it, in one line."""
    victims: tuple[str, ...]
    """Failures that came with it, in the order of their time stamps."""
    generation: int
    """The generation that it ended."""
    began_ts: float
    formed_ts: float | None
    resumed_ts: float | None
    steps_redone: int | None
    """Steps that were trained and then lost; None where events do not tell."""


@dataclass(frozen=True)
class Goodput:
    """The account of one run."""

    began_ts: float
    ended_ts: float
    seconds: Mapping[Cause, float]
    interruptions: tuple[Interruption, ...]
    outcome: str
    """As `finished` told it last; "" where there is no such event (yet)."""
    last_step: int | None

    @property
    def wall_s(self) -> float:
        """From the first event to the last."""
        return self.ended_ts - self.began_ts

    @property
    def fraction(self) -> float:
        """The part of the wall time in which the job made progress that it kept."""
        return self.seconds[Cause.TRAINING] / self.wall_s if self.wall_s > 0 else 0.0


_CAUSE_OF_CLASS = {"hang": Cause.HANG, "preemption": Cause.DRAIN}
"""The classes of failures that are something else than a failure of the workers."""


class _Phase(StrEnum):
    FORMING = "forming"
    STARTING = "starting"
    TRAINING = "training"
    STOPPING = "stopping"
    CLOSED = "closed"


@dataclass
class _Open:
    """An interruption that is not over."""

    cause: Cause
    root: str
    generation: int
    began_ts: float
    formed_ts: float | None = None
    failures: list[Event] = field(default_factory=list)
    root_rank: int | None = None
    """Whose failure it began with, where the leader has told."""

    def explain(self, cause: Cause, root: str) -> None:
        """Take a cause that explains what was known so far."""
        if _RANK.index(cause) > _RANK.index(self.cause):
            self.cause, self.root = cause, root

    def end(self, resumed_ts: float | None) -> Interruption:
        return Interruption(
            cause=self.cause,
            root=self.root,
            victims=tuple(
                told
                for failure in self.failures
                if (told := describe_failure(failure)) != self.root and failure.get("rank") != self.root_rank
            ),
            generation=self.generation,
            began_ts=self.began_ts,
            formed_ts=self.formed_ts,
            resumed_ts=resumed_ts,
            steps_redone=None,
        )


@dataclass
class _Training:
    """One stretch of training: what is known of its steps."""

    began_ts: float
    ended_ts: float
    first_step: int | None
    reached: int | None = None
    """The last step that events tell of."""
    exact: bool = False
    """Whether `reached` is where it ended, and not just the last that was told."""
    yielded: bool = False
    """Whether it stopped at a step boundary, with its state saved."""
    ended_by: int | None = None
    """Index of the interruption that ended it."""


def account(events: Iterable[Event]) -> Goodput:
    """The account of one run's events, in any order.

    Raises:
        ValueError: there is none.
    """
    ordered = sorted(events, key=lambda event: float(event["ts"]))
    if not ordered:
        raise ValueError("no events")
    ledger = _Ledger(ordered)
    for event in ordered:
        ledger.hear(event)
    return ledger.close()


class _Ledger:
    """The state machine: hears events in order, keeps spans of time by cause."""

    def __init__(self, ordered: Sequence[Event]) -> None:
        self._ordered = ordered
        self._began_ts = self._since_ts = float(ordered[0]["ts"])
        self._tells_first_step = any(event["event"] == "first_step" for event in ordered)
        self._phase = _Phase.FORMING
        self._generation = 0
        self._participants: frozenset[str] = frozenset()
        self._started: set[str] = set()
        self._stop_reason = ""
        self._open: _Open | None = None
        self._seconds = dict.fromkeys(Cause, 0.0)
        self._trained: list[_Training] = []
        self._ended: list[Interruption] = []
        self._outcome = ""

    def hear(self, event: Event) -> None:
        """Take one event; those without a meaning for the account change nothing."""
        match event["event"]:
            case "round_formed":
                self._round_formed(event)
            case "workers_started" if self._is_of_round(event):
                self._workers_started(event)
            case "first_step" if self._is_of_round(event):
                self._first_step(event)
            case "stop_requested" if event.get("generation") == self._generation:
                self._stop_reason = str(event.get("reason", ""))
            case "root_cause" if event.get("generation") == self._generation and self._open is not None:
                self._open.root_rank = event.get("rank")
                cause = _CAUSE_OF_CLASS.get(str(event.get("failure_class")), Cause.FAILURE)
                if _RANK.index(cause) >= _RANK.index(self._open.cause):
                    self._open.cause, self._open.root = cause, describe_root_cause(event)
            case "finished":
                self._finished(event)
            case "node_joined" if self._phase is _Phase.CLOSED:
                self._pass_to(_Phase.FORMING, float(event["ts"]))
            case "checkpoint_staged" | "workers_stopped" | "workers_yielded" | "worker_failed":
                self._reached(event)
        if ending := self._ending(event):
            self._interrupt(event, *ending)

    # --- the machine

    def _is_of_round(self, event: Event) -> bool:
        return event.get("generation") == self._generation and event.get("node") in self._participants

    def _round_formed(self, event: Event) -> None:
        ts = float(event["ts"])
        if self._phase is _Phase.TRAINING:  # what ended it was not told
            self._interrupt(event, Cause.OTHER, str(event.get("reason", "")))
        self._generation = int(event["generation"])
        self._participants = frozenset(p["node_id"] for p in event.get("participants", ()))
        self._started = set()
        self._stop_reason = ""
        if self._open is not None:
            self._open.formed_ts = ts
        self._pass_to(_Phase.STARTING, ts)

    def _workers_started(self, event: Event) -> None:
        """A script that never tells its first step trains once its last worker has started."""
        self._started.add(event["node"])
        if not self._tells_first_step and self._started >= self._participants:
            self._train(float(event["ts"]), first_step=None)

    def _first_step(self, event: Event) -> None:
        began_ts = float(event["ts"]) - float(event.get("step_s", 0.0))
        self._train(max(began_ts, self._since_ts), first_step=int(event["step"]))

    def _train(self, ts: float, first_step: int | None) -> None:
        if self._phase is not _Phase.STARTING:
            return
        self._pass_to(_Phase.TRAINING, ts)
        if self._open is not None:
            self._ended.append(self._open.end(ts))
            self._open = None
        self._trained.append(_Training(ts, ts, first_step, reached=first_step))

    def _reached(self, event: Event) -> None:
        step = event.get("step")
        if not self._trained or event.get("generation") != self._generation or not isinstance(step, int) or step < 0:
            return
        last = self._trained[-1]
        if last.reached is None or step >= last.reached:
            last.reached = step
            last.exact = last.exact or event["event"] != "checkpoint_staged"
        last.yielded = last.yielded or event["event"] == "workers_yielded"

    def _finished(self, event: Event) -> None:
        self._outcome = str(event.get("outcome", ""))
        self._pass_to(_Phase.CLOSED, float(event["ts"]))
        if self._open is not None:
            self._ended.append(self._open.end(None))
            self._open = None

    def _ending(self, event: Event) -> tuple[Cause, str] | None:
        """Why this event ends the current round's work, as far as it does."""
        name, node = event["event"], str(event.get("node", ""))
        reason = str(event.get("reason", ""))
        match name:
            case "node_lost" if event.get("node_lost") in self._participants:
                return Cause.NODE_LOSS, f"node {event['node_lost']} {reason}"
            case "node_left" if event.get("node_left") in self._participants:
                return Cause.DRAIN, f"node {event['node_left']} left"
            case "node_fenced" if node in self._participants:
                return Cause.NODE_LOSS, f"node {node} fenced itself: {reason}"
        if not self._is_of_round(event):
            return None
        match name:
            case "round_broken":
                return _cause_of(reason), reason
            case "hang_detected":
                return Cause.HANG, f"hang on {node}: {describe_fields(event)}"
            case "worker_failed":
                return Cause.FAILURE, describe_failure(event)
            case "workers_yielded":
                return _cause_of(self._stop_reason), self._stop_reason or "workers stopped at a step boundary"
            case "workers_stopped":
                return _cause_of(self._stop_reason or reason), self._stop_reason or reason
        return None

    def _interrupt(self, event: Event, cause: Cause, root: str) -> None:
        ts = float(event["ts"])
        if self._phase in (_Phase.TRAINING, _Phase.STARTING):
            was_training = self._phase is _Phase.TRAINING
            self._pass_to(_Phase.STOPPING, ts)
            if self._open is not None:  # it broke before it trained
                self._ended.append(self._open.end(None))
            self._open = _Open(cause, root, self._generation, ts)
            if was_training:
                self._trained[-1].ended_by = len(self._ended)
        elif self._phase is not _Phase.STOPPING or self._open is None:
            return
        self._open.explain(cause, root)
        if event["event"] == "worker_failed":
            self._open.failures.append(event)

    def _pass_to(self, phase: _Phase, ts: float) -> None:
        """Book the time since the last change, and go on in another phase."""
        span_s = ts - self._since_ts
        match self._phase:
            case _Phase.TRAINING:
                self._trained[-1].ended_ts = ts
            case _Phase.CLOSED:
                self._seconds[Cause.IDLE] += span_s
            case _ if self._open is None:
                self._seconds[Cause.START] += span_s
            case _Phase.STOPPING | _Phase.STARTING:
                self._seconds[self._open.cause] += span_s
        self._phase, self._since_ts = phase, ts

    # --- the end of the account

    def close(self) -> Goodput:
        """Book what is open, and tell kept work from lost work and stalls."""
        ended_ts = float(self._ordered[-1]["ts"])
        self._pass_to(_Phase.CLOSED, ended_ts)
        if self._open is not None:
            self._ended.append(self._open.end(None))
        lost = self._lost_work()
        hung = [
            (float(e["ts"]) - float(e.get("seconds", 0.0)), float(e["ts"]))
            for e in self._ordered
            if e["event"] == "hang_detected"
        ]
        stalls = [*self._stagings(), *self._last_saves()]
        for span in self._trained:
            within = span.began_ts, span.ended_ts
            lost_s = covered(within, lost)
            hung_s = covered(within, [*lost, *hung]) - lost_s
            stalled_s = covered(within, [*lost, *hung, *stalls]) - lost_s - hung_s
            self._seconds[Cause.LOST_WORK] += lost_s
            self._seconds[Cause.HANG] += hung_s
            self._seconds[Cause.CHECKPOINT] += stalled_s
            self._seconds[Cause.TRAINING] += span.ended_ts - span.began_ts - lost_s - hung_s - stalled_s
        return Goodput(
            began_ts=self._began_ts,
            ended_ts=ended_ts,
            seconds=self._seconds,
            interruptions=tuple(self._ended),
            outcome=self._outcome,
            last_step=self._trained[-1].reached if self._trained else None,
        )

    def _stagings(self) -> Iterator[tuple[float, float]]:
        """When a rank copied its state aside; the slowest holds all others up, so what counts is the union."""
        for event in self._ordered:
            if event["event"] == "checkpoint_staged":
                ts = float(event["ts"])
                yield ts - float(event.get("seconds", 0.0)), ts

    def _last_saves(self) -> Iterator[tuple[float, float]]:
        """From the copy of a stretch's last state to its end: nothing is trained while it is written."""
        for span in self._trained:
            ended_well = span is self._trained[-1] and self._outcome == SUCCEEDED
            if span.reached is not None and (span.yielded or ended_well):
                staged_ts = self._staged_ts(span.reached, before=span.ended_ts)
                if staged_ts is not None and staged_ts > span.began_ts:
                    yield staged_ts, span.ended_ts

    def _lost_work(self) -> list[tuple[float, float]]:
        """When work was done that a later round did again; notes the number of steps with the interruption."""
        lost: list[tuple[float, float]] = []
        for before, after in zip(self._trained, self._trained[1:], strict=False):
            if after.first_step is None or before.first_step is None:
                continue  # such scripts do not tell
            resumed_after = after.first_step - 1
            redone = None if before.reached is None or not before.exact else max(0, before.reached - resumed_after)
            if before.ended_by is not None:
                ended = self._ended[before.ended_by]
                self._ended[before.ended_by] = dataclasses.replace(ended, steps_redone=redone)
            since_ts = self._staged_ts(resumed_after, before=after.began_ts)
            if since_ts is not None and redone != 0:
                lost.append((since_ts, after.began_ts))
        return lost

    def _staged_ts(self, step: int, *, before: float) -> float | None:
        """When the state after `step` was last copied aside; from step 0 on, when training began."""
        if step == 0:
            return self._trained[0].began_ts
        staged = [
            float(e["ts"])
            for e in self._ordered
            if e["event"] == "checkpoint_staged" and e.get("step") == step and float(e["ts"]) < before
        ]
        return max(staged, default=None)


def _cause_of(reason: str) -> Cause:
    """What a round's stop, or a node's reason to stop its workers, says of the cause."""
    for start, cause in (("drain", Cause.DRAIN), ("join", Cause.JOIN), ("worker", Cause.FAILURE)):
        if reason.startswith(start):
            return cause
    return Cause.NODE_LOSS if re.search(r"\bnode \S+ lost\b", reason) else Cause.OTHER


def covered(within: tuple[float, float], intervals: Iterable[tuple[float, float]]) -> float:
    """How much of `within` the union of `intervals` covers."""
    begin, end = within
    total, upto = 0.0, begin
    for left, right in sorted(intervals):
        left, right = max(left, upto), min(right, end)
        if right > left:
            total += right - left
            upto = right
    return total
