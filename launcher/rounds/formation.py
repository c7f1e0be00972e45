"""Decides which nodes make up a round, and in which order of ranks. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.rounds.mesh import Infeasible, MeshPlan
from launcher.rounds.records import Node, Participant

Planner = Callable[[Sequence[int], MeshPlan | None], MeshPlan | None]
"""`planner(slots of each node in rank order, the mesh before) -> mesh`; raises `Infeasible`. None: the job has no
mesh of ours, and every slot gets a worker."""


@dataclass(frozen=True)
class Formation:
    """Which nodes take part with how many workers, in rank order, and which wait."""

    participants: tuple[Participant, ...]
    spares: tuple[str, ...]
    mesh: MeshPlan | None

    @property
    def world_size(self) -> int:
        """How many workers all participants have."""
        return sum(p.slots for p in self.participants)


def form(
    ready: Sequence[Node],
    previous: Sequence[str],
    mesh: MeshPlan | None,
    planner: Planner,
    *,
    min_nodes: int,
    max_nodes: int,
) -> Formation | None:
    """Return the largest feasible formation of `ready`, None where there is none of at least min nodes.

    Nodes of the previous round come first, then by seniority; at most max nodes are taken, and where the planner
    finds no mesh the newest are left out one by one. Slots that the plan leaves idle get no worker.
    """
    place = {node_id: i for i, node_id in enumerate(previous)}
    by_claim = sorted(ready, key=lambda n: (n.node_id not in place, place.get(n.node_id, 0), n.seniority))
    for num in range(min(len(by_claim), max_nodes), min_nodes - 1, -1):
        ordered = rank_order(by_claim[:num], previous)
        try:
            plan = planner([n.slots for n in ordered], mesh)
        except Infeasible:
            continue
        left = plan.world_size if plan else sum(n.slots for n in ordered)
        participants = []
        for node in ordered:
            used = min(node.slots, left)
            left -= used
            if used:
                participants.append(Participant(node.node_id, used, node.address, node.port))
        taken = {p.node_id for p in participants}
        spares = tuple(n.node_id for n in by_claim if n.node_id not in taken)
        return Formation(tuple(participants), spares, plan)
    return None


def rank_order(nodes: Sequence[Node], previous: Sequence[str]) -> list[Node]:
    """Put nodes in rank order.

    Survivors keep theirs; a newcomer goes behind the last node of its host, else of its zone, else last.
    """
    place = {node_id: i for i, node_id in enumerate(previous)}
    ordered = sorted((n for n in nodes if n.node_id in place), key=lambda n: place[n.node_id])
    hosts, zones = {n.host for n in ordered}, {n.zone for n in ordered if n.zone}
    for newcomer in sorted((n for n in nodes if n.node_id not in place), key=lambda n: n.seniority):
        at = len(ordered)  # of many nodes, most stand alone: they are not compared with every other
        if newcomer.host in hosts:
            at = 1 + max(i for i, n in enumerate(ordered) if n.host == newcomer.host)
        elif newcomer.zone in zones:
            at = 1 + max(i for i, n in enumerate(ordered) if n.zone == newcomer.zone)
        ordered.insert(at, newcomer)
        hosts.add(newcomer.host)
        zones |= {newcomer.zone} - {""}
    return ordered
