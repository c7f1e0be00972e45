"""What losing one node of a round costs, by where the replicas of its state lie. Pure."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.rounds.mesh import MeshPlan


class NodeLoss(enum.StrEnum):
    """From where a job goes on after the loss of any one of its nodes, in the words of `elastic-moe plan`."""

    NO_STEP = "0 steps"
    """The other nodes hold all of the state, as it is after the last complete step."""
    PEER_SAVE = "to the last peer save"
    """Some of it was on the lost node alone, and a copy of its last save is in another node's memory."""
    CHECKPOINT = "to the last checkpoint"
    """There is no other node that could hold a copy."""


def node_loss(mesh: MeshPlan, ranks_per_node: int | Sequence[int]) -> NodeLoss:
    """What losing any one node costs a job on that mesh."""
    if survives_node_loss(mesh, ranks_per_node):
        return NodeLoss.NO_STEP
    others = itertools.islice(_nodes(mesh.world_size, ranks_per_node), 1, None)
    return NodeLoss.PEER_SAVE if any(others) else NodeLoss.CHECKPOINT


def survives_node_loss(mesh: MeshPlan, ranks_per_node: int | Sequence[int]) -> bool:
    """Whether every part of the state lies on two nodes at least.

    The replicas of a part are ``shard * expert`` ranks apart and a node's ranks are consecutive, so all of them are
    on one node exactly if the first and the last are; of the first ones on a node, the lowest has its last the lowest.
    Where all nodes are alike, no node has room for both if the first one has none: only the last one may be smaller.
    """
    block = mesh.shard * mesh.expert
    span = (mesh.replicate - 1) * block
    if isinstance(ranks_per_node, int):
        return span >= min(ranks_per_node, mesh.world_size)
    return not any(first < block and first + span < end for first, end in _nodes(mesh.world_size, ranks_per_node))


def _nodes(world_size: int, ranks_per_node: int | Sequence[int]) -> Iterator[tuple[int, int]]:
    """The ranks of each node that has any: its first, and the one after its last."""
    if isinstance(ranks_per_node, int):
        ends: Sequence[int] = range(ranks_per_node, world_size + ranks_per_node, ranks_per_node)
    else:
        ends = list(itertools.accumulate(ranks_per_node))
    first = 0
    for end in ends:
        if first < min(end, world_size):
            yield first, min(end, world_size)
        first = end
