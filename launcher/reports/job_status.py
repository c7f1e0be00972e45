"""What the store says of a job, for `elastic-moe status`: who is in it and how far it is. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.rounds.membership import View, breakage
from launcher.rounds.records import Failure, Round, Status, describe
from launcher.rounds.vitals import Vitals


@dataclass(frozen=True)
class NodeStatus:
    """One live node and its place in the round."""

    node_id: str
    host: str
    address: str
    zone: str
    slots: int
    status: Status
    generation: int
    leads: bool
    draining: bool
    ranks: tuple[int, ...]
    """The ranks of the round's workers on this node; empty for a spare and for a node that waits for a place."""
    reason: str
    step: int = -1
    """The last step that a worker has told to be complete; -1 if none has."""
    beat_ts: float = 0.0
    """Epoch seconds of the last heartbeat of the worker that has been silent for the longest; 0 where none has told."""


@dataclass(frozen=True)
class LastEvent:
    """Something that happened last, and when (epoch seconds)."""

    ts: float
    text: str = ""
    step: int = -1


@dataclass(frozen=True)
class JobStatus:
    """All of a job's state at one moment."""

    run_id: str
    nodes: tuple[NodeStatus, ...]
    """The live nodes, oldest first."""
    round: Round | None
    broken: str
    """Why the round cannot go on; "" while it can."""
    missing: tuple[str, ...]
    """Participants of the round without a live record."""
    failure: LastEvent | None = None
    """The last failure of a worker, as far as the live nodes and the round know of one."""
    checkpoint: LastEvent | None = None
    """The last checkpoint that live nodes' workers have committed."""

    @property
    def step(self) -> int:
        """The last step that any node has told to be complete; -1 if none has."""
        return max((node.step for node in self.nodes), default=-1)

    @property
    def beat_ts(self) -> float:
        """The oldest of the participants' last heartbeats, as all wait for the slowest; 0 if nobody tells."""
        return min((node.beat_ts for node in self.nodes if node.ranks and node.beat_ts), default=0.0)

    @property
    def state(self) -> str:
        """What the job does now, in a few words."""
        if self.round is None:
            return "waiting for the first round" if self.nodes else "unknown: no node and no round"
        if self.round.outcome:
            return self.round.outcome
        if not self.nodes:
            return "no live node"
        if self.broken:
            return f"forming a round: {self.broken}"
        if self.round.stop:
            return f"stopping at a step boundary: {self.round.stop}"
        joined = [s for s in self.nodes if s.ranks and s.generation == self.round.generation]
        return "running" if len(joined) == len(self.round.participants) else "starting"


def job_status(run_id: str, view: View, vitals: Mapping[str, Vitals] | None = None) -> JobStatus:
    """Put together a view of the job's records and, by node, what nodes have told of their workers."""
    current, told = view.round, vitals or {}
    broken = breakage(view) if current and not current.outcome else None
    nodes = tuple(
        NodeStatus(
            node_id=node.node_id,
            host=node.host,
            address=node.address,
            zone=node.zone,
            slots=node.slots,
            status=node.status,
            generation=node.generation,
            leads=node.node_id == view.leader,
            draining=node.draining,
            ranks=_ranks(current, node.node_id),
            reason=node.reason,
            step=told[node.node_id].step if node.node_id in told else -1,
            beat_ts=told[node.node_id].beat_ts if node.node_id in told else 0.0,
        )
        for node in sorted(view.nodes, key=lambda node: node.seniority)
    )
    missing = [p.node_id for p in current.participants if view.node(p.node_id) is None] if current else []
    failures = [_told_of(node.failure, node.node_id) for node in view.nodes if node.failure]
    failures += [_told_of(cause.failure, cause.node_id) for cause in current.causes[:1]] if current else []
    failures += [LastEvent(one.failure_ts, one.failure) for one in told.values() if one.failure_ts]
    checkpoints = [LastEvent(one.checkpoint_ts, "", one.checkpoint_step) for one in told.values() if one.checkpoint_ts]
    return JobStatus(
        run_id,
        nodes,
        current,
        broken.reason if broken else "",
        tuple(missing),
        max(failures, key=lambda one: one.ts, default=None),
        max(checkpoints, key=lambda one: one.ts, default=None),
    )


def _told_of(failure: Failure, node_id: str) -> LastEvent:
    return LastEvent(failure.ts, f"{describe(failure)} (on {node_id})", failure.step)


def _ranks(current: Round | None, node_id: str) -> tuple[int, ...]:
    first = 0
    for participant in current.participants if current else ():
        if participant.node_id == node_id:
            return tuple(range(first, first + participant.slots))
        first += participant.slots
    return ()
