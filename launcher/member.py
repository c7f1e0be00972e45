"""One node's part in the membership: keeps its record, watches everybody's, and carries out `decide`'s answers.

The thin edge around `membership`. A thread of its own follows the store; the agent reads what it needs from local
state (no call to the store in its monitor loop) and is woken by `wait`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
import uuid

from launcher.errors import Compacted, JobClosed, KVUnavailable
from launcher.events import Emit
from launcher.forming import Planner
from launcher.keeper import RecordKeeper
from launcher.kv import KV, Watch, WatchEvent
from launcher.membership import Breakage, Evict, Propose, Rules, Wait, breakage, decide
from launcher.neighbours import Neighbours, watched_by
from launcher.records import LEFT, SUCCEEDED, Failure, Node, Round, Status
from launcher.roster import NODES, ROUND, STORE, Departure, Roster, run_prefix

log = logging.getLogger(__name__)

_TICK_S = 1.0
_RETRY_S = 0.2


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
        self._planner = planner
        self._emit = emit
        self._changed = threading.Condition(threading.RLock())
        own_key = f"{self._prefix}{NODES}{node.node_id}"
        self._own = RecordKeeper(kv, own_key, node, self._changed, lease_ttl_s=lease_ttl_s)
        self._roster = Roster(node.node_id, uuid.uuid4().hex, time.monotonic())
        self._stale = False  # what was learnt is not to be relied on: list again
        self._why = ""
        self._stopping = threading.Event()
        self._neighbours = Neighbours(self.evict)
        self._watch: Watch | None = None
        self._thread = threading.Thread(target=self._follow, name="member-follow", daemon=True)

    # --- what the agent reads

    @property
    def node_id(self) -> str:
        """This node's id."""
        return self._own.record.node_id

    def round(self) -> Round | None:
        """The current round."""
        with self._changed:
            return self._roster.round

    def nodes(self) -> tuple[Node, ...]:
        """The live nodes."""
        with self._changed:
            return tuple(self._roster.nodes.values())

    def broken(self, generation: int) -> Breakage | None:
        """Why the workers of `generation` cannot go on, or None while they can."""
        with self._changed:
            if self.fenced():
                return Breakage("this node's lease ended", graceful=False)
            if self._roster.round is None or self._roster.round.generation != generation:
                return Breakage("another round was formed", graceful=False)
            if self._roster.round.outcome and self._roster.round.outcome != SUCCEEDED:
                return Breakage(f"the job is closed: {self._roster.round.outcome}", graceful=False)
            return breakage(self._roster.view())

    def all_stop(self, generation: int) -> bool:
        """Whether no participant's workers of `generation` need one another any more."""
        with self._changed:
            if self._roster.round is None or self._roster.round.generation != generation:
                return True
            nodes = [self._roster.nodes.get(p.node_id) for p in self._roster.round.participants]
            return all(n is None or n.status in (Status.STOPPING, Status.READY) for n in nodes)

    def stop_requested(self, generation: int) -> str:
        """Why the workers of `generation` should stop at their next step boundary; "" if they should not."""
        with self._changed:
            return self._roster.round.stop if self._roster.round and self._roster.round.generation == generation else ""

    def outcome(self) -> str:
        """How the job ended, "" while it has not."""
        with self._changed:
            return self._roster.round.outcome if self._roster.round else ""

    def fenced(self) -> bool:
        """Whether this node must not run workers: its lease ended, or is so near its end that it cannot be saved.

        Workers are killed on this, before anybody else can see the lease end and start them elsewhere.
        """
        return self._own.fenced()

    def wait(self, timeout_s: float) -> None:
        """Sleep until something changed, at most `timeout_s`."""
        with self._changed:
            self._changed.wait(timeout_s)

    def wait_round(self, timeout_s: float | None = None) -> Round:
        """Wait for a round of a generation this node has not joined and in which it takes part.

        Raises:
            JobClosed: the job ended first.
            TimeoutError: there was none within `timeout_s`.
        """
        ends_s = None if timeout_s is None else time.monotonic() + timeout_s
        told = ""
        with self._changed:
            while True:
                current = self._roster.round
                if current is not None and current.outcome:
                    raise JobClosed(current.outcome)
                if (
                    current is not None
                    and current.generation > self._own.record.generation
                    and current.place_of(self.node_id) is not None
                    and not self.fenced()
                    and breakage(self._roster.view()) is None
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

    def announce(self, status: Status, *, reason: str = "", failure: Failure | None = None) -> None:
        """Change this node's record. Never waits for the store: a thread writes it, and tries until it is written.

        Reason and failure stay on the record until the node runs again: the leader reads them when it forms the
        next round.
        """
        with self._changed:
            record = self._own.record
            self._own.change(status=status, reason=reason or record.reason, failure=failure or record.failure)
        if status in (Status.STOPPING, Status.READY):
            self._neighbours.watch(())

    def join(self, generation: int, timeout_s: float) -> None:
        """Say that this node joins `generation`; workers may start when this returns.

        It returns once the store has shown the record to this node too. Changes come in one order, so the node has then
        seen every one before its own, and whoever sees a later one knows that this node runs: the leader cannot take
        it for one that still waits and form another round beside its workers.

        Raises:
            TimeoutError: the round broke first, or the store does not answer.
        """
        ends_s = time.monotonic() + timeout_s
        with self._changed:
            self._own.change(status=Status.RUNNING, generation=generation, reason="", failure=None)
            while not self._shows_running(generation):
                if broken := self.broken(generation):
                    raise TimeoutError(broken.reason)
                left_s = ends_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(f"generation {generation} not joined within {timeout_s:g} s ({self._why})")
                self._changed.wait(min(left_s, _TICK_S))
            if broken := self.broken(generation):
                raise TimeoutError(broken.reason)
            names = watched_by(self._roster.round, self.node_id) if self._roster.round else []
            watched = [self._roster.nodes[name] for name in names if name in self._roster.nodes]
        self._neighbours.watch(watched)

    def _shows_running(self, generation: int) -> bool:
        seen = self._roster.nodes.get(self.node_id)
        return seen is not None and seen.status is Status.RUNNING and seen.generation == generation

    def drain(self, reason: str) -> None:
        """Ask for this node to be let go at the next step boundary."""
        self._own.change(draining=True, reason=reason)

    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._own.record.draining

    def evict(self, node_id: str, reason: str) -> None:
        """Delete another node's record ahead of its lease: it is known to be dead."""
        with self._changed:
            if not self._roster.presume_lost(node_id, reason):
                return
        with contextlib.suppress(KVUnavailable):
            self._kv.delete(f"{self._prefix}{NODES}{node_id}")

    def publish_store(self, generation: int, address: str) -> None:
        """Tell the other nodes where the worker store of `generation` listens.

        Raises:
            KVUnavailable: the store does not answer, or another node has just published.
        """
        with self._changed:
            revision = self._roster.store_revision
        value = f"{generation} {address}".encode()
        if self._kv.put(f"{self._prefix}{STORE}", value, if_revision=revision, lease=self._own.lease) is None:
            raise KVUnavailable("another node published a worker store meanwhile")

    def wait_store(self, generation: int, timeout_s: float) -> str:
        """The address that `publish_store` told.

        Raises:
            TimeoutError: the round broke first, or nothing was published within `timeout_s`.
        """
        ends_s = time.monotonic() + timeout_s
        with self._changed:
            while self._roster.store is None or self._roster.store[0] != generation:
                if broken := self.broken(generation):
                    raise TimeoutError(broken.reason)
                left_s = ends_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(f"no worker store within {timeout_s:g} s")
                self._changed.wait(min(left_s, _TICK_S))
            return self._roster.store[1]

    def is_spare(self) -> bool:
        """Whether a round runs well without this node."""
        with self._changed:
            current = self._roster.round
            return (
                current is not None
                and current.place_of(self.node_id) is None
                and self.broken(current.generation) is None
            )

    # --- life

    def start(self) -> None:
        """Join: write this node's record under a lease and follow the others.

        Raises:
            KVUnavailable: the store does not answer.
        """
        self._register(first=True)
        self._relist()
        self._thread.start()
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
        self._neighbours.close()
        if self._watch is not None:
            self._watch.cancel()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self._own.stop()
        self._own.leave()

    # --- the thread

    def _register(self, *, first: bool = False) -> None:
        record = self._own.register(first=first)
        self._stale = True
        self._emit("node_joined", generation=record.generation, slots=record.slots)

    def _follow(self) -> None:
        """Turn after turn, whatever happens in one: a node whose thread ended would look alive and hear nothing."""
        while not self._stopping.is_set():
            try:
                self._turn()
            except KVUnavailable as error:
                if self._told_why(f"the store does not answer: {error}"):
                    log.warning("[%s] %s", self.node_id, error)
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
        if self.fenced() and self._own.record.status is Status.READY:
            self._register()  # the workers are stopped: come back as a new, youngest node
            log.warning("[%s] the lease had ended; joined anew", self.node_id)
        if self._stale:
            self._relist()
        wake_s = self._act()
        if self._watch is not None and wake_s > 0:
            self._apply(self._watch.next(wake_s))

    def _told_why(self, why: str) -> bool:
        """Note what is waited for; whether that is news."""
        with self._changed:
            news = why != self._why
            self._why = why
            if news:
                self._changed.notify_all()
            return news

    def _relist(self) -> None:
        listing = self._kv.list(self._prefix)
        entries = [(entry.key.removeprefix(self._prefix), entry) for entry in listing.entries]
        with self._changed:
            self._tell(self._roster.replace(entries, time.monotonic()))
            if self._watch is not None:
                self._watch.cancel()
            self._watch = self._kv.watch(self._prefix, listing.revision + 1)
            self._stale = False

    def _apply(self, events: tuple[WatchEvent, ...]) -> None:
        changes = [(event.key.removeprefix(self._prefix), event.entry) for event in events]
        if changes:
            with self._changed:
                self._tell(self._roster.apply(changes, time.monotonic()))

    def _tell(self, departures: list[Departure]) -> None:
        current = self._roster.round
        generation = current.generation if current else 0
        for gone in departures:
            if gone.node_id == self.node_id:
                self._own.fence()
                self._emit("node_fenced", generation=generation, reason=gone.how)
            elif gone.how == LEFT:
                self._emit("node_left", generation=generation, node_left=gone.node_id)
            else:
                self._emit("node_lost", generation=generation, node_lost=gone.node_id, reason=gone.how)
        self._changed.notify_all()

    def _act(self) -> float:
        """Carry out what `decide` says; seconds until it has to be asked again."""
        with self._changed:
            now_s = time.monotonic()
            view = self._roster.view()
            revision = self._roster.round_revision
            action = decide(view, self.rules, self._planner, now_s)
        if isinstance(action, Wait):
            self._told_why(action.why)
        match action:
            case Wait(until_s=None):
                return _TICK_S
            case Wait(until_s=float(until_s)):
                return min(_TICK_S, max(0.0, until_s - now_s))
            case Evict(node_id, reason):
                self.evict(node_id, reason)
                return _RETRY_S  # the watch tells that it is gone
            case Propose(proposed):
                self._propose(proposed, view.round, revision)
        return 0.0

    def _propose(self, proposed: Round, current: Round | None, revision: int) -> None:
        written = self._kv.put(f"{self._prefix}{ROUND}", proposed.to_json(), if_revision=revision)
        if written is None:
            log.info("[%s] another node was first to change the round", self.node_id)
            self._relist()
            return
        with self._changed:
            self._roster.learn_round(proposed, written.revision, time.monotonic())
            self._changed.notify_all()
        self._report(proposed, current)

    def _report(self, proposed: Round, current: Round | None) -> None:
        if proposed.outcome:
            self._emit("finished", generation=proposed.generation, outcome=proposed.outcome)
        elif current is not None and proposed.generation == current.generation:
            self._emit("stop_requested", generation=proposed.generation, reason=proposed.stop)
        else:
            self._emit(
                "round_formed",
                generation=proposed.generation,
                reason=proposed.reason,
                world_size=proposed.world_size,
                restarts=proposed.restarts,
                participants=[dataclasses.asdict(p) for p in proposed.participants],
                spares=list(proposed.spares),
                mesh=dataclasses.asdict(proposed.mesh) if proposed.mesh else None,
            )
