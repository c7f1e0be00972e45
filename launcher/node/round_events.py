"""What a leader tells of a round it has just written, and what every node says when the job has failed."""

from __future__ import annotations

import dataclasses
from typing import Any

from launcher.events import Emit, EventName
from launcher.rounds.failures import FailureClass, signal_of
from launcher.rounds.records import Cause, Round, Verdict

_WHAT = {
    FailureClass.GAVE_UP: "the program gave up",
    FailureClass.USAGE: "the program refused what it was given",
    FailureClass.START_UP: "an error at start",
    FailureClass.PROGRAM: "a program error",
    FailureClass.DEVICE: "a device error",
    FailureClass.OUT_OF_MEMORY: "out of memory",
    FailureClass.SIGNAL: "killed by a signal",
    FailureClass.HANG: "a hang",
    FailureClass.PREEMPTION: "stopped with its node",
    FailureClass.LOST_PEER: "lost its connection",
}

_ADVICE = {
    Verdict.BUDGET_USED: "no further restart is allowed",
    Verdict.USAGE: "the program's own words say what is wrong",
    Verdict.FAILS_AGAIN: "running it again as it is will not help",
    Verdict.CRASH_LOOP: "running it again as it is will hardly help",
    Verdict.NODES_FAIL: "the nodes are to blame; on others it may work",
    Verdict.NO_QUORUM: "it may be launched again when there are nodes",
}


def tell(emit: Emit, proposed: Round, before: Round | None) -> None:
    """Emit the events of a round that replaced `before`."""
    generation = proposed.generation
    is_new = before is None or generation != before.generation
    _tell_standing(emit, proposed, before)
    if proposed.causes and (is_new or proposed.outcome):
        emit(EventName.ROOT_CAUSE, generation=before.generation if before else generation, **_cause_fields(proposed))
    if proposed.outcome:
        emit(
            EventName.FINISHED,
            generation=generation,
            outcome=proposed.outcome,
            verdict=proposed.verdict.value,
            exit_code=proposed.verdict.exit_code,
        )
    elif is_new:
        emit(
            EventName.ROUND_FORMED,
            generation=generation,
            reason=proposed.reason,
            world_size=proposed.world_size,
            restarts=proposed.restarts,
            participants=[{"node_id": p.node_id, "slots": p.slots} for p in proposed.participants],
            spares=list(proposed.spares),
            mesh=dataclasses.asdict(proposed.mesh) if proposed.mesh else None,
        )
    elif before is not None and proposed.stop != before.stop:
        emit(EventName.STOP_REQUESTED, generation=generation, reason=proposed.stop)
    elif before is not None and proposed.broken and not before.broken:
        emit(EventName.ROUND_BROKEN, generation=generation, reason=proposed.broken.reason)


def _tell_standing(emit: Emit, proposed: Round, before: Round | None) -> None:
    old = {e.node for e in before.history.exclusions if e.active} if before else set()
    for e in proposed.history.exclusions:
        if e.active and e.node not in old:
            emit(
                EventName.NODE_EXCLUDED,
                generation=proposed.generation,
                node_excluded=e.node,
                reason=e.reason,
                seconds=e.for_s,
            )
        elif not e.active and e.node in old:
            emit(EventName.NODE_READMITTED, generation=proposed.generation, node_readmitted=e.node, times=e.times)
    if proposed.history.waived and (before is None or proposed.generation != before.generation):
        emit(
            EventName.EXCLUSION_WAIVED,
            generation=proposed.generation,
            nodes=", ".join(proposed.history.waived),
            reason="the job cannot do without them",
        )


def _cause_fields(proposed: Round) -> dict[str, Any]:
    root, *victims = proposed.causes
    return {
        "rank": root.failure.rank,
        "host": root.host,
        "node_failed": root.node_id,
        "failure_class": root.failure.kind.value,
        "exit_code": root.failure.exit_code,
        "step": root.failure.step,
        "message": root.failure.message,
        "place": root.failure.place,
        "in_row": proposed.history.in_row,
        "victims": [
            {"rank": v.failure.rank, "node": v.node_id, "failure_class": v.failure.kind.value} for v in victims
        ],
    }


def last_words(ended: Round) -> str:
    """How a job failed, for people: the outcome, the root cause with its traceback, its victims a line each."""
    lines = [ended.outcome]
    if ended.causes:
        root, *victims = ended.causes
        lines.append(f"root cause: {_where(root)}: {_how(root)}")
        lines += [f"    {line}" for line in root.failure.traceback.rstrip().splitlines()]
        lines += [f"victim: {_where(v)}: {_how(v)}{_because(v, root)}" for v in victims]
    advice = f": {_ADVICE[ended.verdict]}" if ended.verdict in _ADVICE else ""
    lines.append(f"exit code {ended.verdict.exit_code}{advice}")
    return "\n".join(lines)


def _where(cause: Cause) -> str:
    return f"rank {cause.failure.rank} on {cause.node_id} (host {cause.host})"


def _how(cause: Cause) -> str:
    failure = cause.failure
    step = f" after step {failure.step}" if failure.step >= 0 else ""
    signum = signal_of(failure.exit_code)
    end = f"{signum.name}" if signum else f"exit code {failure.exit_code}"
    place = f", {failure.place}" if failure.traceback else ""
    return f"{_WHAT[failure.kind]}{step} ({end}{place})"


def _because(victim: Cause, root: Cause) -> str:
    if victim.failure.kind is FailureClass.LOST_PEER:
        return f", because rank {root.failure.rank} failed"
    return f": {victim.failure.message}" if victim.failure.message else ""
