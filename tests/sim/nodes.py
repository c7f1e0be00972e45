"""A node under virtual time. It runs the code that a real one runs: `NodeEngine`, and under it `kv.Follower`.

What stands for threads and sockets is made up here, with the reason:

* the lanes of `NodeDriver` carry one task out after the other; here each takes a while, may come to nothing, may be
  carried out unheard, or late. (`NodeDriver` itself is threads.)
* a store on objects has more of its own: `bucket`.
* `kv.lease.Lease` renews itself on a thread; here every quarter of its TTL, and with the same proof of standing.
* `health.peers` and `health.liveness` are sockets; here a dead peer refuses, a cut-off one is silent.

The agent with its workers is in `agents`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from typing import TYPE_CHECKING

from launcher.errors import KVUnavailable
from launcher.kv import Entry, Follower, Snapshot
from launcher.node.effects import (
    Abandon,
    Decide,
    Delete,
    Effect,
    Follow,
    Get,
    Grant,
    Lane,
    Put,
    Report,
    Revoke,
    Ring,
    Task,
    WatchPeers,
)
from launcher.node.engine import NodeEngine
from launcher.node.events import (
    Answered,
    Changed,
    Decided,
    Event,
    Granted,
    LeaseSeen,
    LeasesSeen,
    Leaving,
    Listed,
    PeerAlive,
    PeerDead,
    PeerSilent,
    Started,
    Tick,
    Unanswered,
    Unheard,
)
from launcher.rounds.membership import decide
from launcher.rounds.records import Node
from tests.sim.agents import SimAgent
from tests.sim.bucket import SimBucket
from tests.sim.world import SimKV, Violation

if TYPE_CHECKING:
    from tests.sim.world import World

TURN_S = 1.0
KEEPALIVE_S = 5.0  # until a link that was cut counts as such
LEAVE_S = 15.0


@dataclasses.dataclass
class SimLease:
    """One of a node's leases: `lease_id` is the store's."""

    lease_id: int
    seen: LeaseSeen
    renewed: bool = True

    def count_from(self, since_s: float, ttl_s: float) -> None:
        """As `Lease.count_from`."""
        self.seen = dataclasses.replace(self.seen, deadline_s=max(self.seen.deadline_s, since_s + ttl_s))
        self.renewed = True


class SimNode:
    """What a node's process is, and its kernel."""

    def __init__(self, world: World, name: str, slots: int) -> None:
        self.world = world
        self.name = name
        self.alive, self.frozen, self.cut, self.flaky = True, False, False, False
        record = Node(node_id=name, host=f"host-{name[0]}", address="", port=0, slots=slots)
        self.engine = NodeEngine(record, world.rules, lease_ttl_s=world.ttl_s, lineage=name)
        self.agent = SimAgent(self)
        self._bucket = SimBucket(self) if world.objects is not None else None
        self._kv = self._bucket or SimKV(world, lambda: self.reaches_store)
        self._lanes: dict[Lane, deque[Task]] = {lane: deque() for lane in Lane}
        self.leases: dict[int, SimLease] = {}
        self._follower: Follower | None = None
        self._following = 0
        self._watched: dict[str, float] = {}  # peer -> since when
        self._inbox: list[Event] = []  # what comes while it is frozen
        self._wakes_s = math.inf
        self._is_news_expected = False
        world.nodes[name] = self
        world.at(0.0, lambda: self.feed(Started()))
        world.at(world.random.uniform(0, TURN_S), self._turn)

    @property
    def running(self) -> int:
        """The generation whose workers run on this node, 0 where none do."""
        return self.agent.running

    @property
    def holds_lease(self) -> bool:
        """Whether the lease of its record stands, as the store knows."""
        held = self.engine.own.lease
        return held is not None and held.lease_id in self.world.store.leases()

    @property
    def reaches_store(self) -> bool:
        return self.alive and not self.frozen and not self.cut and self.world.store_up

    # --- events in

    def feed(self, event: Event) -> None:
        """As `NodeDriver.feed`."""
        if not self.alive:
            return
        if self.frozen:
            self._inbox.append(event)
            return
        self._look_at_leases()
        self._step(event)
        if self.engine.due_s <= self.world.now_s:
            raise Violation(f"{self.name} has left undone what it has to do after {event}")
        self._sleep()
        if self.engine.has_left:
            self._end("has left")
        self.agent.look()

    def _let_agent_look(self) -> None:
        """As `NodeDriver.read`."""
        if self.alive:
            self._look_at_leases()
            self.agent.look()

    def _step(self, event: Event) -> None:
        for effect in self.engine.step(event, self.world.now_s):
            self._dispatch(effect)

    def _look_at_leases(self) -> None:
        if renewed := [lease for lease in self.leases.values() if lease.renewed]:
            for lease in renewed:
                lease.renewed = False
            self._step(LeasesSeen(tuple(lease.seen for lease in renewed)))

    def _sleep(self) -> None:
        """As `NodeDriver._keep_time`, which is late now and then."""
        if (due_s := self.engine.due_s) < self._wakes_s:
            self._wakes_s = due_s
            self.world.at(due_s - self.world.now_s + self.world.random.uniform(0, 0.02), lambda: self._wake(due_s))

    def _wake(self, planned_s: float) -> None:
        if self._wakes_s == planned_s:  # else it was woken before
            self._wakes_s = math.inf
            if self.world.now_s >= self.engine.due_s:
                self.feed(Tick())
            else:
                self._sleep()

    def _turn(self) -> None:
        """What goes on all the time; again a little later."""
        if not self.alive:
            return
        self.world.at(self.world.random.uniform(0.5, 1.0) * TURN_S, self._turn)
        if not self.frozen:
            self._mind_peers()
            self._listen()
            self._let_agent_look()

    def expect_news(self) -> None:
        """Something has changed in the store: it is heard in a moment."""
        if not self._is_news_expected and self._follower is not None:
            self._is_news_expected = True
            late_s = self.world.random.uniform(0.0, 0.05 if self.world.random.random() < 0.5 else 0.4)
            self.world.at(late_s, self._listen)

    def _listen(self) -> None:
        """As `NodeDriver._follow`."""
        self._is_news_expected = False
        if self._follower is None or self.frozen or not self.alive:
            return
        try:
            news = self._follower.next(0.0)
        except KVUnavailable as error:
            self.feed(Unheard(str(error)))
            return
        if isinstance(news, Snapshot):
            self.feed(Listed(self._following, news.entries))
        else:
            self.feed(Changed(self._following, news.events))

    # --- effects out

    def _dispatch(self, effect: Effect) -> None:
        match effect:
            case Task():
                lane = self._lanes[effect.lane]
                lane.append(effect)
                if len(lane) == 1:
                    self._begin(effect)
            case Abandon(lease_id):
                del self.leases[lease_id]
            case Follow(number, prefix):
                self._following, self._follower = number, Follower(self._kv, prefix)  # type: ignore[arg-type]
                self.expect_news()
            case WatchPeers(peers):
                self._watched = dict.fromkeys((p.node_id for p in peers), self.world.now_s)
            case Ring(peers):
                for peer in peers:
                    self.world.at(self.world.random.uniform(0.0, 0.1), lambda name=peer.node_id: self._ring(name))
            case Report(event, generation, fields):
                told = ", ".join(f"{key}={value}" for key, value in fields.items() if isinstance(value, str | int))
                self.world.note(f"{self.name} generation {generation}: {event.value} {told}")

    def _begin(self, task: Task) -> None:
        """Most tasks are quick; a store that hangs is not."""
        chance = self.world.random
        took_s = chance.uniform(0.0, 0.05) if chance.random() < 0.95 else chance.uniform(0.0, 2.0)
        self.world.at(took_s, lambda: self._carry_out(task))

    def _carry_out(self, task: Task) -> None:
        """As a thread of `NodeDriver` does, or as what such a thread has sent arrives when nobody waits for it."""
        chance, lane = self.world.random, self._lanes[task.lane]
        lost = 0.3 if self.flaky else 0.03
        if not self.alive:
            return
        if self.frozen:
            self.world.at(0.2, lambda: self._carry_out(task))
            return
        if self._bucket is not None and not isinstance(task, Decide):
            self._bucket.carry_out(task, lambda answer: self._answered(task, answer))
            return
        lane.popleft()
        if lane:
            self._begin(lane[0])
        if isinstance(task, Decide):
            action = decide(task.view, task.rules, lambda slots, previous: None, self.world.now_s)
            self.feed(Decided(task, action))
        elif not self.reaches_store:
            self.feed(Unanswered(task, "no answer"))
        elif chance.random() < lost:  # on its way, and perhaps carried out, but not heard of
            self.world.at(
                chance.choice([0.0, 0.0, chance.uniform(0.0, 4.0)]), lambda: self._apply(task, is_heard=False)
            )
            self.feed(Unanswered(task, "no answer"))
        elif chance.random() < lost:
            self.feed(Unanswered(task, "not sent"))
        else:
            self.feed(self._apply(task, is_heard=True))

    def _answered(self, task: Task, answer: Event) -> None:
        lane = self._lanes[task.lane]
        lane.popleft()
        if lane:
            self._begin(lane[0])
        self.feed(answer)

    def add_lease(self, seen: LeaseSeen) -> SimLease:
        """One more of this node's."""
        lease = self.leases[seen.lease_id] = SimLease(seen.lease_id, seen)
        return lease

    def _apply(self, task: Task, *, is_heard: bool) -> Event:
        store, now_s = self.world.store, self.world.now_s
        if not self.world.store_up:  # too late: it is lost
            return Unanswered(task, "no answer")
        match task:
            case Grant(ttl_s=ttl_s):
                lease_id = store.grant(ttl_s, now_s)
                self.world.expires_s = min(self.world.expires_s, now_s + ttl_s)
                lease = SimLease(lease_id, LeaseSeen(lease_id, now_s + ttl_s))
                if is_heard:
                    self.leases[lease_id] = lease
                    self.world.at(ttl_s / 4, lambda: self._renew(lease))
                return Granted(task, ttl_s, lease.seen)
            case Get(key=key):
                return Answered(task, store.get(key))
            case Put(key=key, value=value, if_revision=revision, lease_id=lease_id):
                written: Entry | None = store.put(key, value, revision, lease_id or None)
                return Answered(task, written)
            case Delete(key=key, if_revision=revision):
                store.delete(key, revision)
            case Revoke(lease_id=lease_id):
                if is_heard:
                    del self.leases[lease_id]
                store.revoke(lease_id)
        return Answered(task)

    def _renew(self, lease: SimLease) -> None:
        """As `Lease._keep_alive`."""
        now_s, before = self.world.now_s, lease.seen
        if not self.alive or before.lost or before.lease_id not in self.leases:
            return
        if self.frozen:
            self.world.at(0.01, lambda: self._renew(lease))
            return
        pause_s = self.world.ttl_s / 4
        if self.reaches_store:
            if self.world.store.renew(lease.lease_id, now_s):
                lease.seen = LeaseSeen(before.lease_id, now_s + self.world.ttl_s)
            else:
                lease.seen = dataclasses.replace(before, lost=True)
        else:
            # A proof that no lease ends counts if it comes before this one may have ended.
            stands = self.world.store_refuses and not self.cut and not self.world.store_up
            deadline_s = now_s + self.world.ttl_s if stands and now_s < before.deadline_s else before.deadline_s
            since_s = now_s if before.silent_since_s is None else before.silent_since_s
            lost = now_s >= deadline_s
            lease.seen = LeaseSeen(before.lease_id, deadline_s, lost, since_s, "no answer", stands)
            pause_s = 0.2
        lease.renewed = True
        self.world.at(pause_s, lambda: self._renew(lease))

    # --- peers

    def _mind_peers(self) -> None:
        """As `PeerWatch`: a dead one refuses a connection, one that is cut off is silent."""
        for name, since_s in list(self._watched.items()):
            cut_s = self.world.cut_since_s(self.name, name)
            if cut_s is None and not self.world.nodes[name].alive:
                del self._watched[name]
                self.feed(PeerDead(name, "connection refused"))
            elif cut_s is not None and self.world.now_s > max(cut_s, since_s) + KEEPALIVE_S:
                del self._watched[name]
                self.feed(PeerSilent(name))

    def _ring(self, name: str) -> None:
        if self.world.cut_since_s(self.name, name) is None:
            dead = not self.world.nodes[name].alive
            self.feed(PeerDead(name, "connection refused") if dead else PeerAlive(name))

    # --- faults

    def _end(self, how: str) -> None:
        self.alive = False
        self.agent.end()
        self.world.note(f"{self.name} {how}")

    def kill(self) -> None:
        self._end("is killed")

    def leave(self) -> None:
        """As `Member.leave`: it waits for the store, and not for ever."""
        self.agent.end()
        self.world.at(LEAVE_S, lambda: self._end("gives up leaving") if self.alive else None)
        self.feed(Leaving())

    def thaw(self) -> None:
        """The first thing that a thawed agent does is to look at the clock. (Real workers thaw with it, and may run on
        for the moment that it takes; what they save is fenced by their generation.)
        """
        self.frozen = False
        self.world.note(f"{self.name} thaws")
        self._let_agent_look()
        inbox, self._inbox = self._inbox, []
        for event in [*inbox, Tick()]:
            self.feed(event)
