"""Decides which nodes may take part: those that keep failing, or coming and going, are excluded. Pure.

A node is excluded by the round's history, not by its own record: it outlives the leader, and the agent of the node when
that is started anew. The node reads it there and says EXCLUDED of itself until the leader ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from launcher.rounds.formation import Formation
from launcher.rounds.history import Exclusion, History, Mark, MarkKind
from launcher.rounds.policy import Blame, Judgement, Limits, blame, exclude, mark, suspects, waive
from launcher.rounds.records import FailedWorker, Node, identity_of


def weigh(
    judged: Judgement,
    causes: Sequence[FailedWorker],
    lost: Sequence[str],
    departed: Mapping[str, str],
    limits: Limits,
) -> tuple[History, tuple[Exclusion, ...]]:
    """Add what the end of a round says of its nodes to the history, and name those to exclude.

    Args:
        lost: participants that are no longer there, or out of the others' reach; `departed` tells how each went.
    """
    marks = [
        Mark(identity_of(node_id), MarkKind.DEPARTURE, f"took part and then {departed.get(node_id, 'lost')}")
        for node_id in lost
    ]
    unfit = []
    if judged.charged:
        root = causes[0]
        match blame(judged.history, root.failure):
            case Blame.STRIKE:
                reason = f"{root.failure.kind.value}: {root.failure.message or root.failure.place}"
                marks.append(Mark(identity_of(root.node_id), MarkKind.STRIKE, reason))
            case Blame.UNFIT:
                failing = {identity_of(c.node_id): c for c in causes if c.failure.kind is root.failure.kind}
                unfit = [
                    Mark(name, MarkKind.STRIKE, f"cannot start what has run elsewhere: {cause.failure.message}")
                    for name, cause in failing.items()
                ]
            case Blame.NONE:
                pass
    history = mark(judged.history, marks)
    return history, suspects(history, limits, unfit)


def admit(
    ready: Sequence[Node],
    history: History,
    new: Sequence[Exclusion],
    limits: Limits,
    form: Callable[[Sequence[Node]], Formation | None],
) -> tuple[Formation | None, History]:
    """Return the best formation without excluded nodes, and the history that goes with it.

    Better on a suspect node than not at all: the `new` exclusions are waived if nothing can be formed without them.
    """
    names = {e.node for e in new}
    standing = [n for n in ready if history.excluded(identity_of(n.node_id)) is None]
    formed = form([n for n in standing if identity_of(n.node_id) not in names])
    if formed is None and new and (formed := form(standing)) is not None:
        return formed, waive(exclude(history, (), limits), new)
    return formed, exclude(history, new, limits)


def needed(nodes: Sequence[Node], history: History) -> tuple[str, ...]:
    """Name the excluded nodes that are there, for a job that has too few others."""
    names = {identity_of(n.node_id) for n in nodes if not n.draining}
    return tuple(sorted(name for name in names if history.excluded(name)))
