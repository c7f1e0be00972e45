"""The step that all ranks save."""

from __future__ import annotations

import json

from storage.errors import UsageError
from storage.format import layout
from storage.ranks.group import Group


def agreed_step(group: Group, step: object) -> int:
    """`step` as a plain int. A collective.

    Raises:
        UsageError: on all ranks, if it is no step on one of them, or not the same on all.
    """
    mine: int | None = None
    problem: str | None = None
    try:
        mine = layout.as_step(step)
    except UsageError as error:
        problem = str(error)
    told = [json.loads(data) for data in group.all_gather(json.dumps([mine, problem]).encode())]
    for rank, (number, text) in enumerate(told):
        if text is not None:
            raise UsageError(f"rank {rank}: {text}" if len(told) > 1 else text)
        if number != told[0][0]:
            raise UsageError(f"rank 0 saves step {told[0][0]}, and rank {rank} step {number}; give all ranks the same")
    assert mine is not None
    return mine
