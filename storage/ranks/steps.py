"""The step that all ranks save."""

from __future__ import annotations

from storage.errors import UsageError
from storage.format import layout
from storage.ranks.group import Group


def agreed_step(group: Group, step: object) -> int:
    """`step` as a plain int. A collective. Raises UsageError on all ranks: it is no step, or not the same on all."""
    try:
        mine, problem = layout.as_step(step), ""
    except UsageError as error:
        mine, problem = -1, str(error)
    told = [data.decode().partition(" ") for data in group.all_gather(f"{mine} {problem}".encode())]
    for rank, (number, _, text) in enumerate(told):
        if text:
            raise UsageError(f"rank {rank}: {text}" if len(told) > 1 else text)
        if number != told[0][0]:
            raise UsageError(f"rank 0 saves step {told[0][0]}, and rank {rank} step {number}; give all ranks the same")
    return mine
