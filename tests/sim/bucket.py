"""A node's way to a store on objects, under virtual time: the `Journal` and the `Judge` that real nodes run.

What stands for threads is made up here: `kv.bucket.client` renews leases, looks for news and minds others' leases, each
from a thread of its own; `kv.bucket.shared` carries the journal's steps out one after the other.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from launcher.errors import KVUnavailable
from launcher.kv import Snapshot, WatchEvent
from launcher.kv.bucket.beat import beat_name
from launcher.kv.bucket.journal import Journal
from launcher.kv.bucket.judge import Judge
from launcher.kv.bucket.ops import DeleteKey, EndLease, GrantLease, Op, PutKey, Result, Wish, entry_of
from launcher.kv.bucket.register import Create, Overwrite, Pause, Read, Request, Steps, Together
from launcher.kv.bucket.version import TOMBSTONE, version_name
from launcher.node.effects import Delete, Get, Grant, Put, Revoke, Task
from launcher.node.events import Answered, Event, Granted, LeaseSeen, Unanswered

if TYPE_CHECKING:
    from tests.sim.nodes import SimLease, SimNode

RENEWALS_PER_TTL, CHECKS_PER_TTL = 3.0, 3.0
SLOWS_DOWN, QUICK_S, TURN_S = 0.15, 0.1, 0.03
HEDGE_FRACTION = 0.125
KEPT_VERSIONS = Wish.WINDOW + 8
"""Fewer than in earnest, so that some are buried in a life; more than a wish may wait for."""


class SimBucket:
    """One node's `BucketKV`."""

    def __init__(self, node: SimNode) -> None:
        self._node = node
        self._world = node.world
        assert node.world.objects is not None
        self._objects = node.world.objects
        nonces = itertools.count()
        num_tries_alone = node.world.random.randrange(4)
        name_size_bytes_max = node.world.random.choice((0, 1000))
        self.journal = Journal(lambda: f"{node.name}-{next(nonces)}", TURN_S, num_tries_alone, name_size_bytes_max)
        self.trouble = ""
        self._queue: deque[tuple[Callable[[], Steps[Any]], Callable[[Any], None]]] = deque()
        self._steps: Steps[Any] | None = None
        self._unwritten_s = 0.0  # then what is being changed was in no version yet
        self._news_s = 0.0
        self._looked_s = -math.inf
        self._beats = itertools.count()
        self._ungranted: set[int] = set()
        self._judge = Judge()
        self._world.at(0.0, self._poll)
        self._world.at(node.world.random.uniform(0.0, 1.0), self._mind_leases)

    # --- steps, one request at a time

    def _submit(self, make: Callable[[], Steps[Any]], done: Callable[[Any], None]) -> None:
        self._queue.append((make, done))
        self._go_on()

    def _go_on(self) -> None:
        if self._steps is None and self._queue:
            self._unwritten_s = self._world.now_s
            self._steps = self._queue[0][0]()
            self._advance(lambda steps: next(steps))

    def _advance(self, move: Callable[[Steps[Any]], Request]) -> None:
        assert self._steps is not None
        before = self.journal.number
        try:
            request = move(self._steps)
        except StopIteration as end:
            self._end(end.value)
        except KVUnavailable as error:
            self._end(error)
        else:
            self._ask(request)
        if self.journal.number != before:
            self._news_s = self._world.now_s
            self._node.expect_news()

    def _ask(self, request: Request) -> None:
        match request:
            case Pause(seconds):
                self._world.at(seconds * self._world.random.uniform(0.5, 1.5), lambda: self._resume(None))
                return
            case Read(name) | Create(name) if name == version_name(self.journal.number + 1):
                asked_s = self._world.now_s
                self._objects.ask(request, lambda: self._node.reaches_store, lambda told: self._note(told, asked_s))
                return
        self._objects.ask(request, lambda: self._node.reaches_store, self._resume)

    def _note(self, told: Any, asked_s: float) -> None:
        """As `SharedJournal._ask`."""
        if (told is None and not self.journal.is_granted) or told is True:
            self._unwritten_s = asked_s
        self._resume(told)

    def _resume(self, told: Any) -> None:
        if not self._node.alive or self._steps is None:
            return
        if self._node.frozen:  # between its look and its write, perhaps
            self._world.at(0.1, lambda: self._resume(told))
        elif isinstance(told, KVUnavailable):
            self._advance(lambda steps: steps.throw(told))
        else:
            self._advance(lambda steps: steps.send(told))

    def _end(self, result: Any) -> None:
        self._steps = None
        _, done = self._queue.popleft()
        self._tidy()
        done(result)
        self._go_on()

    def _tidy(self) -> None:
        """As `Upkeep`."""
        authored, self.journal.authored = self.journal.authored, []
        litter, self.journal.litter = self.journal.litter, []
        for number in authored:
            self._objects.bury(number - KEPT_VERSIONS, TOMBSTONE)
        for name in litter:
            self._world.at(self._world.random.uniform(0.0, 2.0), lambda name=name: self._objects.remove(name))

    # --- what `NodeDriver` has carried out

    def carry_out(self, task: Task, done: Callable[[Event], None]) -> None:
        """Do a task; `done` hears its answer."""
        match task:
            case Grant(ttl_s=ttl_s):
                done(Granted(task, ttl_s, self._lease(ttl_s).seen))
            case Get(key=key):
                self._submit(
                    self.journal.catch_up, lambda told: done(self._heard(task, told, self.journal.state.get(key)))
                )
            case Put():
                self._put(task, done)
            case Delete(key=key, if_revision=revision):
                self._change([DeleteKey(key, revision)], lambda told: done(self._heard(task, told)))
            case Revoke(lease_id=lease_id):
                self._node.leases.pop(lease_id)
                if lease_id in self._ungranted:
                    done(Answered(task))
                    return
                self._change([EndLease(lease_id)], lambda told: done(self._heard(task, told)))

    def _heard(self, task: Task, told: Any, entry: Any = None) -> Event:
        return Unanswered(task, str(told)) if isinstance(told, KVUnavailable) else Answered(task, entry)

    def _change(self, ops: list[Op], done: Callable[[Any], None]) -> None:
        self._submit(lambda: self.journal.change(ops), done)

    def _lease(self, ttl_s: float) -> SimLease:
        lease_id = self._world.random.getrandbits(40) + 1
        lease = self._node.add_lease(LeaseSeen(lease_id, self._world.now_s + ttl_s))
        self._ungranted.add(lease_id)
        self._world.at(ttl_s / RENEWALS_PER_TTL, lambda: self._renew(lease, ttl_s))
        return lease

    def _put(self, task: Put, done: Callable[[Event], None]) -> None:
        lease = self._node.leases.get(task.lease_id)
        if task.lease_id and lease is None:
            done(Answered(task, None))
            return
        is_first = task.lease_id in self._ungranted
        ttl_s = self._world.ttl_s if is_first else 0.0
        op = PutKey(task.key, task.value, task.if_revision, task.lease_id, ttl_s)

        def heard(told: KVUnavailable | tuple[Result, ...]) -> None:
            entry = None if isinstance(told, KVUnavailable) else entry_of(op, told[0])
            if is_first and (entry is not None or isinstance(told, KVUnavailable)):
                self._ungranted.discard(task.lease_id)
                if entry is not None and lease is not None:
                    lease.count_from(self._unwritten_s, ttl_s)
            done(self._heard(task, told, entry))

        self._change([op], heard)

    # --- leases

    def _renew(self, lease: SimLease, ttl_s: float) -> None:
        """As `Lease._keep_alive` with `BucketKV._renew`."""
        node, lease_id = self._node, lease.seen.lease_id
        if not node.alive or lease.seen.lost or lease_id not in node.leases:
            return
        if node.frozen:
            self._world.at(0.01, lambda: self._renew(lease, ttl_s))
            return
        if lease_id in self._ungranted:
            if not self._queue:  # else what brings it into a version is on its way
                self._ungranted.discard(lease_id)
                self._change([GrantLease(lease_id, ttl_s)], lambda told: None)
            self._world.at(0.1, lambda: self._renew(lease, ttl_s))
            return
        sent_s = self._world.now_s
        beat = Overwrite(beat_name(lease_id), f"{node.name} {next(self._beats)}".encode())
        heard: list[Any] = []

        def hear(told: Any) -> None:
            is_first = all(isinstance(before, KVUnavailable) for before in heard)
            heard.append(told)
            if is_first and (not isinstance(told, KVUnavailable) or len(heard) == 2):
                self._renewed(lease, ttl_s, sent_s, told)

        def ask() -> None:  # as `hedged`
            if node.alive and (not heard or isinstance(heard[0], KVUnavailable)):
                self._objects.ask(beat, lambda: node.reaches_store, hear)

        ask()
        self._world.at(HEDGE_FRACTION * ttl_s, ask)

    def _renewed(self, lease: SimLease, ttl_s: float, sent_s: float, told: Any) -> None:
        node, now_s, before = self._node, self._world.now_s, lease.seen
        if not node.alive:
            return
        if node.frozen:
            self._world.at(0.01, lambda: self._renewed(lease, ttl_s, sent_s, told))
            return
        pause_s = ttl_s / RENEWALS_PER_TTL
        if isinstance(told, KVUnavailable):
            since_s = sent_s if before.silent_since_s is None else before.silent_since_s
            lost = now_s >= before.deadline_s
            lease.seen = LeaseSeen(before.lease_id, before.deadline_s, lost, since_s, "no answer")
            pause_s = max(0.0, 0.2 - (now_s - sent_s))
        elif now_s < before.deadline_s and before.lease_id in self.journal.state.leases():
            lease.seen = LeaseSeen(before.lease_id, max(before.deadline_s, sent_s + ttl_s))
        else:
            lease.seen = dataclasses.replace(before, lost=True)
        lease.renewed = True
        if now_s > self._looked_s + self._world.slow_s:
            self._look()
        self._world.at(pause_s, lambda: self._renew(lease, ttl_s))

    def _mind_leases(self) -> None:
        """As `BucketKV._mind_leases`."""
        node, leases = self._node, self.journal.state.leases()
        if not node.alive:
            return
        period_s = min(leases.values(), default=self._world.ttl_s) / CHECKS_PER_TTL
        if node.frozen or not leases:
            self._world.at(period_s, self._mind_leases)
            return
        own = [lease_id for lease_id, lease in node.leases.items() if not lease.seen.lost]
        looked = self._judge.begin(leases, own, self._world.now_s)
        asked_s = self._world.now_s
        reads = Together(tuple(Read(beat_name(lease_id)) for lease_id in looked))
        if not looked:
            self._world.at(period_s, self._mind_leases)
            return
        self._objects.ask(
            reads, lambda: node.reaches_store, lambda told: self._judged(leases, looked, asked_s, told, period_s)
        )

    def _judged(
        self, leases: dict[int, float], looked: list[int], asked_s: float, told: list[Any], period_s: float
    ) -> None:
        if not self._node.alive:
            return
        if self._node.frozen:
            self._world.at(0.01, lambda: self._judged(leases, looked, asked_s, told, period_s))
            return
        for lease_id, content in zip(looked, told, strict=True):
            if not isinstance(content, KVUnavailable):
                self._judge.note(lease_id, content, asked_s, self._world.now_s)
        if ended := self._judge.ended(leases, looked):
            self._world.note(f"{self._node.name} ends the leases {ended}")
            self._change([EndLease(lease_id) for lease_id in ended], lambda told: None)
        next_s = min(asked_s + period_s, max(self._world.now_s + QUICK_S, self._judge.due_s(leases)))
        self._world.at(max(0.01, next_s - self._world.now_s), self._mind_leases)

    # --- news

    def _poll(self) -> None:
        if not self._node.alive:
            return
        since_s = 0.0 if self.trouble else self._world.now_s - self._news_s
        self._world.at(min(max(QUICK_S, SLOWS_DOWN * since_s), self._world.slow_s), self._poll)
        self._look()

    def _look(self) -> None:
        if self._node.frozen or self._queue:
            return

        def looked(told: Any) -> None:
            self.trouble = str(told) if isinstance(told, KVUnavailable) else ""
            if not self.trouble:
                self._looked_s = self._world.now_s
            self._node.expect_news()

        self._submit(self.journal.peek, looked)

    def list(self, prefix: str) -> Snapshot:
        """What is known by now; a real client looks first."""
        if not math.isfinite(self._looked_s) or not self._node.reaches_store:
            raise KVUnavailable(self.trouble or "not looked yet")
        return self.journal.state.list(prefix)

    def watch(self, prefix: str, from_revision: int) -> SimBucketWatch:
        """As `KV.watch`."""
        return SimBucketWatch(self, prefix, from_revision)


class SimBucketWatch:
    """What is known to have happened since; it never waits."""

    def __init__(self, bucket: SimBucket, prefix: str, from_revision: int) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._from_revision = from_revision

    def next(self, timeout_s: float) -> tuple[WatchEvent, ...]:
        journal = self._bucket.journal
        found = journal.events(self._prefix, self._from_revision)
        if found:
            self._from_revision = found[-1].revision + 1
        elif self._bucket.trouble:
            raise KVUnavailable(self._bucket.trouble)
        return found

    def cancel(self) -> None:
        pass
