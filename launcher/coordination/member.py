"""One node's part in the membership: keeps its record, follows the round, and leads where nobody does.

The thin edge around `membership`. A thread of its own follows the store; the agent reads what it needs from local
state (no call to the store in its monitor loop) and is woken by `wait`.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from launcher.coordination.candidacy import Candidacy
from launcher.coordination.keeper import RecordKeeper
from launcher.coordination.leading import Office
from launcher.coordination.roster import JOB, NODES, Board, run_prefix
from launcher.drain.draining import DrainOrder
from launcher.errors import Compacted, Drained, JobClosed, KVError, KVUnavailable
from launcher.events import Emit, EventName
from launcher.health.liveness import PeerState, probe
from launcher.health.peers import PeerWatch, watched_by
from launcher.kv import KV, Lease, Watch, WatchEvent
from launcher.rounds.forming import Planner
from launcher.rounds.membership import Rules
from launcher.rounds.records import LEFT, LEFT_AT_ONCE, SUCCEEDED, Breakage, Failure, Node, Round, Status, identity_of

log = logging.getLogger(__name__)

_TICK_S = 1.0
_RETRY_S = 0.2
_START_TIMEOUT_S = 10.0


class Member:
    """A node in the job of one run. `start` first, `leave` last; every method may be called from any thread."""

    def __init__(
        self,
        kv: KV,
        run_id: str,
        node: Node,
        rules: Rules,
        planner: Planner,
        emit: Emit,
        *,
        lease_ttl_s: float,
    ) -> None:
        self.rules = rules
        self._kv = kv
        self._prefix = run_prefix(run_id)
        self._emit = emit
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        own_key = f"{self._prefix}{NODES}{node.node_id}"
        self._own = RecordKeeper(kv, own_key, node, lock, self._changed, emit, lease_ttl_s=lease_ttl_s)
        self._board = Board()
        office = Office(
            kv,
            self._prefix,
            node.node_id,
            rules,
            planner,
            emit,
            may_act=lambda: not self.fenced(),
            evicted=self._own.fence,
            told=self._told_why,
        )
        self._candidacy = Candidacy(office, self._board, self._own, lock)
        self._unanswered = False  # the last turn ended with a store that did not answer
        self._joined = 0  # the last generation of which this node may have started workers
        self._stale = False  # what was learnt is not to be relied on: list again
        self._why = ""
        self._stopping = threading.Event()
        self._peers = PeerWatch(self.evict, self.cannot_reach)
        self._watch: Watch | None = None
        self._thread = threading.Thread(target=self._follow, name="member-follow", daemon=True)

    # --- what the agent reads

    @property
    def node_id(self) -> str:
        """This node's id."""
        return self._own.record.node_id

    def lease(self) -> Lease | None:
        """The lease that this node's record lives under; what must go with this node is put under it too."""
        return self._own.lease

    def round(self) -> Round | None:
        """The current round."""
        with self._changed:
            return self._board.round

    def broken(self, generation: int) -> Breakage | None:
        """Why the workers of `generation` cannot go on, or None while they can."""
        with self._changed:
            if self.fenced():
                return Breakage("this node's lease ended", graceful=False)
            current = self._board.round
            if current is None or current.generation != generation:
                return Breakage("another round was formed", graceful=False)
            if current.outcome and current.outcome != SUCCEEDED:
                return Breakage(f"the job is closed: {current.outcome}", graceful=False)
            return current.broken

    def all_stop(self, generation: int) -> bool:
        """Whether no participant's workers of `generation` need one another any more."""
        with self._changed:
            current = self._board.round
            if current is None or current.generation != generation:
                return True
            return current.broken is not None and current.broken.all_stopped

    def stop_requested(self, generation: int) -> str:
        """Why the workers of `generation` should stop at their next step boundary; "" if they should not."""
        with self._changed:
            current = self._board.round
            return current.stop if current and current.generation == generation else ""

    def outcome(self) -> str:
        """How the job ended, "" while it has not."""
        with self._changed:
            return self._board.round.outcome if self._board.round else ""

    def fenced(self) -> bool:
        """Whether this node must not run workers: its lease ended, or is so near its end that it cannot be saved.

        Workers are killed on this, before anybody else can see the lease end and start them elsewhere.
        """
        return self._own.fenced()

    def store_silent(self) -> bool:
        """Whether the store has been silent for so long that workers should save, before this node is fenced."""
        return self._own.store_silent()

    def wait(self, timeout_s: float) -> None:
        """Sleep until something changed, at most `timeout_s`."""
        with self._changed:
            self._changed.wait(timeout_s)

    def wait_round(self, timeout_s: float | None = None) -> Round:
        """Wait for a round of a generation this node has not joined and in which it takes part.

        Raises:
            JobClosed: the job ended first.
            Drained: `drain` was called.
            TimeoutError: there was none within `timeout_s`.
        """
        ends_s = None if timeout_s is None else time.monotonic() + timeout_s
        told = ""
        with self._changed:
            while True:
                current = self._board.round
                if current is not None and current.outcome:
                    raise JobClosed(current.outcome)
                if self._own.record.draining:
                    raise Drained(self._own.record.reason)
                self._own.stand(current.history.excluded(identity_of(self.node_id)) if current else None)
                if (
                    current is not None
                    and current.generation > self._own.record.generation
                    and current.place_of(self.node_id) is not None
                    and not self.fenced()
                    and not self.store_silent()  # workers would be asked to yield at once, again and again
                    and current.broken is None
                ):
                    return current
                if self._why != told:
                    told = self._why
                    log.info("[%s] waiting: %s", self.node_id, told)
                left_s = None if ends_s is None else ends_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    raise TimeoutError(f"no round within {timeout_s:g} s ({self._why})")
                self._changed.wait(_TICK_S if left_s is None else min(left_s, _TICK_S))

    # --- what the agent says

    def announce(
        self, status: Status, *, reason: str = "", failure: Failure | None = None, yielded: bool = False
    ) -> None:
        """Change this node's record. Never waits for the store: a thread writes it, and tries until it is written.

        Reason, failure and `yielded` stay on the record until the node runs again: the leader reads them when it forms
        the next round.
        """
        with self._changed:
            record = self._own.record
            self._own.change(
                status=status,
                reason=reason or record.reason,
                failure=failure or record.failure,
                yielded=yielded or record.yielded,
            )
        if status in (Status.STOPPING, Status.READY):
            self._peers.watch(())

    def join(self, generation: int, timeout_s: float, *, worker_store: str = "") -> Round:
        """Say that this node joins `generation`, and wait until all have; workers may start when this returns.

        `worker_store` is what the node of rank 0 says: "ADDRESS PORT" where the workers meet. It is in the round that
        is returned.

        Raises:
            TimeoutError: the round broke first, or the store does not answer.
        """
        ends_s = time.monotonic() + timeout_s
        joined: dict[str, Any] = {"status": Status.RUNNING, "generation": generation, "worker_store": worker_store}
        with self._changed:
            self._own.change(**joined, reason="", failure=None, yielded=False, cannot_reach=())
            while True:
                if broken := self.broken(generation):
                    raise TimeoutError(broken.reason)
                current = self._board.round
                if current is not None and current.complete:
                    break
                left_s = ends_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(
                        f"generation {generation} not joined by all within {timeout_s:g} s ({self._why})"
                    )
                self._changed.wait(min(left_s, _TICK_S))
            self._joined = generation
        self._peers.watch(watched_by(current, self.node_id))
        return current

    def stay_out(self, reason: str, seconds: float) -> None:
        """Say why this node cannot take part, and wait; the others go on without it. Ends early if the job does."""
        log.warning("[%s] stays out for %g s: %s", self.node_id, seconds, reason)
        self._emit(
            EventName.WORKERS_STORE_UNREACHABLE, generation=self._own.record.generation, reason=reason, seconds=seconds
        )
        self.hold_back(reason)  # which also stands if this node is fenced meanwhile and registers anew
        ends_s = time.monotonic() + seconds
        while (left_s := ends_s - time.monotonic()) > 0 and not self.outcome() and not self._own.record.draining:
            self.wait(min(left_s, _TICK_S))
        self.hold_back("")

    def drain(self, reason: str) -> None:
        """Ask for this node to be let go at the next step boundary; where it waits for a round, it waits no longer."""
        self._own.change(draining=True, reason=reason)

    def hold_back(self, unfit: str) -> None:
        """Say that this node is not fit to take part in rounds, and why; "" once it is."""
        self._own.hold_back(unfit)

    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._own.record.draining

    def drain_order(self) -> DrainOrder | None:
        """The order of `elastic-moe drain` that names this node."""
        with self._changed:
            return next((o for o in self._board.drain_orders.values() if self.node_id in o.node_ids), None)

    def evict(self, node_id: str, reason: str) -> None:
        """Delete another node's record ahead of its lease: it is known to be dead."""
        log.warning("[%s] node %s is lost: %s", self.node_id, node_id, reason)
        self._emit(EventName.PEER_LOST, generation=self._own.record.generation, peer=node_id, reason=reason)
        try:
            self._candidacy.evict(node_id, reason)
        except KVError as error:
            log.warning("[%s] node %s is left to its lease: %s", self.node_id, node_id, error)

    def cannot_reach(self, node_id: str) -> None:
        """Tell the leader that a participant of the round does not answer this node."""
        with self._changed:
            record, current = self._own.record, self._board.round
            if node_id in record.cannot_reach or current is None or current.place_of(node_id) is None:
                return
            self._own.change(cannot_reach=(*record.cannot_reach, node_id))
        self._emit(EventName.PEER_UNREACHABLE, generation=current.generation, peer=node_id)

    def _ask_again(self) -> None:
        """Take back what was told of participants that answer by now, and of nodes that are none any more."""
        with self._changed:
            told, current = self._own.record.cannot_reach, self._board.round
        named = {p.node_id: p for p in current.participants} if current else {}
        still = [n for n in told if n in named and probe(named[n].address, named[n].port) is PeerState.SILENT]
        with self._changed:
            if self._own.record.cannot_reach == told and self._own.record.status is Status.READY:
                self._own.change(cannot_reach=tuple(still))

    def is_spare(self) -> bool:
        """Whether a round runs well without this node."""
        with self._changed:
            current = self._board.round
            return (
                current is not None
                and current.place_of(self.node_id) is None
                and self.broken(current.generation) is None
            )

    # --- life

    def start(self, unfit: str = "") -> None:
        """Join: write this node's record under a lease and follow the others.

        Args:
            unfit: as `hold_back` would tell it.

        Raises:
            KVUnavailable: the store does not answer.
        """
        self.hold_back(unfit)
        ends_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self._register(first=True)
                break
            except KVUnavailable:  # many nodes may start at once
                if time.monotonic() >= ends_s:
                    raise
                self._stopping.wait(_RETRY_S)
        self._peers.start()
        self._thread.start()  # which lists first
        self._own.start()

    def others(self) -> list[str]:
        """The other live nodes, asked from the store; also after `leave`."""
        prefix = f"{self._prefix}{NODES}"
        try:
            keys = [entry.key.removeprefix(prefix) for entry in self._kv.list(prefix).entries]
        except KVUnavailable as error:
            log.warning("[%s] %s", self.node_id, error)
            return []
        return [node_id for node_id in keys if node_id != self.node_id]

    def leave(self) -> None:
        """Leave at once: the record says so and goes, with its lease."""
        self._stopping.set()
        self._peers.close()
        if self._watch is not None:
            self._watch.cancel()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self._candidacy.leave(LEFT if self._own.record.yielded else LEFT_AT_ONCE)
        self._own.stop()
        self._own.leave()

    # --- the thread

    def _register(self, *, first: bool = False) -> None:
        record = self._own.register(first=first)
        self._stale = True
        self._emit(EventName.NODE_JOINED, generation=record.generation, slots=record.slots)

    def _follow(self) -> None:
        """Turn after turn, whatever happens in one: a node whose thread ended would look alive and hear nothing."""
        while not self._stopping.is_set():
            try:
                self._turn()
                self._unanswered = False
            except KVUnavailable as error:
                if not self._unanswered:
                    log.warning("[%s] %s", self.node_id, error)
                self._unanswered = True
                self._told_why("the store does not answer")
                self._stopping.wait(_RETRY_S)
            except Compacted as error:
                log.warning("[%s] %s: listing anew", self.node_id, error)
                self._stale = True
            except Exception as error:
                self._stale = True
                if self._told_why(f"{type(error).__name__}: {error}"):
                    log.exception("[%s] membership: unexpected error, listing anew", self.node_id)
                self._stopping.wait(_RETRY_S)

    def _turn(self) -> None:
        if self.fenced():
            self._candidacy.withdraw()
            if self._own.record.status in (Status.READY, Status.EXCLUDED):
                self._register()  # the workers are stopped: come back as a new, youngest node
                log.warning("[%s] the lease had ended; joined anew", self.node_id)
        if self._stale:
            self._relist()
        if self._own.record.cannot_reach and self._own.record.status is Status.READY:
            self._ask_again()
        if not self.fenced():
            leader = self._candidacy.stand()
            if leader != self.node_id and not self._unanswered:
                self._told_why(f"node {leader} leads" if leader else "a leader is being chosen")
        if self._watch is not None:
            self._apply(self._watch.next(_TICK_S))

    def _told_why(self, why: str) -> bool:
        """Note what is waited for; whether that is news."""
        with self._changed:
            news = why != self._why
            self._why = why
            if news:
                self._changed.notify_all()
            return news

    def _relist(self) -> None:
        prefix = f"{self._prefix}{JOB}"
        listing = self._kv.list(prefix)
        with self._changed:
            self._board.replace((entry.key.removeprefix(self._prefix), entry) for entry in listing.entries)
            if self._watch is not None:
                self._watch.cancel()
            self._watch = self._kv.watch(prefix, listing.revision + 1)
            self._stale = False
            self._heed()

    def _apply(self, events: tuple[WatchEvent, ...]) -> None:
        if events:
            with self._changed:
                self._board.apply((event.key.removeprefix(self._prefix), event.entry) for event in events)
                self._heed()

    def _heed(self) -> None:
        """Act on what the board says of this node itself."""
        lost = self._board.counts_as_lost(self.node_id, self._own.registered_revision) or self._is_superseded()
        if lost and not self.fenced():
            self._own.fence()
            current = self._board.round
            self._emit(EventName.NODE_FENCED, generation=current.generation if current else 0, reason="taken for lost")
        self._changed.notify_all()

    def _is_superseded(self) -> bool:
        """Whether there is a newer round while this node may still run workers.

        The leader waits for all nodes that it knows to stop theirs: it knows this one no more.
        """
        record, current = self._own.record, self._board.round
        return (
            current is not None
            and record.generation == self._joined < current.generation
            and record.status in (Status.RUNNING, Status.STOPPING, Status.DONE)
        )
