"""Who is in a job, as the store says. Pure: a roster in, a table out; what `elastic-moe status` shows."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.rounds.membership import View, breakage
from launcher.rounds.records import Round


@dataclass(frozen=True)
class Seat:
    """One live node and its place in the round."""

    node_id: str
    host: str
    address: str
    zone: str
    slots: int
    status: str
    generation: int
    leads: bool
    draining: bool
    ranks: tuple[int, ...]
    """Of the round's workers, those on this node; empty for a spare and for a node that has yet to get a place."""
    reason: str


@dataclass(frozen=True)
class Snapshot:
    """All of a job's state at one moment."""

    run_id: str
    seats: tuple[Seat, ...]
    """Oldest first."""
    round: Round | None
    broken: str
    """Why the round cannot go on; "" while it can."""
    missing: tuple[str, ...]
    """Participants of the round without a live record."""

    @property
    def state(self) -> str:
        """The job in a few words."""
        if self.round is None:
            return "waiting for the first round" if self.seats else "unknown: no node and no round"
        if self.round.outcome:
            return self.round.outcome
        if not self.seats:
            return "no live node"
        if self.broken:
            return f"forming a round: {self.broken}"
        if self.round.stop:
            return f"stopping at a step boundary: {self.round.stop}"
        joined = [s for s in self.seats if s.ranks and s.generation == self.round.generation]
        return "running" if len(joined) == len(self.round.participants) else "starting"


def snapshot(run_id: str, view: View) -> Snapshot:
    """What a view of a job says to a person."""
    current = view.round
    broken = breakage(view) if current and not current.outcome else None
    seats = tuple(
        Seat(
            node_id=node.node_id,
            host=node.host,
            address=node.address,
            zone=node.zone,
            slots=node.slots,
            status=node.status.value,
            generation=node.generation,
            leads=node.node_id == view.leader,
            draining=node.draining,
            ranks=_ranks(current, node.node_id),
            reason=node.reason,
        )
        for node in sorted(view.nodes, key=lambda node: node.seniority)
    )
    missing = [p.node_id for p in current.participants if view.node(p.node_id) is None] if current else []
    return Snapshot(run_id, seats, current, broken.reason if broken else "", tuple(missing))


def _ranks(current: Round | None, node_id: str) -> tuple[int, ...]:
    first = 0
    for participant in current.participants if current else ():
        if participant.node_id == node_id:
            return tuple(range(first, first + participant.slots))
        first += participant.slots
    return ()
