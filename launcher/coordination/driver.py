"""Drives a node's engine: threads that feed events in and carry effects out. Nothing is decided here.

One object owns the lock: an event is taken in under it, which asks nobody and takes no time. The threads: one follows
the store's keys, one tells the engine when its time has come, one carries out what concerns this node's record, and
one, where it is needed, what concerns the job; so what the store holds up in one place is not waited for in another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from launcher.coordination.lane import LaneThread
from launcher.errors import KVUnavailable
from launcher.events import Emit
from launcher.health.liveness import report_dead
from launcher.health.peers import PeerWatch
from launcher.kv import KV, Changes, Follower, Lease, Snapshot
from launcher.lifecycle import Lifecycle
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
    Listed,
    PeerAlive,
    PeerDead,
    PeerSilent,
    Tick,
    Unanswered,
    Unheard,
)
from launcher.rounds.formation import Planner
from launcher.rounds.membership import decide

log = logging.getLogger(__name__)

R = TypeVar("R")

_WAIT_S = 1.0
_RETRY_S = 0.2
_CLOSE_TIMEOUT_S = 5.0


class _Held:
    """A lease of this node's, and how it stood when it was last looked at."""

    def __init__(self, number: int, lease: Lease) -> None:
        self.lease = lease
        self.seen = LeaseSeen(number, lease.deadline_s)

    def look(self) -> bool:
        """Look at it; returns whether something has changed."""
        before, silence = self.seen, self.lease.silence
        stands = LeaseSeen(before.lease_id, self.lease.deadline_s, self.lease.lost.is_set())
        self.seen = (
            stands
            if silence is None
            else dataclasses.replace(
                stands,
                silent_since_s=silence.since_s,
                silence=silence.reason,
                stands=silence.stands,
                host=silence.host,
                refused=silence.refused,
            )
        )
        return self.seen != before


class NodeDriver(Lifecycle):
    """`start` first, `close` last; the other methods may be called from any thread."""

    def __init__(self, engine: NodeEngine, kv: KV, planner: Planner, emit: Emit) -> None:
        """`kv` is a view of the run's keys; `planner` plans the mesh of each round."""
        self._engine = engine
        self._kv = kv
        self._planner = planner
        self._emit = emit
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # of what the agent may see
        self._due = threading.Condition(self._lock)  # of when the engine wants to be asked
        self._sleeps_until_s = -math.inf
        self._leases: dict[int, _Held] = {}
        self._lease_numbers = itertools.count(1)
        self._reports: deque[Report] = deque()  # not yet told
        self._telling = threading.Lock()  # whoever holds it tells
        self._follower: Follower | None = None
        self._following = 0
        self._retired: deque[Follower] = deque()  # to be closed
        self._refollow = threading.Event()
        self._logged = ""
        self._has_failed = False  # the last step
        self._num_changes = self._num_changes_seen = 0
        self._closing = threading.Event()
        self._lanes = {lane: LaneThread(f"node-{lane.name.lower()}", self._carry_out) for lane in Lane}
        self._peers = PeerWatch(self._peer_died, lambda node_id: self.feed(PeerSilent(node_id)))
        self._threads = [
            threading.Thread(target=self._follow, name="node-follow", daemon=True),
            threading.Thread(target=self._keep_time, name="node-clock", daemon=True),
        ]

    def start(self) -> None:
        """Start the threads."""
        self._peers.start()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop the threads; what is under way may still be carried out. Leases end by themselves."""
        self._closing.set()
        self._refollow.set()
        with self._lock:
            self._due.notify_all()
            self._changed.notify_all()
            if self._follower is not None:
                self._follower.close()
        self._peers.close()
        for lane in self._lanes.values():
            lane.close(_CLOSE_TIMEOUT_S)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_CLOSE_TIMEOUT_S)
        with self._lock:
            for held in self._leases.values():
                held.lease.stop()
        if self._telling.acquire(timeout=_CLOSE_TIMEOUT_S):  # a thread that nobody waits for may be at it
            self._tell_reports()
            self._telling.release()

    # --- events in

    def feed(self, event: Event) -> None:
        """Have the engine take an event in, and carry out what follows. Waits for nobody."""
        with self._lock:
            self._look_at_leases()
            self._step(event)
        self._finish()

    def read(self, look: Callable[[NodeEngine, float], R]) -> R:
        """Return what `look(engine, now_s)` finds, with what is known of the lease as of this moment."""
        with self._lock:
            self._look_at_leases()
            found = look(self._engine, time.monotonic())
        self._finish()
        return found

    def wait(self, timeout_s: float) -> None:
        """Sleep until something changed that the agent may see, at most `timeout_s`; not at all if something has since
        the last call, which the agent may have missed."""
        with self._changed:
            if self._num_changes == self._num_changes_seen:
                self._changed.wait(timeout_s)
            self._num_changes_seen = self._num_changes

    def wait_for(self, look: Callable[[NodeEngine, float], R | None], timeout_s: float | None) -> R | None:
        """Return what `look(engine, now_s)` finds once it finds something; None after `timeout_s`, or once closed."""
        ends_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                self._look_at_leases()
                now_s = time.monotonic()
                found = look(self._engine, now_s)
                if found is None and now_s < ends_s and not self._closing.is_set():
                    self._changed.wait(min(_WAIT_S, ends_s - now_s))
                    now_s = -math.inf
            self._finish()
            if found is not None or now_s >= ends_s or self._closing.is_set():
                return found

    def lease(self) -> Lease | None:
        """Return the lease that this node's record lives under."""
        with self._lock:
            held = self._engine.own.lease
            return self._leases[held.lease_id].lease if held and held.lease_id in self._leases else None

    def _step(self, event: Event) -> None:
        """Take an event in. The lock is held."""
        before = self._engine.visible
        try:
            effects = self._engine.step(event, time.monotonic())
        except Exception:
            log.exception("[%s] unexpected error at %s, listing anew", self._engine.node_id, type(event).__name__)
            effects = self._engine.recover()
            self._has_failed = True
        for effect in effects:
            try:
                self._dispatch(effect)
            except Exception:  # no thread can be started, say: what else is to be done still is
                log.exception("[%s] not done: %s", self._engine.node_id, type(effect).__name__)
        if self._engine.visible != before:
            self._num_changes += 1
            self._changed.notify_all()
        if self._engine.due_s < self._sleeps_until_s:
            self._due.notify()

    def _look_at_leases(self) -> None:
        """Tell the engine how its leases stand: they renew themselves, on threads of their own. The lock is held."""
        if changed := tuple(held.seen for held in self._leases.values() if held.look()):
            self._step(LeasesSeen(changed))

    def _finish(self) -> None:
        """Do what may take a while, which is why the lock is not held."""
        with contextlib.suppress(IndexError):  # another thread is at it, too
            while self._retired:
                self._retired.popleft().close()
        # In the order in which the steps found them: one thread at a time, which tells what others bring meanwhile.
        while self._reports and self._telling.acquire(blocking=False):
            try:
                self._tell_reports()
            finally:
                self._telling.release()

    def _tell_reports(self) -> None:
        while self._reports:
            report = self._reports.popleft()
            try:
                self._emit(report.event, generation=report.generation, **report.fields)
            except Exception:  # the thread that came by would end
                log.exception("[%s] %s is not told", self._engine.node_id, report.event)

    # --- effects out

    def _dispatch(self, effect: Effect) -> None:
        """Begin to carry an effect out. The lock is held, so nothing here waits for anybody."""
        match effect:
            case Task():
                self._lanes[effect.lane].put(effect)
            case Abandon(lease_id):
                self._leases.pop(lease_id).lease.stop()
            case Follow(number, prefix):
                if self._follower is not None:
                    self._retired.append(self._follower)
                self._following, self._follower = number, Follower(self._kv, prefix)
                self._refollow.set()
            case WatchPeers(peers):
                self._peers.watch(peers)
            case Ring(peers):
                report_dead(peers, self._peer_died, lambda node_id: self.feed(PeerAlive(node_id)))
            case Report():
                self._reports.append(effect)

    def _peer_died(self, node_id: str, reason: str) -> None:
        self.feed(PeerDead(node_id, reason))

    def _carry_out(self, task: Task) -> None:
        try:
            answer = self._answer(task)
        except Exception as error:  # noqa: BLE001 (a lane whose thread ended would hold everything up)
            answer = Unanswered(task, self._why(error))
        self.feed(answer)

    def _answer(self, task: Task) -> Event:
        match task:
            case Grant(ttl_s=ttl_s):
                held = _Held(next(self._lease_numbers), self._kv.lease(ttl_s))
                with self._lock:
                    self._leases[held.seen.lease_id] = held
                    if self._closing.is_set():
                        held.lease.stop()
                return Granted(task, held.lease.ttl_s, held.seen)
            case Get(key=key):
                return Answered(task, self._kv.get(key))
            case Put(lease_id=0):
                return Answered(task, self._kv.put(task.key, task.value, if_revision=task.if_revision))
            case Put(lease_id=lease_id):
                with self._lock:
                    under = self._leases.get(lease_id)
                if under is None:  # it was given up meanwhile: the store would say the same
                    return Answered(task, None)
                put = self._kv.put(task.key, task.value, if_revision=task.if_revision, lease=under.lease)
                return Answered(task, put)
            case Delete(key=key, if_revision=revision):
                self._kv.delete(key, if_revision=revision)
            case Revoke(lease_id=lease_id):
                with self._lock:
                    revoked = self._leases.pop(lease_id)
                revoked.lease.revoke()
            case Decide(view=view, rules=rules):
                began_s = time.thread_time()
                action = decide(view, rules, self._planner, time.monotonic())
                return Decided(task, action, time.thread_time() - began_s, time.time())
        return Answered(task)

    def _why(self, error: Exception) -> str:
        """Say what an error says; log it once, since what the store refuses now, it refuses five times a second."""
        if isinstance(error, KVUnavailable):
            return str(error)
        why = f"{type(error).__name__}: {error}"
        if why != self._logged:
            self._logged = why
            log.error("[%s] unexpected error, trying again", self._engine.node_id, exc_info=error)
        return why

    # --- threads

    def _follow(self) -> None:
        """Hear news after news, whatever happens: a node whose thread ended would look alive and hear nothing."""
        while not self._closing.is_set():
            self._refollow.clear()
            with self._lock:
                number, follower = self._following, self._follower
            if follower is None:
                self._refollow.wait(_WAIT_S)
                continue
            try:
                news = follower.next(_WAIT_S)
            except Exception as error:  # noqa: BLE001
                self.feed(Unheard(self._why(error)))
                self._refollow.wait(_RETRY_S)
                continue
            match news:
                case Snapshot(entries=entries):
                    self.feed(Listed(number, entries))
                case Changes(events=events):
                    self.feed(Changed(number, events))
            if self._has_failed:  # what failed may be in the listing
                self._has_failed = False
                self._closing.wait(_RETRY_S)

    def _keep_time(self) -> None:
        """Tell the engine whenever its time has come."""
        while not self._closing.is_set():
            with self._due:
                now_s = time.monotonic()
                is_due = self._engine.due_s <= now_s
                if not is_due:
                    self._sleeps_until_s = min(self._engine.due_s, now_s + _WAIT_S)
                    self._due.wait(self._sleeps_until_s - now_s)
                    self._sleeps_until_s = -math.inf  # it looks before it sleeps again
            if is_due:
                self.feed(Tick())
