"""The events that a leader tells of a round it has just written."""

from __future__ import annotations

import dataclasses
from typing import Any

from launcher.events import Emit, EventName
from launcher.rounds.records import Round


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
