"""One node's part in the job as its agent sees it: local state to read, wishes to utter, and a wait for changes.

No call here waits for the store (`start` and `others` apart): what the agent reads was followed meanwhile, and what it
says is carried out by the threads of a `NodeDriver`.
"""

from __future__ import annotations

import logging
import time
import uuid

from launcher.coordination.driver import NodeDriver
from launcher.drain.draining import DrainOrder
from launcher.errors import Drained, JobClosed, KVUnavailable
from launcher.events import Emit, EventName
from launcher.kv import KV, Lease, Prefixed
from launcher.node.board import run_prefix
from launcher.node.engine import NodeEngine
from launcher.node.events import (
    Announced,
    Draining,
    HeldBack,
    Joining,
    Leaving,
    PeerDead,
    PeersDoubted,
    PeerSilent,
    Started,
)
from launcher.rounds.formation import Planner
from launcher.rounds.membership import Rules
from launcher.rounds.records import Breakage, Failure, Node, Round, Status

log = logging.getLogger(__name__)

_TICK_S = 1.0
_START_TIMEOUT_S = 10.0
_CROWDED_START_TIMEOUT_S = 60.0  # more, as long as nothing was refused: hundreds of nodes may be writing at once
_LEAVE_TIMEOUT_S = 15.0


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
        self.node_id, self.zone, self.address = node.node_id, node.zone, node.address
        self._kv = Prefixed(kv, run_prefix(run_id))
        self._emit = emit
        self._engine = NodeEngine(node, rules, lease_ttl_s=lease_ttl_s, lineage=uuid.uuid4().hex)
        self._driver = NodeDriver(self._engine, self._kv, planner, emit)
        self._feed, self._read = self._driver.feed, self._driver.read

    # --- what the agent reads

    def lease(self) -> Lease | None:
        """The lease that this node's record lives under; what must go with this node is put under it too."""
        return self._driver.lease()

    def round(self) -> Round | None:
        """The current round."""
        return self._read(lambda engine, now_s: engine.board.round)

    def broken(self, generation: int) -> Breakage | None:
        """Why the workers of `generation` cannot go on, or None while they can."""
        return self._read(lambda engine, now_s: engine.view.broken(generation, now_s))

    def all_stop(self, generation: int) -> bool:
        """Whether no participant's workers of `generation` need one another any more."""
        return self._read(lambda engine, now_s: engine.view.all_stopped(generation))

    def stop_requested(self, generation: int) -> str:
        """Why the workers of `generation` should stop at their next step boundary; "" if they should not."""
        return self._read(lambda engine, now_s: engine.view.stop_requested(generation))

    def outcome(self) -> str:
        """How the job ended, "" while it has not."""
        return self._read(lambda engine, now_s: engine.view.outcome)

    def fenced(self) -> bool:
        """Whether this node must not run workers: its lease ended, or is so near its end that it cannot be saved.

        Workers are killed on this, before anybody else can see the lease end and start them elsewhere.
        """
        return self._read(lambda engine, now_s: engine.view.fenced(now_s))

    def store_silent(self) -> bool:
        """Whether the store has been silent for so long that workers should save, before this node is fenced."""
        return self._read(lambda engine, now_s: engine.own.store_silent(now_s))

    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._read(lambda engine, now_s: engine.own.record.draining)

    def drain_order(self) -> DrainOrder | None:
        """The order of `elastic-moe drain` that names this node."""
        return self._read(lambda engine, now_s: engine.view.drain_order())

    def is_spare(self) -> bool:
        """Whether a round runs well without this node."""
        return self._read(lambda engine, now_s: engine.view.is_spare(now_s))

    # --- what it waits for

    def wait(self, timeout_s: float) -> None:
        """Sleep until something changed, at most `timeout_s`."""
        self._driver.wait(timeout_s)

    def wait_round(self, timeout_s: float | None = None) -> Round:
        """Wait for a round of a generation this node has not joined and in which it takes part.

        Raises:
            JobClosed: the job ended first.
            Drained: `drain` was called.
            TimeoutError: there was none within `timeout_s`.
        """
        told = ""

        def look(engine: NodeEngine, now_s: float) -> Round | None:
            nonlocal told
            if engine.view.outcome:
                raise JobClosed(engine.view.outcome)
            if engine.own.record.draining:
                raise Drained(engine.own.record.reason)
            if engine.why != told:
                told = engine.why
                log.info("[%s] waiting: %s", self.node_id, told)
            return engine.view.invitation(now_s)

        if (found := self._driver.wait_for(look, timeout_s)) is None:
            raise TimeoutError(f"no round within {timeout_s:g} s ({self._engine.why})")
        return found

    def join(self, generation: int, timeout_s: float, *, worker_store: str = "") -> Round:
        """Say that this node joins `generation`, and wait until all have; workers may start when this returns.

        `worker_store` is what the node of rank 0 says: "ADDRESS PORT" where the workers meet. It is in the round that
        is returned.

        Raises:
            TimeoutError: the round broke first, or the store does not answer.
        """

        def look(engine: NodeEngine, now_s: float) -> Round | None:
            if broken := engine.view.broken(generation, now_s):
                raise TimeoutError(broken.reason)
            current = engine.board.round
            return current if current and current.complete else None

        self._feed(Joining(generation, worker_store))
        if (joined := self._driver.wait_for(look, timeout_s)) is None:
            why = self._engine.why
            raise TimeoutError(f"generation {generation} not joined by all within {timeout_s:g} s ({why})")
        return joined

    def stay_out(self, reason: str, seconds: float) -> None:
        """Say why this node cannot take part, and wait; the others go on without it. Ends early if the job does."""
        log.warning("[%s] stays out for %g s: %s", self.node_id, seconds, reason)
        generation = self._read(lambda engine, now_s: engine.own.record.generation)
        self._emit(EventName.WORKERS_STORE_UNREACHABLE, generation=generation, reason=reason, seconds=seconds)
        self.hold_back(reason)  # which also stands if this node is fenced meanwhile and registers anew
        ends_s = time.monotonic() + seconds
        while (left_s := ends_s - time.monotonic()) > 0 and not self.outcome() and not self.draining():
            self.wait(min(left_s, _TICK_S))
        self.hold_back("")

    # --- what it says

    def announce(
        self, status: Status, *, reason: str = "", failure: Failure | None = None, yielded: bool = False
    ) -> None:
        """Change this node's record. Never waits for the store: a thread writes it, and tries until it is written.

        Reason, failure and `yielded` stay on the record until the node runs again: the leader reads them when it forms
        the next round.
        """
        self._feed(Announced(status, reason, failure, yielded))

    def drain(self, reason: str) -> None:
        """Ask for this node to be let go at the next step boundary; where it waits for a round, it waits no longer."""
        self._feed(Draining(reason))

    def hold_back(self, unfit: str) -> None:
        """Say that this node is not fit to take part in rounds, and why; "" once it is."""
        self._feed(HeldBack(unfit))

    def evict(self, node_id: str, reason: str) -> None:
        """Delete another node's record ahead of its lease: it is known to be dead."""
        self._feed(PeerDead(node_id, reason))

    def cannot_reach(self, node_id: str) -> None:
        """Tell the leader that a participant of the round does not answer this node."""
        self._feed(PeerSilent(node_id))

    def doubt_peers(self) -> None:
        """Find out whether a peer has died: a worker failed in a way that this would explain."""
        self._feed(PeersDoubted())

    # --- life

    def start(self, unfit: str = "") -> None:
        """Join: write this node's record under a lease and follow the others.

        Args:
            unfit: as `hold_back` would tell it.

        Raises:
            KVUnavailable: the store does not answer.
        """
        self._driver.start()
        self._feed(Started(unfit))
        for timeout_s in (_START_TIMEOUT_S, _CROWDED_START_TIMEOUT_S):
            is_in = self._driver.wait_for(lambda engine, now_s: engine.own.registered_revision or None, timeout_s)
            why = self._read(lambda engine, now_s: engine.own.why)
            if is_in or why:
                break
        if is_in is None:
            self._driver.close()
            raise KVUnavailable(why or "the store does not answer")

    def leave(self) -> None:
        """Leave at once: the record says so and goes, with its lease."""
        self._feed(Leaving())
        self._driver.wait_for(lambda engine, now_s: engine.has_left or None, _LEAVE_TIMEOUT_S)
        self._driver.close()
