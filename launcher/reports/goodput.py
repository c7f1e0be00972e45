"""Where a job's time went. Pure: events in, seconds by cause out; they add up to the wall time.

Training counts from the start of a round's first step (scripts that tell no steps: from their last worker's start) to
the end of its last. Where nobody told when that was, it is the moment at which a node noticed that training was over,
less the silence before it. Of training, what was lost counts as such: what was done after the state that the next round
began with, or before a return to an earlier step in the same round.

Clocks of different hosts are taken as they are; `launcher.reports.clocks` sets them right before.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from launcher.events import EventName, EventRecord
from launcher.reports.causes import Cause, Goodput, Interruption, Outage, Spans
from launcher.reports.ledger import Ledger, Stretch
from launcher.reports.outages import outages, silences
from launcher.reports.round_steps import rounds_of
from launcher.rounds.records import SUCCEEDED

__all__ = ["Cause", "Goodput", "Interruption", "Outage", "account"]

_AT_ONCE_S = 0.05

Span = tuple[float, float]
_STALLS = {
    EventName.CHECKPOINT_STAGED,
    EventName.CHECKPOINT_COPY_WAITED,
    EventName.CHECKPOINT_WAITED,
    EventName.RESTORED,
}
Staged = Mapping[object, Sequence[float]]
"""Step -> when ranks had copied their states aside and went on."""


def account(events: Iterable[EventRecord]) -> Goodput:
    """Account for one job's time from its events, which may come in any order.

    Raises:
        ValueError: there is no event.
    """
    ordered = sorted(events, key=lambda event: float(event["ts"]))
    if not ordered:
        raise ValueError("no events")
    silent = silences(ordered)
    ledger = Ledger(ordered, rounds_of(ordered), silent)
    for event in ordered:
        ledger.hear(event)
    end = ledger.end
    ended_ts = float(ordered[-1]["ts"])
    ledger.close(ended_ts)
    interruptions = list(ledger.ended)
    staged = _staged(ordered)
    lost, num_redone = _lost_work(ledger.stretches, interruptions, staged)
    stalls = [*_stalls(ordered), *_last_saves(ledger, staged)]
    lost_spans, idle_spans = Spans(lost), Spans([*lost, *stalls])
    for stretch in ledger.stretches:
        lost_s = lost_spans.within(stretch.began_ts, stretch.ended_ts)
        stalled_s = max(0.0, idle_spans.within(stretch.began_ts, stretch.ended_ts) - lost_s)
        ledger.seconds[Cause.LOST_WORK] += lost_s
        ledger.seconds[Cause.CHECKPOINT] += stalled_s
        ledger.seconds[Cause.TRAINING] += stretch.ended_ts - stretch.began_ts - lost_s - stalled_s
    return Goodput(
        began_ts=float(ordered[0]["ts"]),
        ended_ts=ended_ts,
        seconds=ledger.seconds,
        interruptions=tuple(interruptions),
        outages=outages(silent),
        outcome=ledger.outcome,
        end=end,
        last_step=ledger.stretches[-1].steps.reached if ledger.stretches else None,
        steps_redone=num_redone,
    )


def _stalls(ordered: Sequence[EventRecord]) -> Iterator[Span]:
    """The times in which a rank copied its state aside, waited for a commit or read a state: all others wait for it."""
    for event in ordered:
        if event["event"] in _STALLS:
            ts = float(event["ts"])
            yield ts - float(event.get("seconds", 0.0)), ts


def _last_saves(ledger: Ledger, staged: Staged) -> Iterator[Span]:
    """The times from the copy of a stretch's last state to its end: nothing is trained while that is written."""
    for stretch in ledger.stretches:
        ended_well = stretch is ledger.stretches[-1] and ledger.outcome == SUCCEEDED
        if stretch.steps.reached is not None and (stretch.yielded or ended_well):
            staged_ts = _last_before(staged.get(stretch.steps.reached, ()), stretch.ended_ts)
            if staged_ts is not None and staged_ts > stretch.began_ts:
                yield staged_ts, stretch.ended_ts


def _lost_work(
    stretches: Sequence[Stretch], interruptions: list[Interruption], staged: Staged
) -> tuple[list[Span], int]:
    """When work was done that was done again later, and how many steps it was.

    Their number goes to the interruption as well by which they were lost.
    """
    lost: list[Span] = []
    num_redone = 0
    trained = _Trained(stretches, staged)
    for i, stretch in enumerate(stretches):
        for ts, step, reached in stretch.steps.restarts:
            num_redone += reached - step + 1
            lost.append((trained.state_ts(i + 1, step - 1, before=ts), ts - stretch.steps.step_s))
        if i == 0 or stretch.steps.resumed_after is None:
            continue
        before, resumed_after = stretches[i - 1], stretch.steps.resumed_after
        redone = _num_redone(before, resumed_after)
        if redone is None and before.steps.reached is None:
            continue  # such scripts do not tell
        num_redone += redone or 0
        if before.ended_by is not None:
            ended = interruptions[before.ended_by]
            interruptions[before.ended_by] = dataclasses.replace(ended, steps_redone=redone)
        if redone != 0:
            lost.append((trained.state_ts(i, resumed_after, before=stretch.began_ts), stretch.began_ts))
    return lost, num_redone


def _num_redone(before: Stretch, resumed_after: int) -> int | None:
    """How many steps of a stretch were lost; None if there may be more of which nobody lived to tell."""
    if before.steps.reached is None:
        return None
    return max(0, before.steps.reached - resumed_after) or (0 if before.steps.is_exact else None)


class _Trained:
    """The stretches of a job, asked when it had a state."""

    def __init__(self, stretches: Sequence[Stretch], staged: Staged) -> None:
        self._stretches = stretches
        self._staged = staged
        self._highest = list(itertools.accumulate((stretch.steps.highest for stretch in stretches), max))

    def state_ts(self, num_stretches: int, step: int, *, before: float) -> float:
        """When the state after `step` was last copied aside in the first stretches; where nobody told that, when it was
        reached.
        """
        if step <= 0:
            return self._stretches[0].began_ts
        if (staged_ts := _last_before(self._staged.get(step, ()), before)) is not None:
            return staged_ts
        for i in range(num_stretches - 1, -1, -1):
            if self._highest[i] < step:
                break  # nor did those before it come so far
            stretch = self._stretches[i]
            if (done_ts := stretch.steps.done_ts(step)) is not None:
                return done_ts
            if (stretch.steps.resumed_after or 0) == step:
                return stretch.began_ts
        last = self._stretches[num_stretches - 1]
        return max(last.began_ts, last.ended_ts - ((last.steps.reached or step) - step) * last.steps.step_s)


def _staged(ordered: Iterable[EventRecord]) -> Staged:
    """When each step's state was copied aside. If the training then waited for the commit, it went on after that."""
    found: dict[object, list[float]] = collections.defaultdict(list)
    last: dict[object, tuple[object, float]] = {}
    for event in ordered:
        ts, worker = float(event["ts"]), (event.get("node"), event.get("rank"))
        if event["event"] == EventName.CHECKPOINT_STAGED:
            found[event.get("step")].append(ts)
            last[worker] = event.get("step"), ts
        elif event["event"] == EventName.CHECKPOINT_WAITED and worker in last:
            step, staged_ts = last[worker]
            if ts - float(event.get("seconds", 0.0)) <= staged_ts + _AT_ONCE_S:
                found[step].append(ts)
    return found


def _last_before(times: Sequence[float], ts: float) -> float | None:
    """The last of `times`, which are in order, before `ts`."""
    at = bisect.bisect_left(times, ts)
    return times[at - 1] if at else None
