"""A job under virtual time: one store, one clock, one queue of what happens when, and the ways between nodes."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launcher.errors import Compacted, KVUnavailable
from launcher.kv import Entry, Snapshot, WatchEvent
from launcher.kv.state import State
from launcher.node.board import ROUND
from launcher.rounds.membership import Rules
from launcher.rounds.records import Participant, Round

if TYPE_CHECKING:
    from tests.sim.nodes import SimNode
    from tests.sim.objects import SimObjects

LOST_S = 3.0
OVERLAP_S = 1.0
"""So long a node may take to hear that it was evicted. (What its workers save is fenced by their generation.)"""


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass
class World:
    """The store, the clock and the nodes."""

    seed: int
    rules: Rules
    store: State = field(default_factory=lambda: State(history_events=200))
    now_s: float = 0.0
    nodes: dict[str, SimNode] = field(default_factory=dict)
    objects: SimObjects | None = None
    """Of a store on objects: `store` is then its newest version."""
    ttl_s: float = 2.0
    slow_s: float = 0.5  # between two looks for news where nothing happens, at most
    store_up: bool = True
    store_refuses: bool = False  # down as etcd is without its processes: refused connections prove that no lease ends
    cuts: dict[frozenset[str], float] = field(default_factory=dict)  # between two nodes -> since when
    log: list[str] = field(default_factory=list)
    highest_generation: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._round_revision = 0
        self._members: dict[int, tuple[Participant, ...]] = {}
        self._overlap_since_s: float | None = None
        self._told_revision = 0
        self._num_stores = 1
        self.lost_s = -math.inf
        self.expires_s = math.inf  # no lease ends before

    def at(self, delay_s: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._queue, (self.now_s + delay_s, next(self._order), action))

    def run(self, until_s: float) -> None:
        while self._queue and self._queue[0][0] <= until_s:
            self.now_s, _, action = heapq.heappop(self._queue)
            if self.store_up and self.now_s >= self.expires_s:
                self.expires_s = self.store.expire(self.now_s) or math.inf
            action()
            self._check()
            if self.objects is None and self.store.revision != self._told_revision:
                self._told_revision = self.store.revision
                for node in self.nodes.values():
                    node.expect_news()
        self.now_s = until_s

    def note(self, text: str) -> None:
        self.log.append(f"{self.now_s:8.3f}  {text}")

    def cut_since_s(self, one: str, other: str) -> float | None:
        """Since when two nodes do not reach one another."""
        return self.cuts.get(frozenset((one, other)))

    def lose_store(self) -> None:
        """Its host is started anew. Nodes that run on until they hear of it are nobody's fault."""
        self._num_stores += 1
        self.store = State(history_events=200, first_lease_id=1_000_000 * self._num_stores)
        self._told_revision, self._round_revision, self.lost_s = -1, 0, self.now_s
        self.highest_generation = 0  # within a lineage only
        self._members.clear()

    def check_round(self) -> None:
        """No generation is given twice, and none has two rounds."""
        entry = self.store.get(ROUND)
        if entry is not None and entry.revision != self._round_revision:
            self._round_revision = entry.revision
            current = Round.from_json(entry.value)
            if current.generation < self.highest_generation:
                raise Violation(f"generation {current.generation} after {self.highest_generation}")
            members = self._members.setdefault(current.generation, current.participants)
            if members != current.participants:
                raise Violation(f"two rounds of generation {current.generation}: {members}, {current.participants}")
            self.highest_generation = current.generation

    def _check(self) -> None:
        self.check_round()
        running = [n for n in self.nodes.values() if n.running and not n.frozen]
        if not running or self.now_s < self.lost_s + LOST_S:
            return
        for node in running:
            if not node.holds_lease:
                raise Violation(f"{node.name} runs workers after its lease has ended")
        active = {n.running for n in running}
        if len(active) <= 1:
            self._overlap_since_s = None
        elif self._overlap_since_s is None:
            self._overlap_since_s = self.now_s
        elif self.now_s > self._overlap_since_s + OVERLAP_S + self.slow_s:
            raise Violation(f"workers of generations {sorted(active)} run at once")


class SimKV:
    """One node's way to the store: a `KV` for one thread, without leases, that answers at once or not at all."""

    def __init__(self, world: World, is_open: Callable[[], bool]) -> None:
        self._world = world
        self._is_open = is_open

    def _reach(self) -> State:
        if not self._is_open():
            raise KVUnavailable("no answer")
        return self._world.store

    def get(self, key: str) -> Entry | None:
        return self._reach().get(key)

    def list(self, prefix: str) -> Snapshot:
        return self._reach().list(prefix)

    def watch(self, prefix: str, from_revision: int) -> SimWatch:
        return SimWatch(self._reach, prefix, from_revision)


class SimWatch:
    """What has happened since; it never waits."""

    def __init__(self, reach: Callable[[], State], prefix: str, from_revision: int) -> None:
        self._reach = reach
        self._store = reach()
        self._prefix = prefix
        self._from_revision = from_revision

    def next(self, timeout_s: float) -> tuple[WatchEvent, ...]:
        store = self._reach()
        if store is not self._store:
            raise Compacted("the store was lost and is hosted anew")
        found = store.events(self._prefix, self._from_revision)
        if found:
            self._from_revision = found[-1].revision + 1
        return found

    def cancel(self) -> None:
        pass
