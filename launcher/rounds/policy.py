"""Decides what follows from a failure: whether the job stops or restarts, after which delay, without which nodes. Pure.

The table of classes and what follows is in docs/launcher.md. Two rules stand behind it. What would happen again is not
tried again: a refused argument, an error at start, an exception at the same place without a step gained. Everything
else is: at once the first time, then ever more slowly, and not for ever.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from launcher.rounds.failures import SETTLED_S, FailureClass
from launcher.rounds.history import Exclusion, History, Mark, MarkKind
from launcher.rounds.records import FailedWorker, Failure, Verdict, describe

_TRIED_S = 30.0
_BACKOFF_MAX_S = 60.0
_EXCLUSION_MAX_TIMES = 4
_FORGIVEN_AFTER_EXCLUSIONS = 8
_MAX_CAUSES = 32
_MAX_BRIEF_CAUSES = 8

_SEVERITY = {
    FailureClass.GAVE_UP: -1,  # it knows best
    FailureClass.PREEMPTION: 2,
    FailureClass.HANG: 1,  # every rank waits for the one that failed
    FailureClass.LOST_PEER: 3,
}
_OF_THE_PROGRAM = (FailureClass.PROGRAM, FailureClass.START_UP, FailureClass.USAGE)


@dataclass(frozen=True)
class Limits:
    """How many failures a job and a node may have. Times are in seconds."""

    crash_loop: int = 6
    """Failures in a row without progress that end the job."""
    strikes: int = 3
    """Failures, or departures, of one node within `strike_window_s` that exclude it."""
    strike_window_s: float = 600.0
    exclusion_s: float = 300.0
    """For how long, the first time; twice as long each further time, up to eight times."""


@dataclass(frozen=True)
class Judgement:
    """What follows from a failure.

    With a `verdict` the job is over, and `why` says for what reason; else it restarts after `delay_s`.
    """

    history: History
    charged: bool = False
    delay_s: float = 0.0
    verdict: Verdict | None = None
    why: str = ""


class Blame(StrEnum):
    """Whether a failure speaks against the node it happened on."""

    NONE = "none"
    STRIKE = "strike"
    UNFIT = "unfit"  # it cannot run what has run elsewhere


def severity(kind: FailureClass) -> int:
    """Rank a class of failure: 0 for what others follow from, more for what is likely to follow from them."""
    return _SEVERITY.get(kind, 0)


def order_causes(reports: Iterable[tuple[int, FailedWorker]]) -> tuple[FailedWorker, ...]:
    """Put all nodes' failed workers in order, the root cause first: by class, then as the leader heard of them.

    Only the first keeps its traceback.
    """
    flat = []
    for arrival, report in reports:
        for failure in (report.failure, *report.failure.victims):
            alone = replace(failure, victims=())
            flat.append(((severity(failure.kind), arrival, failure.ts), replace(report, failure=alone)))
    ordered = [cause for _, cause in sorted(flat, key=lambda entry: entry[0])][:_MAX_CAUSES]
    return tuple(
        cause if i == 0 else replace(cause, failure=replace(cause.failure, traceback=""))
        for i, cause in enumerate(ordered)
    )


def brief(causes: Sequence[FailedWorker]) -> tuple[FailedWorker, ...]:
    """Shorten the causes for a round that goes on, which every node reads: the first few, without the traceback."""
    return tuple(replace(c, failure=replace(c.failure, traceback="")) for c in causes[:_MAX_BRIEF_CAUSES])


@dataclass(frozen=True)
class GenerationEnd:
    """How a generation ended, apart from what failed in it."""

    lived_s: float
    """How long it ran; 0 if it was found to hang."""
    restarts: int
    """How many were charged so far."""
    max_restarts: int | None
    """At most so many are allowed; None: as many as the other rules allow."""
    lost: bool
    """A node of the round is gone, which explains any failure."""
    stopping: bool
    """The round was about to end, which explains lost connections."""


def judge(history: History, causes: Sequence[FailedWorker], limits: Limits, end: GenerationEnd) -> Judgement:
    """Say what follows from the end of a generation.

    Args:
        causes: the workers that failed in it, root cause first; none if it ended otherwise.
    """
    lived_s, restarts, max_restarts = end.lived_s, end.restarts, end.max_restarts
    if not causes:
        return Judgement(replace(history, worked=history.worked or end.lost or lived_s >= _TRIED_S, waived=()))
    root = causes[0].failure
    step = max(cause.failure.step for cause in causes)
    gained = root.step > history.best_step  # victims may have told of one step more, or have told nothing
    seen = replace(
        history,
        best_step=max(step, history.best_step),
        worked=history.worked or step >= 0 or lived_s >= SETTLED_S,
        waived=(),
    )
    if ended := _hopeless(seen, root):
        return ended
    explained = end.lost or root.kind is FailureClass.PREEMPTION
    explained = explained or (end.stopping and root.kind is FailureClass.LOST_PEER)
    if explained:
        return Judgement(seen)
    if not gained and (repeated := _repeated(history, root)):
        return Judgement(seen, verdict=Verdict.FAILS_AGAIN, why=repeated)
    progress = gained or (step < 0 and lived_s >= SETTLED_S)
    seen = replace(seen, in_row=1 if progress else seen.in_row + 1)
    if root.kind in _OF_THE_PROGRAM:
        seen = replace(seen, program_place=root.place, program_step=root.step)
    elif gained:
        seen = replace(seen, program_place="", program_step=-1)
    if max_restarts is not None and restarts >= max_restarts:
        return Judgement(seen, verdict=Verdict.BUDGET_USED, why=f"restarts used: {restarts} of {max_restarts}")
    if seen.in_row >= limits.crash_loop:
        elsewhere = root.kind in (FailureClass.DEVICE, FailureClass.LOST_PEER)
        verdict = Verdict.NODES_FAIL if elsewhere else Verdict.CRASH_LOOP
        return Judgement(seen, verdict=verdict, why=f"{seen.in_row} failures in a row without progress")
    return Judgement(seen, charged=True, delay_s=backoff_s(seen.in_row))


def _hopeless(history: History, root: Failure) -> Judgement | None:
    """Return the end of the job, where it follows from how the job failed alone."""
    if root.kind is FailureClass.GAVE_UP:
        return Judgement(history, verdict=Verdict.FAILS_AGAIN, why="it gave up")
    if root.kind is FailureClass.USAGE and not history.worked:
        return Judgement(history, verdict=Verdict.USAGE)
    if root.kind is FailureClass.START_UP and not history.worked:
        return Judgement(history, verdict=Verdict.FAILS_AGAIN, why="an error at start; it would come again")
    return None


def _repeated(history: History, root: Failure) -> str:
    """Say why a program error is the same as the one before; "" if it is not."""
    if root.kind not in _OF_THE_PROGRAM or not history.program_place:
        return ""
    if root.place == history.program_place:
        return f"the same failure twice ({root.place}), no step gained"
    if root.step >= 0 and root.step == history.program_step:
        return f"two failures after step {root.step}, no step gained"
    return ""


def backoff_s(in_row: int) -> float:
    """Return the delay before a restart after so many failures in a row: none, 1, 2, 4 ... 60 s."""
    return 0.0 if in_row <= 1 else min(2.0 ** (in_row - 2), _BACKOFF_MAX_S)


# --- nodes


def blame(history: History, root: Failure) -> Blame:
    """Decide whether a failure speaks against its node; `history` is that of the judgement."""
    match root.kind:
        case FailureClass.START_UP | FailureClass.USAGE:
            return Blame.UNFIT if history.worked else Blame.NONE
        case FailureClass.DEVICE | FailureClass.HANG:
            return Blame.STRIKE
        case FailureClass.SIGNAL | FailureClass.OUT_OF_MEMORY if history.in_row > 1:
            return Blame.STRIKE  # once is an accident
        case _:
            return Blame.NONE


def mark(history: History, marks: Iterable[Mark]) -> History:
    """Return the history that remembers these marks as well."""
    return replace(history, marks=(*history.marks, *marks))


def suspects(history: History, limits: Limits, unfit: Sequence[Mark] = ()) -> tuple[Exclusion, ...]:
    """Name the nodes to exclude now: those with too many marks of one kind within the window, and the `unfit`."""
    recent: dict[tuple[str, MarkKind], list[Mark]] = {}
    for one in history.marks:
        if one.age_s <= limits.strike_window_s:
            recent.setdefault((one.node, one.kind), []).append(one)
    found = {one.node: one.reason for one in unfit}
    for (node, _), marks in recent.items():
        if len(marks) >= limits.strikes and history.excluded(node) is None:
            found.setdefault(node, f"{len(marks)} times within {limits.strike_window_s:g} s: {marks[-1].reason}")
    return tuple(_exclusion(history, node, reason, limits) for node, reason in found.items())


def _exclusion(history: History, node: str, reason: str, limits: Limits) -> Exclusion:
    times = 1 + max((e.times for e in history.exclusions if e.node == node), default=0)
    for_s = limits.exclusion_s * 2 ** (min(times, _EXCLUSION_MAX_TIMES) - 1)
    return Exclusion(node, reason, for_s, times)


def exclude(history: History, new: Sequence[Exclusion], limits: Limits) -> History:
    """Return the history in which these nodes are out, and all is counted anew.

    Their marks are paid for, and what failed in a row may have been their fault.
    """
    names = {e.node for e in new}
    forget_s = _FORGIVEN_AFTER_EXCLUSIONS * limits.exclusion_s
    kept = [e for e in history.exclusions if e.node not in names and (e.active or e.age_s <= forget_s)]
    return replace(
        history,
        in_row=0 if any(True for _ in new) else history.in_row,
        marks=tuple(m for m in history.marks if m.node not in names and m.age_s <= limits.strike_window_s),
        exclusions=(*kept, *new),
    )


def waive(history: History, new: Sequence[Exclusion]) -> History:
    """Return the history in which nodes that should be excluded are kept: the job cannot do without them."""
    return replace(history, waived=tuple(f"{e.node} ({e.reason})" for e in new))


def readmit(history: History, elapsed_s: float, needed: Sequence[str] = ()) -> History | None:
    """Return the history with exclusions ended that are over, or whose nodes are `needed`; None where there is none.

    It stays told as of its round: `elapsed_s` ago.
    """
    ended = [e for e in history.exclusions if e.active and (e.age_s + elapsed_s >= e.for_s or e.node in needed)]
    if not ended:
        return None
    exclusions = tuple(replace(e, active=False) if e in ended else e for e in history.exclusions)
    return dataclasses.replace(history, exclusions=exclusions)


def explain(causes: Sequence[FailedWorker], judgement: Judgement) -> str:
    """Say in one line how a job ended."""
    text = f"failed: {describe(causes[0].failure)}"
    return f"{text}; {judgement.why}" if judgement.why else text
