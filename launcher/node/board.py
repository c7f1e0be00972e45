"""What the store says of a job, parsed once. No thread, no I/O.

Keys are relative to the run's prefix: `nodes/NODE_ID` for each node's record, and under `job/` what every node follows:
`job/round`, `job/leader` ("NODE_ID", or "NODE_ID left"; under the leader's lease), for a minute `job/drain/ORDER_ID`.
A node that does not lead follows `job/` only: its board has no nodes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from launcher.drain.draining import DrainOrder
from launcher.kv.base import Entry, WatchEvent
from launcher.rounds.records import Node, Round

log = logging.getLogger(__name__)


def run_prefix(run_id: str) -> str:
    """What goes before every key of a run."""
    return f"elastic-moe/{run_id}/"


NODES = "nodes/"
JOB = "job/"
ROUND = f"{JOB}round"
LEADER = f"{JOB}leader"
DRAIN = f"{JOB}drain/"
EVERYTHING = ""

LEASE_ENDED = "lost: its lease ended"


@dataclass(frozen=True)
class Departure:
    """A node that is no longer there, and how it went: LEFT, LEFT_AT_ONCE, or "lost: ...".

    `silent_s`: where its lease ended, how long that was; 0 if that is not known.
    """

    node_id: str
    how: str
    silent_s: float = 0.0


@dataclass(frozen=True)
class NodeSeen:
    """A record was written at `revision`; `before` is the one that it replaced."""

    node: Node
    revision: int
    before: Node | None


@dataclass(frozen=True)
class NodeGone:
    """A record was deleted, or its lease ended."""

    node: Node


@dataclass(frozen=True)
class RoundSeen:
    """The round was replaced, or deleted; `before` is the one that it replaced."""

    round: Round | None
    before: Round | None


News = NodeSeen | NodeGone | RoundSeen


class Board:
    """The job as the store last showed it."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.round: Round | None = None
        self.round_revision = 0
        self.leader = ""
        self.leader_revision = 0
        self.predecessor: Departure | None = None
        """The leader that this board last saw go, as far as it did."""
        self.drain_orders: dict[str, DrainOrder] = {}
        """What `elastic-moe drain` has asked for, by key; an order's lease is never renewed."""
        self._leader_left = ""
        self._round_created = 0

    def replace(self, entries: Iterable[Entry]) -> list[News]:
        """Learn a whole listing; what is missing from it is gone (all of it, where the store was lost).

        Who led before, and how that ended, is not known any more.
        """
        listed = {entry.key: entry for entry in entries}
        gone = [node_id for node_id in self.nodes if f"{NODES}{node_id}" not in listed]
        news: list[News] = [NodeGone(self.nodes.pop(node_id)) for node_id in gone]
        if ROUND not in listed and self.round is not None:
            news.append(RoundSeen(None, self.round))
            self.round = None
        self.round_revision = self.leader_revision = 0  # whatever was learnt before, the listing is newer
        self.leader, self.predecessor = "", None
        self.drain_orders.clear()
        return news + self.apply(WatchEvent(key, entry, entry.revision) for key, entry in listed.items())

    def apply(self, changes: Iterable[WatchEvent]) -> list[News]:
        """Learn changes. A node's own writes may be learnt ahead of the watch: what is older is then passed over."""
        news: list[News] = []
        for change in changes:
            if change.key == ROUND:
                news += self._take_round(change)
            elif change.key == LEADER:
                self._take_leader(change)
            elif change.key.startswith(DRAIN):
                self._take_order(change)
            elif change.key.startswith(NODES):
                news += self._take_node(change)
        return news

    def _take_round(self, change: WatchEvent) -> list[News]:
        if change.revision <= self.round_revision:
            return []
        before = self.round
        if change.entry is None:
            self.round = None
        else:
            # Only versions of one key that was never deleted share their participants: the store may be lost, and a
            # job begin again at the same generation with other nodes.
            kept = before if change.entry.create_revision == self._round_created else None
            try:
                self.round = Round.from_json(change.entry.value, kept)
            except ValueError as error:
                log.error("ignored %s, not a record of this version: %s", change.key, error)
                return []
            self._round_created = change.entry.create_revision
        self.round_revision = change.revision
        return [RoundSeen(self.round, before)]

    def _take_leader(self, change: WatchEvent) -> None:
        if change.revision <= self.leader_revision:
            return
        self.leader_revision = change.revision
        if change.entry is None:
            how = self._leader_left or LEASE_ENDED
            self.predecessor = Departure(self.leader, how) if self.leader else None
            self.leader = ""
        else:
            self.leader, _, self._leader_left = change.entry.value.decode(errors="replace").partition(" ")

    def _take_order(self, change: WatchEvent) -> None:
        self.drain_orders.pop(change.key, None)
        try:
            if change.entry is not None:
                self.drain_orders[change.key] = DrainOrder.from_json(change.entry.value)
        except (ValueError, TypeError) as error:
            log.error("ignored %s: %s", change.key, error)

    def _take_node(self, change: WatchEvent) -> list[News]:
        node_id = change.key[len(NODES) :]
        if change.entry is None:
            gone = self.nodes.pop(node_id, None)
            return [NodeGone(gone)] if gone else []
        try:
            node = Node.from_json(change.entry.value, change.entry.create_revision)
        except ValueError as error:
            log.error("ignored %s, not a record of this version: %s", change.key, error)
            return []
        before, self.nodes[node.node_id] = self.nodes.get(node.node_id), node
        return [NodeSeen(node, change.revision, before)]

    def counts_as_lost(self, node_id: str, since_revision: int) -> bool:
        """Whether the leader took this node for lost after it had registered at `since_revision`."""
        broken = self.round.broken if self.round else None
        return broken is not None and node_id in broken.lost and self.round_revision > since_revision
