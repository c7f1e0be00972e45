"""A job under virtual time: its nodes are cooperative processes on one event queue.

They run the code that decides (`membership`, `roster`, `kv.state`). Made up is what `member`, `leading` and `agent` do
around it: renewals and self-fencing, watches that deliver late, writes that get lost, workers that take time to start
and to stop.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from launcher.coordination.roster import JOB, LEADER, NODES, ROUND, Board, Roster
from launcher.errors import Compacted
from launcher.kv.state import State
from launcher.rounds.failures import FailureClass
from launcher.rounds.membership import Evict, Propose, Rules, decide
from launcher.rounds.records import LEFT, Failure, Node, Round, Status, identity_of

TTL_S = 2.0
FENCE_S = 0.85 * TTL_S
TICK_S = 0.25


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
    store_up: bool = True
    store_refuses: bool = False  # down as etcd is without its processes: refused connections prove that no lease ends
    log: list[str] = field(default_factory=list)
    highest_generation: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._round_revision = 0

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now_s + delay_s, next(self._order), action))

    def run(self, until_s: float) -> None:
        while self._queue and self._queue[0][0] <= until_s:
            self.now_s, _, action = heapq.heappop(self._queue)
            if self.store_up:
                self.store.expire(self.now_s)
            action()
            self._check()
        self.now_s = until_s

    def note(self, text: str) -> None:
        self.log.append(f"{self.now_s:8.3f}  {text}")

    def _check(self) -> None:
        entry = self.store.get(ROUND)
        if entry is not None and entry.revision != self._round_revision:
            self._round_revision = entry.revision
            generation = Round.from_json(entry.value).generation
            if generation < self.highest_generation:
                raise Violation(f"generation {generation} after {self.highest_generation}")
            self.highest_generation = generation
        active = {n.running for n in self.nodes.values() if n.running and not n.frozen}
        if len(active) > 1:
            raise Violation(f"workers of generations {sorted(active)} run at once")


class SimNode:
    """What a `Member` and an agent with its workers do, one turn every tick."""

    def __init__(self, world: World, name: str, slots: int) -> None:
        self.world = world
        self.name = name
        self.alive, self.frozen, self.cut = True, False, False
        self.running = 0  # the generation whose workers run on this node
        self.lease_id = 0
        self.renewed_s = -TTL_S
        self.record = Node(node_id=name, host=f"host-{name[0]}", address="", port=0, slots=slots)
        self.stored: Node | None = None
        self.fenced = True
        self.registered_revision = 0
        self.board = Board()
        self.watched_from: int | None = None
        self.roster: Roster | None = None  # while it leads
        self.roster_watched_from: int | None = None
        self.busy = False
        world.nodes[name] = self
        world.at(world.random.uniform(0, TICK_S), self.turn)

    # --- its way to the store

    @property
    def reaches_store(self) -> bool:
        return self.alive and not self.frozen and not self.cut and self.world.store_up

    def turn(self) -> None:
        """One round of everything that the real threads do; then again a little later."""
        if not self.alive:
            return
        self.world.at(self.world.random.uniform(0.2, 1.0) * TICK_S, self.turn)
        if self.frozen:
            return
        if not self.world.store_up and self.world.store_refuses and not self.cut and not self.fenced:
            self.renewed_s = self._proven()
        if self.world.now_s > self.renewed_s + FENCE_S:
            self.fenced = True
        if self.reaches_store:
            self._renew()
            if self.fenced and self.record.status in (Status.READY, Status.EXCLUDED) and not self.running:
                self._register()
            if not self.fenced:
                self._listen()
                self._write()
            if not self.fenced:
                self._perhaps_lead()
        if self.fenced:
            self.roster = None
        if self.roster is not None and self.reaches_store:
            self._lead(self.roster)
        self._mind_workers()

    def _proven(self) -> float:
        """As `Lease._unanswered`: a proof counts if it comes before the lease may have ended."""
        return self.world.now_s if self.world.now_s < self.renewed_s + TTL_S else self.renewed_s

    def _renew(self) -> None:
        if self.lease_id and not self.fenced:
            if self.world.store.renew(self.lease_id, self.world.now_s):
                self.renewed_s = self.world.now_s
            else:
                self.fenced = True

    def _register(self) -> None:
        store, now_s = self.world.store, self.world.now_s
        before, self.lease_id = self.lease_id, store.grant(TTL_S, now_s)
        self.renewed_s = now_s
        self.record = dataclasses.replace(self.record, status=Status.READY, failure=None)
        written = store.put(f"{NODES}{self.name}", self.record.to_json(), None, self.lease_id)
        assert written is not None
        self.registered_revision = written.revision
        self.roster = None
        store.revoke(before)
        self.stored, self.fenced, self.watched_from = self.record, False, None
        self.world.note(f"{self.name} registers")

    def _listen(self) -> None:
        """As `Member._follow`."""
        store = self.world.store
        if self.watched_from is None:
            listing = store.list(JOB)
            self.board.replace((e.key, e) for e in listing.entries)
            self.watched_from = listing.revision + 1
        elif self.world.random.random() < 0.3:
            return  # the events are late
        else:
            try:
                events = store.events(JOB, self.watched_from)
            except Compacted:
                self.watched_from = None
                return
            self.board.apply((e.key, e.entry) for e in events)
            if events:
                self.watched_from = events[-1].revision + 1
        if self.board.counts_as_lost(self.name, self.registered_revision):
            self.fenced = True

    def _write(self) -> None:
        lost = self.world.random.random() < 0.1
        if self.stored == self.record or lost:
            return
        if self.world.store.put(f"{NODES}{self.name}", self.record.to_json(), None, self.lease_id):
            self.stored = self.record

    def _perhaps_lead(self) -> None:
        if not self.board.leader:
            written = self.world.store.put(LEADER, self.name.encode(), 0, self.lease_id)
            if written is not None:
                self.board.apply([(LEADER, written)])
        if self.board.leader != self.name:
            self.roster = None
        elif self.roster is None:
            gone = self.board.predecessor
            departed = {gone.node_id: gone.how} if gone else {}
            self.roster = Roster("L", self.world.now_s, grace_s=TTL_S, departed=departed)
            self.roster_watched_from = None
            self.world.note(f"{self.name} leads")

    def _lead(self, roster: Roster) -> None:
        """As `Leadership._turn`."""
        store, now_s = self.world.store, self.world.now_s
        if self.roster_watched_from is None:
            listing = store.list("")
            gone = roster.replace([(e.key, e) for e in listing.entries], now_s)
            self.roster_watched_from = listing.revision + 1
        elif self.world.random.random() < 0.3:
            gone = roster.settle(now_s)
        else:
            try:
                events = store.events("", self.roster_watched_from)
            except Compacted:
                self.roster_watched_from = None
                return
            gone = roster.apply([(e.key, e.entry) for e in events], now_s)
            if events:
                self.roster_watched_from = events[-1].revision + 1
        if any(departure.node_id == self.name for departure in gone):
            self.fenced = True
            return
        self._act(roster)

    def _act(self, roster: Roster) -> None:
        action = decide(roster.view(), self.world.rules, lambda slots, previous: None, self.world.now_s)
        if isinstance(action, Evict):
            roster.presume_lost(action.node_id, action.reason)
            self.world.store.delete(f"{NODES}{action.node_id}")
            self.world.note(f"{self.name} evicts {action.node_id}: {action.reason}")
        elif isinstance(action, Propose):
            proposed = action.round
            written = self.world.store.put(ROUND, proposed.to_json(), roster.round_revision, None)
            if written is None:
                self.roster_watched_from = None
                return
            roster.learn_round(proposed, written.revision, self.world.now_s)
            names = [p.node_id for p in proposed.participants]
            how = " ".join(filter(None, ("complete" * proposed.complete, proposed.stop, proposed.outcome)))
            broken = proposed.broken.reason if proposed.broken else ""
            self.world.note(f"{self.name} proposes {proposed.generation} {names} {how} {broken}")

    # --- its workers

    def _mind_workers(self) -> None:
        if self.busy:
            return
        current = self.board.round
        if not self.running:
            self._stand(current)
        if self.running:
            broken = self.fenced or current is None or current.generation != self.running
            if broken or current is None or current.broken or current.stop:
                self._stop(at_once=self.fenced)
        elif self.record.status is Status.RUNNING:
            self._finish_joining(current)
        elif current is not None and current.generation > self.record.generation and self._may_run(current):
            self.busy = True
            self.world.at(self.world.random.uniform(0.0, 0.5), lambda: self._join(current))

    def _may_run(self, current: Round) -> bool:
        return (
            not self.fenced
            and not current.outcome
            and current.place_of(self.name) is not None
            and current.broken is None
        )

    def _join(self, current: Round) -> None:
        """As `Member.join`: say so, and start nothing before all have."""
        self.busy = False
        now = self.board.round
        if self.alive and now is not None and now.generation == current.generation and self._may_run(now):
            self.record = dataclasses.replace(
                self.record, status=Status.RUNNING, generation=current.generation, reason="", failure=None
            )

    def _finish_joining(self, current: Round | None) -> None:
        joined = self.record.generation
        if current is None or current.generation != joined or not self._may_run(current):
            self.record = dataclasses.replace(self.record, status=Status.READY)
        elif current.complete:
            self.running = joined

    def _stand(self, current: Round | None) -> None:
        """As `RecordKeeper.stand`."""
        excluded = current.history.excluded(identity_of(self.name)) if current else None
        status = Status.EXCLUDED if excluded else Status.READY
        if self.record.status in (Status.READY, Status.EXCLUDED) and self.record.status is not status:
            self.record = dataclasses.replace(self.record, status=status)
            self.world.note(f"{self.name} is {status.value}")

    def crash(self, kind: FailureClass, step: int) -> None:
        """A worker fails: never twice in the same way, which would rightly end the job."""
        failure = Failure(0, 1, "", self.world.now_s, kind=kind, step=step, place=f"{self.name} {self.world.now_s}")
        self.record = dataclasses.replace(self.record, failure=failure)
        self._stop(at_once=False)

    def _stop(self, *, at_once: bool) -> None:
        self.record = dataclasses.replace(self.record, status=Status.STOPPING, reason="stops")
        if at_once:
            self._stopped()
        else:
            self.busy = True
            self.world.at(self.world.random.uniform(0.0, 0.4), self._stopped)

    def _stopped(self) -> None:
        self.busy = False
        if self.frozen:  # it goes on when it thaws
            self.world.at(TICK_S, self._stopped)
            self.busy = True
            return
        self.running = 0
        self.record = dataclasses.replace(self.record, status=Status.READY)

    # --- faults

    def kill(self) -> None:
        self.alive, self.running = False, 0
        self.world.note(f"{self.name} is killed")

    def leave(self) -> None:
        if self.reaches_store and not self.fenced:
            left = dataclasses.replace(self.record, status=Status.EXCLUDED, reason=LEFT)
            self.world.store.put(f"{NODES}{self.name}", left.to_json(), None, self.lease_id)
            self.world.store.revoke(self.lease_id)
        self.alive, self.running = False, 0
        self.world.note(f"{self.name} leaves")

    def thaw(self) -> None:
        """The first thing that a thawed agent does is to look at the clock. (Real workers thaw with it, and may run on
        for the moment that it takes; what they save is fenced by their generation.)
        """
        self.frozen = False
        self.world.note(f"{self.name} thaws")
        if self.world.now_s > self.renewed_s + FENCE_S:
            self.fenced = True
            if self.running:
                self._stop(at_once=True)
