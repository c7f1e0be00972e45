"""Which node holds the copies of which: a neighbour in another failure domain. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from storage.format.sealed import Document


class PeerCard(Document):
    """What a node's service says of itself to the ranks of the others.

    `node` is the agent's id of it, or its own; `host` the machine's, `zone` what the launcher was told, "" where
    nothing was. Whoever knows `token` may read what the service holds, and have it hold copies.
    """

    node: str = Field(min_length=1, max_length=256)
    host: str = Field(max_length=256)
    zone: str = Field(default="", max_length=256)
    address: str = Field(min_length=1, max_length=256)
    port: int = Field(ge=1, le=65535)
    token: str = Field(min_length=16, max_length=256, repr=False)


def apart(mine: PeerCard, other: PeerCard) -> int:
    """How much two nodes do not share: 3 two zones, 2 two hosts, 1 nothing but two nodes, 0 one node."""
    if mine.node == other.node:
        return 0
    if mine.host == other.host:
        return 1
    return 3 if mine.zone != other.zone else 2


def buddy_of(node: str, cards: Sequence[PeerCard]) -> PeerCard | None:
    """Who holds the copies of `node`'s parts: of those furthest from it the next in the order of all nodes, in a ring.

    Nodes of one zone, or of one host, are furthest from the same others, and take these in turns: so where zones are
    equally large, and where all nodes are equally far apart, each holds the copies of one. None where there is no other
    node.
    """
    ring = sorted({card.node: card for card in cards}.values(), key=lambda card: card.node)
    mine = next((card for card in ring if card.node == node), None)
    most = max((apart(mine, card) for card in ring), default=0) if mine is not None else 0
    if mine is None or not most:
        return None
    mates = [number for number, card in enumerate(ring) if _domain(card, most) == _domain(mine, most)]
    ring_of_mates = ring[mates[0] :] + ring[: mates[0]]
    furthest = [card for card in ring_of_mates if apart(mine, card) == most]
    turn = sum(ring[number].node < node for number in mates)
    return furthest[turn % len(furthest)]


def _domain(card: PeerCard, distance: int) -> str:
    """What nodes share that have the same nodes at that distance."""
    return {3: card.zone, 2: card.host}.get(distance, card.node)
