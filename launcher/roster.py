"""What one node has learnt from the store: who lives, the current round, where its workers meet. No thread, no I/O.

Keys are relative to the run's prefix: `nodes/NODE_ID`, `round`, and `store` ("GENERATION ADDRESS PORT").
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from launcher.kv import Entry
from launcher.membership import View, breakage
from launcher.records import LEFT, Node, Round

log = logging.getLogger(__name__)


def run_prefix(run_id: str) -> str:
    """What goes before every key of a run."""
    return f"elastic-moe/{run_id}/"


NODES = "nodes/"
ROUND = "round"
STORE = "store"


@dataclass(frozen=True)
class Departure:
    """A node that is no longer there, and how it went: LEFT, or "lost: ..."."""

    node_id: str
    how: str


class Roster:
    """Times are the caller's monotonic clock's."""

    def __init__(self, me: str, lineage: str, now_s: float) -> None:
        self.nodes: dict[str, Node] = {}
        self.round: Round | None = None
        self.round_revision = 0
        self.store: tuple[int, str] | None = None
        self.store_revision = 0
        self._me = me
        self._lineage = lineage
        self._departed: dict[str, str] = {}
        self._nodes_changed_s = self._formed_s = self._broken_s = now_s
        self._was_broken = True

    def view(self) -> View:
        """What `membership.decide` wants to know."""
        return View(
            me=self._me,
            nodes=tuple(self.nodes.values()),
            round=self.round,
            nodes_changed_s=self._nodes_changed_s,
            formed_s=self._formed_s,
            broken_s=self._broken_s,
            lineage=self._lineage,
            departed=self._departed,
        )

    def replace(self, entries: Iterable[tuple[str, Entry]], now_s: float) -> list[Departure]:
        """Learn a whole listing; what is missing from it is gone (all of it, where the store was lost)."""
        listed = dict(entries)
        if ROUND not in listed:
            self.round, self.round_revision = None, 0
        if STORE not in listed:
            self.store, self.store_revision = None, 0
        gone = [self._forget(n, now_s) for n in list(self.nodes) if f"{NODES}{n}" not in listed]
        for key, entry in listed.items():
            self._learn(key, entry, now_s)
        self._settle(now_s)
        return gone

    def apply(self, changes: Iterable[tuple[str, Entry | None]], now_s: float) -> list[Departure]:
        """Learn changes in the order in which the store made them."""
        gone = []
        for key, entry in changes:
            if entry is not None:
                self._learn(key, entry, now_s)
            elif key == STORE:
                self.store, self.store_revision = None, 0
            elif key.startswith(NODES) and (node_id := key.removeprefix(NODES)) in self.nodes:
                gone.append(self._forget(node_id, now_s))
        self._settle(now_s)
        return gone

    def learn_round(self, current: Round, revision: int, now_s: float) -> None:
        """Learn a round that this node itself proposed, ahead of the watch."""
        self._take_round(current, revision, now_s)
        self._settle(now_s)

    def presume_lost(self, node_id: str, reason: str) -> bool:
        """Note why a node's record is about to go; False if it is gone or leaves of its own accord."""
        node = self.nodes.get(node_id)
        if node is None or node.reason == LEFT:
            return False
        self._departed[node_id] = f"lost: {reason}"
        return True

    def _learn(self, key: str, entry: Entry, now_s: float) -> None:
        try:
            if key.startswith(NODES):
                self._take_node(Node.from_json(entry.value, entry.create_revision), now_s)
            elif key == ROUND:
                self._take_round(Round.from_json(entry.value), entry.revision, now_s)
            elif key == STORE:
                generation, _, address = entry.value.decode().partition(" ")
                self.store, self.store_revision = (int(generation), address), entry.revision
        except (ValueError, TypeError, KeyError) as error:
            log.error("ignored %s, not a record of this version: %s", entry.key, error)

    def _take_node(self, node: Node, now_s: float) -> None:
        if node.node_id not in self.nodes:
            self._nodes_changed_s = now_s
            self._departed.pop(node.node_id, None)
        self.nodes[node.node_id] = node

    def _take_round(self, current: Round, revision: int, now_s: float) -> None:
        if self.round is None or current.generation != self.round.generation:
            self._formed_s = now_s
        self.round = current
        self.round_revision = revision

    def _forget(self, node_id: str, now_s: float) -> Departure:
        node = self.nodes.pop(node_id)
        self._nodes_changed_s = now_s
        how = LEFT if node.reason == LEFT else "lost: its lease ended"
        return Departure(node_id, self._departed.setdefault(node_id, how))

    def _settle(self, now_s: float) -> None:
        broken = self.round is None or breakage(self.view()) is not None
        if broken and not self._was_broken:
            self._broken_s = now_s
        self._was_broken = broken
