"""What the nodes know of the job. No thread, no I/O.

Keys are relative to the run's prefix: `nodes/NODE_ID` for each node's record, and under `job/` what every node follows:
`job/round`, `job/leader` ("NODE_ID", or "NODE_ID left"; under the leader's lease), for a minute `job/drain/ORDER_ID`.
A `Board` is what every node knows, a `Roster` what the leader does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from launcher.drain.draining import DrainOrder
from launcher.kv import Entry
from launcher.rounds.membership import View, breakage
from launcher.rounds.records import LEFT, LEFT_AT_ONCE, Node, Round

log = logging.getLogger(__name__)


def run_prefix(run_id: str) -> str:
    """What goes before every key of a run."""
    return f"elastic-moe/{run_id}/"


NODES = "nodes/"
JOB = "job/"
ROUND = f"{JOB}round"
LEADER = f"{JOB}leader"
DRAIN = f"{JOB}drain/"

LEASE_ENDED = "lost: its lease ended"


@dataclass(frozen=True)
class Departure:
    """A node that is no longer there, and how it went: LEFT, LEFT_AT_ONCE, or "lost: ..."."""

    node_id: str
    how: str


class _RoundReader:
    """Reads the versions of a round. Only those of one key that was never deleted share their participants: the store
    may be lost, and a job begin again at the same generation with other nodes."""

    def __init__(self) -> None:
        self._last: Round | None = None
        self._create_revision = 0

    def read(self, entry: Entry) -> Round | None:
        """The round in an entry; None, and a line in the log, where it is not one of this version."""
        before = self._last if entry.create_revision == self._create_revision else None
        try:
            self._last = Round.from_json(entry.value, before)
        except (ValueError, TypeError, KeyError) as error:
            log.error("ignored %s, not a record of this version: %s", entry.key, error)
            return None
        self._create_revision = entry.create_revision
        return self._last


class Board:
    """The round and who leads, as the store last showed them."""

    def __init__(self) -> None:
        self.round: Round | None = None
        self.round_revision = 0
        self.leader = ""
        self.leader_revision = 0
        self.predecessor: Departure | None = None
        """The leader that this board last saw go, as far as it did."""
        self.drain_orders: dict[str, DrainOrder] = {}
        """What `elastic-moe drain` has asked for, by key; an order's lease is never renewed."""
        self._leader_left = ""
        self._reader = _RoundReader()

    def replace(self, entries: Iterable[tuple[str, Entry]]) -> None:
        """Learn a whole listing. Who led before, and how that ended, is not known any more."""
        listed = dict(entries)
        if ROUND not in listed:
            self.round, self.round_revision = None, 0
        self.leader, self.leader_revision, self.predecessor = "", 0, None
        self.drain_orders.clear()
        self.apply(listed.items())

    def apply(self, changes: Iterable[tuple[str, Entry | None]]) -> None:
        """Learn changes in the order in which the store made them."""
        for key, entry in changes:
            if key == ROUND:
                self._take_round(entry)
            elif key == LEADER:
                self._take_leader(entry)
            elif key.startswith(DRAIN):
                self._take_order(key, entry)

    def _take_round(self, entry: Entry | None) -> None:
        if entry is None:
            self.round, self.round_revision = None, 0
        elif (found := self._reader.read(entry)) is not None:
            self.round, self.round_revision = found, entry.revision

    def _take_leader(self, entry: Entry | None) -> None:
        if entry is None:
            how = self._leader_left or LEASE_ENDED
            self.predecessor = Departure(self.leader, how) if self.leader else None
            self.leader, self.leader_revision = "", 0
        else:
            self.leader, self._leader_left = leader_in(entry)
            self.leader_revision = entry.revision

    def _take_order(self, key: str, entry: Entry | None) -> None:
        self.drain_orders.pop(key, None)
        try:
            if entry is not None:
                self.drain_orders[key] = DrainOrder.from_json(entry.value)
        except (ValueError, TypeError) as error:
            log.error("ignored %s: %s", key, error)

    def counts_as_lost(self, node_id: str, since_revision: int) -> bool:
        """Whether the leader took this node for lost after it had registered at `since_revision`."""
        broken = self.round.broken if self.round else None
        return broken is not None and node_id in broken.lost and self.round_revision > since_revision


def leader_in(entry: Entry) -> tuple[str, str]:
    """Who leads, and how that node leaves ("" while it does not)."""
    node_id, _, left = entry.value.decode(errors="replace").partition(" ")
    return node_id, left


class Roster:
    """All nodes and the round, as the leader sees them. Times are the caller's monotonic clock's."""

    def __init__(
        self, lineage: str, now_s: float, *, grace_s: float = 0.0, departed: Mapping[str, str] | None = None
    ) -> None:
        """`grace_s`: for so long participants that the first listing does not show are awaited, before they count as
        lost; except those whose going is known (`departed`: node -> how).
        """
        self.nodes: dict[str, Node] = {}
        self._reader = _RoundReader()
        self.round: Round | None = None
        self.round_revision = 0
        self._leader = ""
        self._lineage = lineage
        self._departed = dict(departed or {})
        self._fell: dict[str, int] = {}
        self._grace_s = grace_s
        self._awaited: frozenset[str] | None = None  # not listed yet
        self._awaited_until_s = 0.0
        self._nodes_changed_s = self._formed_s = self._broken_s = now_s
        self._reported_s = -math.inf
        self._drained_s = now_s if any(how.startswith(LEFT) for how in self._departed.values()) else -math.inf
        self._was_broken = True

    def view(self) -> View:
        """What `membership.decide` wants to know."""
        return View(
            nodes=tuple(self.nodes.values()),
            round=self.round,
            nodes_changed_s=self._nodes_changed_s,
            formed_s=self._formed_s,
            broken_s=self._broken_s,
            lineage=self._lineage,
            departed=self._departed,
            fell=self._fell,
            awaited=self._awaited or frozenset(),
            awaited_until_s=self._awaited_until_s,
            leader=self._leader,
            drained_s=self._drained_s,
            reported_s=self._reported_s,
        )

    @property
    def awaited(self) -> frozenset[str]:
        """Participants that may still come back."""
        return self._awaited or frozenset()

    def replace(self, entries: Iterable[tuple[str, Entry]], now_s: float) -> list[Departure]:
        """Learn a whole listing; what is missing from it is gone (all of it, where the store was lost)."""
        listed = dict(entries)
        self.round_revision = 0  # whatever was learnt before, the listing is newer
        if ROUND not in listed:
            self.round = None
        if LEADER not in listed:
            self._leader = ""
        gone = [self._forget(n, now_s) for n in list(self.nodes) if f"{NODES}{n}" not in listed]
        for key, entry in listed.items():
            self._learn(key, entry, now_s)
        if self._awaited is None:
            gone += self._await_the_absent(now_s)
        return gone + self.settle(now_s)

    def _await_the_absent(self, now_s: float) -> list[Departure]:
        absent = [p.node_id for p in self.round.participants if p.node_id not in self.nodes] if self.round else []
        self._awaited = frozenset(n for n in absent if n not in self._departed)
        self._awaited_until_s = now_s + self._grace_s
        return [Departure(n, self._departed[n]) for n in absent if n in self._departed]

    def apply(self, changes: Iterable[tuple[str, Entry | None]], now_s: float) -> list[Departure]:
        """Learn changes in the order in which the store made them."""
        gone = []
        for key, entry in changes:
            if entry is not None:
                self._learn(key, entry, now_s)
            elif key == LEADER:
                self._leader = ""
            elif key.startswith(NODES) and (node_id := key.removeprefix(NODES)) in self.nodes:
                gone.append(self._forget(node_id, now_s))
        return gone + self.settle(now_s)

    def learn_round(self, current: Round, revision: int, now_s: float) -> None:
        """Learn a round that this node itself proposed, ahead of the watch."""
        self._take_round(current, revision, now_s)
        self.settle(now_s)

    def presume_lost(self, node_id: str, reason: str) -> bool:
        """Note why a node's record is about to go; False if it is gone or leaves of its own accord."""
        node = self.nodes.get(node_id)
        if node is None or node.reason == LEFT:
            return False
        self._departed[node_id] = f"lost: {reason}"
        return True

    def give_up(self, node_id: str, reason: str, now_s: float) -> list[Departure]:
        """An awaited node will not come back."""
        if node_id not in self.awaited:
            return []
        self._awaited = self.awaited - {node_id}
        self._departed[node_id] = f"lost: {reason}"
        return [Departure(node_id, self._departed[node_id]), *self.settle(now_s)]

    def settle(self, now_s: float) -> list[Departure]:
        """Note what time has changed: when the round broke, and who was awaited for too long."""
        overdue: list[Departure] = []
        if self.awaited and now_s >= self._awaited_until_s:
            overdue = [Departure(n, "lost: its record is gone") for n in sorted(self.awaited)]
            self._departed.update((gone.node_id, gone.how) for gone in overdue)
            self._awaited = frozenset()
        broken = self.round is None or breakage(self.view()) is not None
        if broken and not self._was_broken:
            self._broken_s = now_s
        self._was_broken = broken
        return overdue

    def _learn(self, key: str, entry: Entry, now_s: float) -> None:
        if key == ROUND:
            if entry.revision > self.round_revision and (found := self._reader.read(entry)) is not None:
                self._take_round(found, entry.revision, now_s)
        elif key == LEADER:
            self._leader = leader_in(entry)[0]
        elif key.startswith(NODES):
            try:
                self._take_node(Node.from_json(entry.value, entry.create_revision), entry.revision, now_s)
            except (ValueError, TypeError, KeyError) as error:
                log.error("ignored %s, not a record of this version: %s", entry.key, error)

    def _take_node(self, node: Node, revision: int, now_s: float) -> None:
        if node.node_id not in self.nodes:
            self._nodes_changed_s = now_s
            self._departed.pop(node.node_id, None)
            self._awaited = self._awaited and self._awaited - {node.node_id}
        if node.draining and not (node.node_id in self.nodes and self.nodes[node.node_id].draining):
            self._drained_s = now_s
        before = self.nodes.get(node.node_id)
        if not set(node.cannot_reach) <= set(before.cannot_reach if before else ()):
            self._reported_s = now_s
        self.nodes[node.node_id] = node
        if node.failure is None:
            self._fell.pop(node.node_id, None)
        else:
            self._fell.setdefault(node.node_id, revision)

    def _take_round(self, current: Round, revision: int, now_s: float) -> None:
        if self.round is None or current.generation != self.round.generation:
            self._formed_s = now_s
        self.round = current
        self.round_revision = revision

    def _forget(self, node_id: str, now_s: float) -> Departure:
        node = self.nodes.pop(node_id)
        self._fell.pop(node_id, None)
        self._nodes_changed_s = now_s
        how = (LEFT if node.yielded else LEFT_AT_ONCE) if node.reason == LEFT else LEASE_ENDED
        return Departure(node_id, self._departed.setdefault(node_id, how))
