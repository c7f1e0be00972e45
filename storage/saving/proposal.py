"""What each rank tells the others before a save, and what all make of it. Pure: told the same, all decide alike."""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

from storage.errors import Fenced, UsageError
from storage.format import layout
from storage.ranks.agreement import Failure


class Fate(enum.StrEnum):
    """What the coordinator knows of the save before, where that was of the same step."""

    NONE = ""
    """It was of another step, or did not commit."""
    COMMITTED = "committed"
    UNHEALTHY = "unhealthy"
    """It has committed what ranks said not to go on from."""
    UNDER_WAY = "under way"


@dataclass(frozen=True)
class Proposal:
    """What one rank tells before a save. It is short, so that all of them are told in one collective.

    `problem`: why `step` is none. `busy`: why this rank cannot begin a save, "" if it can; `waiting`: the attempt that
    could give way on it, "" if there is none. `sums`: one fingerprint of all that every rank must hold alike. `plan`:
    which of the plans the ranks have made fits what this rank holds, 0 for none. `asks`: whether this rank wants the
    ranks to agree on their live state anew. `is_copying`: whether a state in its node's memory is still on its way to
    another node's. `failure`: why it cannot tell what it holds.

    By the coordinator alone: the `attempt` that this save would be, why it is `fenced`, and the `fate` of the one
    before.
    """

    step: int | None
    problem: str | None = None
    busy: str = ""
    waiting: str = ""
    healthy: bool = True
    sums: str = ""
    plan: int = 0
    asks: bool = False
    is_copying: bool = False
    failure: Failure | None = None
    attempt: str = ""
    fenced: str | None = None
    fate: Fate = Fate.NONE

    def dump(self) -> bytes:
        """JSON for the way to the other ranks."""
        return json.dumps(astuple(self), separators=(",", ":")).encode()

    @classmethod
    def load(cls, data: bytes) -> Proposal:
        """What `dump` dumped."""
        told = dict(zip((field.name for field in fields(cls)), json.loads(data), strict=True))
        failure = told["failure"] and Failure(*told["failure"])
        return cls(**told | {"failure": failure, "fate": Fate(told["fate"])})


@dataclass(frozen=True)
class Decision:
    """What all ranks make of their proposals.

    `skip`: why nothing is saved now, "" if something is. `attempt` is None where the step is committed already.
    `awaits`: whether that is not known yet. `compare` and `plan`: what the ranks have to do before. `gives_way`:
    whether what waits on all of them is to be dropped. `agree`: whether they are to agree on their live state.
    `copies`: whether this one is copied to other nodes' memory, where states are: by all nodes or by none, since a copy
    is of use with the others' parts of the same state alone.
    """

    step: int
    skip: str = ""
    attempt: str | None = None
    healthy: bool = True
    awaits: bool = False
    compare: bool = False
    plan: bool = False
    gives_way: bool = False
    agree: bool = False
    copies: bool = True


def decide(proposals: Sequence[Proposal]) -> Decision:
    """What to do, by the proposals of all ranks, the coordinator's first.

    Raises:
        UsageError: the step is none on some rank, or not the same on all; or a rank's state cannot be saved.
        Fenced: a newer owner has the run.
        StorageError: a rank cannot tell what it holds.
    """
    step, first = _step_of(proposals), proposals[0]
    if first.fenced is not None:
        raise Fenced(first.fenced)
    if reason := _why_not(proposals):
        return Decision(step, reason)
    for rank, proposal in enumerate(proposals):
        if proposal.failure is not None:
            raise proposal.failure.error(_where(rank, proposals))
    healthy = all(proposal.healthy for proposal in proposals)
    is_there = first.fate is Fate.COMMITTED or (first.fate is Fate.UNHEALTHY and not healthy)
    plans = {proposal.plan for proposal in proposals}
    return Decision(
        step,
        attempt=None if is_there else first.attempt,
        healthy=healthy,
        awaits=first.fate is Fate.UNDER_WAY,
        compare=len({proposal.sums for proposal in proposals}) > 1,
        plan=len(plans) > 1 or plans == {0},
        gives_way=bool(first.waiting),
        agree=any(proposal.asks for proposal in proposals),
        copies=not any(proposal.is_copying for proposal in proposals),
    )


def as_step(step: object) -> tuple[int | None, str | None]:
    """`step` as a plain int, or why it is none."""
    try:
        return layout.as_step(step), None
    except UsageError as error:
        return None, str(error)


def _step_of(proposals: Sequence[Proposal]) -> int:
    first = proposals[0].step
    for rank, proposal in enumerate(proposals):
        if proposal.problem is not None:
            raise UsageError(_where(rank, proposals) + proposal.problem)
        if proposal.step != first:
            raise UsageError(
                f"rank 0 saves step {first}, and rank {rank} step {proposal.step}; give all ranks the same"
            )
    assert first is not None, "a rank without a step has a problem"
    return first


def _why_not(proposals: Sequence[Proposal]) -> str:
    """Why no save can begin; "" if one can. The first rank that has a reason tells it to all."""
    for rank, proposal in enumerate(proposals):
        if proposal.busy:
            return f"rank {rank}: {proposal.busy}"
    if len({proposal.waiting for proposal in proposals}) > 1:
        return "the save before is under way on some ranks, and waits on others"
    return ""


def _where(rank: int, proposals: Sequence[Proposal]) -> str:
    return f"rank {rank}: " if len(proposals) > 1 else ""
