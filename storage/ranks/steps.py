"""The step that all ranks save, and whether all of them can."""

from __future__ import annotations

import json

from storage.errors import UsageError
from storage.format import layout
from storage.ranks.group import Group


def agreed_step(group: Group, step: object) -> int:
    """`step` as a plain int. A collective. Raises as `agree_on_step`."""
    return agree_on_step(group, step, "", "")[0]


def agree_on_step(group: Group, step: object, busy: str, waiting: str) -> tuple[int, str, str]:
    """`step` as a plain int; why no save can begin, "" if it can; and what is to give way to it. A collective.

    Args:
        busy: why none can begin on this rank, "" if it can; the first one that has a reason tells it to all.
        waiting: the attempt that could give way on this rank, "" if there is none. It has to wait on all of them.

    Raises:
        UsageError: on all ranks, if it is no step on one of them, or not the same on all.
    """
    mine: int | None = None
    problem: str | None = None
    try:
        mine = layout.as_step(step)
    except UsageError as error:
        problem = str(error)
    told = [json.loads(data) for data in group.all_gather(json.dumps([mine, problem, busy, waiting]).encode())]
    for rank, (number, text, *_) in enumerate(told):
        if text is not None:
            raise UsageError(f"rank {rank}: {text}" if len(told) > 1 else text)
        if number != told[0][0]:
            raise UsageError(f"rank 0 saves step {told[0][0]}, and rank {rank} step {number}; give all ranks the same")
    assert mine is not None
    reasons = [f"rank {rank}: {reason}" for rank, (_, _, reason, _) in enumerate(told) if reason]
    if len({attempt for *_, attempt in told}) > 1:
        reasons.append("the save before is under way on some ranks, and waits on others")
    return mine, next(iter(reasons), ""), waiting
