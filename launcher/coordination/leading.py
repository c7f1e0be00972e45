"""What the leader does: follows every node's record, and carries out what `decide` says. One object per term.

Leading is holding the key `job/leader` under one's lease. Two nodes may believe to lead for a moment, when one has not
yet heard that its lease ended; every decision is a compare-and-swap on the round, so only one of them has an effect.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from launcher.coordination.roster import LEASE_ENDED, NODES, ROUND, Departure, Roster
from launcher.coordination.telling import tell
from launcher.errors import Compacted, KVUnavailable
from launcher.events import Emit, EventName
from launcher.health.liveness import report_dead
from launcher.kv import KV, Watch, WatchEvent
from launcher.rounds.forming import Planner
from launcher.rounds.membership import Evict, Propose, Rules, Wait, decide
from launcher.rounds.records import LEFT, LEFT_AT_ONCE, Round

log = logging.getLogger(__name__)

_TICK_S = 1.0
_RETRY_S = 0.2
_REST_FACTOR = 3.0  # so deciding takes about a quarter of a core, however many records change
_LONGEST_REST_S = 0.25


@dataclass(frozen=True)
class Office:
    """What a leader needs of the node that it is. `prefix`: of the run's keys."""

    kv: KV
    prefix: str
    node_id: str
    rules: Rules
    planner: Planner
    emit: Emit
    may_act: Callable[[], bool]
    """Whether this node still holds its lease."""
    evicted: Callable[[], None]
    """This node's own record is gone."""
    told: Callable[[str], object]
    """What is waited for now."""


class Leadership:
    """A term of leading, on a thread of its own. `evict` may be called from any thread."""

    def __init__(self, office: Office, *, grace_s: float, predecessor: Departure | None) -> None:
        """`grace_s`: how long participants that are not there at first are awaited; `predecessor` is not."""
        self._office = office
        self._grace_s = grace_s  # a lease's length
        departed = {predecessor.node_id: predecessor.how} if predecessor else {}
        self._roster = Roster(uuid.uuid4().hex, time.monotonic(), grace_s=grace_s, departed=departed)
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._stale = True
        self._watch: Watch | None = None
        self._began_cpu_s = 0.0  # of the thread, when the last changes had come
        self._thread = threading.Thread(target=self._lead, name="member-lead", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop leading; a decision under way may still be carried out. From any thread, `_lead`'s own included."""
        self._ended.set()
        with self._lock:
            if self._watch is not None:
                self._watch.cancel()

    def join(self, timeout_s: float) -> None:
        """After `end`: wait for the thread."""
        self._thread.join(timeout_s)

    def evict(self, node_id: str, reason: str) -> None:
        """Delete another node's record ahead of its lease: it is known to be dead.

        Raises:
            KVUnavailable
        """
        with self._lock:
            if not self._roster.presume_lost(node_id, reason):
                return
        self._office.kv.delete(f"{self._office.prefix}{NODES}{node_id}")

    def _lead(self) -> None:
        """Turn after turn, whatever happens in one: a leader whose thread ended would hold everybody up."""
        while not self._ended.is_set():
            try:
                self._turn()
            except KVUnavailable as error:
                if self._office.told("the store does not answer"):
                    log.warning("[%s] %s", self._office.node_id, error)
                self._ended.wait(_RETRY_S)
            except Compacted as error:
                log.warning("[%s] %s: listing anew", self._office.node_id, error)
                self._stale = True
            except Exception as error:
                self._stale = True
                log.exception("[%s] membership: unexpected error, listing anew", self._office.node_id)
                self._office.told(f"{type(error).__name__}: {error}")
                self._ended.wait(_RETRY_S)

    def _turn(self) -> None:
        if not self._office.may_act():
            self._ended.wait(_RETRY_S)
            return
        if self._stale:
            self._relist()
        wake_s = self._act()
        if self._watch is not None and wake_s > 0:
            # Hundreds of nodes join one by one, and what a decision takes grows with their number: after one, let as
            # many join as do so meanwhile.
            until_s = time.monotonic() + wake_s
            self._ended.wait(min(wake_s, _LONGEST_REST_S, _REST_FACTOR * (time.thread_time() - self._began_cpu_s)))
            events = self._watch.next(max(0.0, until_s - time.monotonic()))
            self._began_cpu_s = time.thread_time()
            self._apply(events)

    def _relist(self) -> None:
        prefix = self._office.prefix
        listing = self._office.kv.list(prefix)
        entries = [(entry.key.removeprefix(prefix), entry) for entry in listing.entries]
        with self._lock:
            gone = self._roster.replace(entries, time.monotonic())
            if self._watch is not None:
                self._watch.cancel()
            if self._ended.is_set():
                return
            self._watch = self._office.kv.watch(prefix, listing.revision + 1)
            self._stale = False
            current, awaited = self._roster.round, self._roster.awaited
        self._tell(gone)
        if current and awaited:
            report_dead((p for p in current.participants if p.node_id in awaited), self._give_up)

    def _give_up(self, node_id: str, reason: str) -> None:
        with self._lock:
            gone = self._roster.give_up(node_id, reason, time.monotonic())
        self._tell(gone)

    def _apply(self, events: tuple[WatchEvent, ...]) -> None:
        changes = [(event.key.removeprefix(self._office.prefix), event.entry) for event in events]
        now_s = time.monotonic()
        with self._lock:
            gone = self._roster.apply(changes, now_s) if changes else self._roster.settle(now_s)
        self._tell(gone)

    def _tell(self, departures: list[Departure]) -> None:
        current = self._roster.round
        generation = current.generation if current else 0
        emit = self._office.emit
        for gone in departures:
            if gone.node_id == self._office.node_id:
                self._office.evicted()
                emit(EventName.NODE_FENCED, generation=generation, reason=gone.how)
            elif gone.how in (LEFT, LEFT_AT_ONCE):
                emit(EventName.NODE_LEFT, generation=generation, node_left=gone.node_id)
            else:
                silent = {"silent_s": self._grace_s} if gone.how == LEASE_ENDED else {}
                emit(EventName.NODE_LOST, generation=generation, node_lost=gone.node_id, reason=gone.how, **silent)

    def _act(self) -> float:
        """Carry out what `decide` says; seconds until it has to be asked again."""
        with self._lock:
            now_s = time.monotonic()
            view = self._roster.view()
            revision = self._roster.round_revision
        action = decide(view, self._office.rules, self._office.planner, now_s)
        match action:
            case Wait(why, until_s):
                self._office.told(why)
                return _TICK_S if until_s is None else min(_TICK_S, max(0.0, until_s - now_s))
            case Evict(node_id, reason):
                self.evict(node_id, reason)
                return _RETRY_S  # the watch tells that it is gone
            case Propose(proposed):
                self._propose(proposed, view.round, revision)
        return 0.0

    def _propose(self, proposed: Round, current: Round | None, revision: int) -> None:
        if not self._office.may_act():  # deciding may have taken long: a frozen node's view is of before
            return
        if current is None or current.generation != proposed.generation:
            proposed = dataclasses.replace(proposed, formed_ts=round(time.time(), 3))
        written = self._office.kv.put(f"{self._office.prefix}{ROUND}", proposed.to_json(), if_revision=revision)
        if written is None:
            log.info("[%s] another node was first to change the round", self._office.node_id)
            self._stale = True
            return
        with self._lock:
            self._roster.learn_round(proposed, written.revision, time.monotonic())
        tell(self._office.emit, proposed, current)
