"""The agent of a node and its workers, made up: `elastic.agent` is torch's loop around processes.

It reads what `Member` lets it read, says what `MemberRendezvous` and `ElasticAgent` say, and in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.node.events import Announced, Draining, HeldBack, Joining, PeersDoubted, PeerSilent
from launcher.rounds.failures import FailureClass
from launcher.rounds.records import Failure, Round, Status

if TYPE_CHECKING:
    from tests.sim.nodes import SimNode

GRACE_S = 8.0  # from SIGTERM to SIGKILL
STAY_OUT_S = 5.0


class SimAgent:
    """Looks whenever something may have changed. `running`: the generation whose workers run."""

    def __init__(self, node: SimNode) -> None:
        self._node = node
        self._engine = node.engine
        self._world = node.world
        self.running = 0
        self.are_stuck = False
        """The workers neither stop when they are asked to nor on SIGTERM."""
        self._joining = 0
        self._turn = 0  # what was planned for an earlier one is void
        self._is_stopping = False
        self._is_out = False
        self._is_over = False

    def look(self) -> None:
        """What there is to do now."""
        now_s = self._world.now_s
        if self._is_over or self._node.frozen or not self._node.alive:
            return
        if self._is_stopping:
            if self._engine.view.fenced(now_s):  # SIGKILL, at once
                self._stopped()
        elif self.running:
            self._supervise(now_s)
        elif self._joining:
            self._join(now_s)
        elif not self._is_out:
            self._wait(now_s)

    def _wait(self, now_s: float) -> None:
        """As `MemberRendezvous.next_rendezvous`."""
        if self._engine.own.record.draining:
            self._node.leave()
        elif (found := self._engine.view.invitation(now_s)) is not None:
            self._joining = found.generation
            self._later(0.2, lambda: self._node.feed(Joining(found.generation)))

    def _join(self, now_s: float) -> None:
        """As `Member.join`: start nothing before all have."""
        if self._engine.own.record.generation != self._joining:
            return
        current = self._engine.board.round
        if self._engine.view.broken(self._joining, now_s) is not None:
            self._joining = 0
            self._node.feed(Announced(Status.READY))
        elif current is not None and current.complete:
            generation, self._joining = self._joining, 0
            if self._reaches_store_of(current):
                self.running, self.are_stuck = generation, False
            else:
                self._stay_out(current)

    def _reaches_store_of(self, current: Round) -> bool:
        first = current.participants[0].node_id
        return self._world.cut_since_s(self._node.name, first) is None

    def _stay_out(self, current: Round) -> None:
        """As `MemberRendezvous._connect` and `Member.stay_out`."""
        self._is_out = True
        self._later(STAY_OUT_S, self._come_back, at_least_s=STAY_OUT_S)
        self._node.feed(PeerSilent(current.participants[0].node_id))
        self.hold_back("cannot reach the workers' store")

    def hold_back(self, unfit: str) -> None:
        """As `Member.hold_back`."""
        self._world.note(f"{self._node.name} stays out: {unfit}")
        self._is_out = True
        self._node.feed(HeldBack(unfit))

    def _come_back(self) -> None:
        self._is_out = False
        self._node.feed(HeldBack(""))
        self._node.feed(Announced(Status.READY))

    def _supervise(self, now_s: float) -> None:
        """As `ElasticAgent._supervise`."""
        if self._engine.view.fenced(now_s):
            self._stop("this node's lease ended", at_once=True)
        elif broken := self._engine.view.broken(self.running, now_s):
            self._stop(broken.reason)
        elif reason := self._engine.view.stop_requested(self.running):
            self._stop(reason, yielded=not self.are_stuck)

    def _stop(self, reason: str, *, yielded: bool = False, at_once: bool = False) -> None:
        """As `ElasticAgent._end_generation`."""
        self._is_stopping = True
        if at_once:
            self._stopped()
        else:
            self._later(0.4, self._stopped, at_least_s=GRACE_S if self.are_stuck else 0.0)
            self._node.feed(Announced(Status.STOPPING, reason, yielded=yielded))

    def _stopped(self) -> None:
        self._turn += 1
        self._is_stopping = False
        self.running = 0
        if self._engine.own.record.draining:
            self._node.leave()
        else:
            self._node.feed(Announced(Status.READY))

    def _later(self, at_most_s: float, action: object, *, at_least_s: float = 0.0) -> None:
        """Plan `action`, unless something else comes in between."""
        self._turn += 1
        turn = self._turn

        def act() -> None:
            if self._turn != turn or self._is_over or not self._node.alive:
                return
            if self._node.frozen:
                self._world.at(0.1, act)
            else:
                action()  # type: ignore[operator]

        self._world.at(at_least_s + self._world.random.uniform(0.0, at_most_s), act)

    # --- faults

    def crash(self, kind: FailureClass, step: int) -> None:
        """A worker fails: never twice in the same way, which would rightly end the job."""
        place = f"{self._node.name} {self._world.now_s}"
        failure = Failure(0, 1, "", self._world.now_s, kind=kind, step=step, place=place)
        self._is_stopping = True
        self._later(0.4, self._stopped, at_least_s=GRACE_S if self.are_stuck else 0.0)
        self._node.feed(Announced(Status.STOPPING, "worker failed", failure))
        self._node.feed(PeersDoubted())

    def be_unfit(self, seconds: float) -> None:
        """A check before the next round fails for a while."""
        is_busy = self.running or self._joining or self._is_stopping or self._is_out
        if not is_busy and not self._node.frozen:
            self._later(0.1, self._come_back, at_least_s=seconds)
            self.hold_back("a device is missing")

    def drain(self) -> None:
        """Somebody asks this node to leave."""
        self._node.feed(Draining("drain: asked to"))

    @property
    def is_idle_or_running(self) -> bool:
        """Whether its workers run and are not being stopped."""
        return bool(self.running) and not self._is_stopping

    def end(self) -> None:
        """The process is gone, or is about to go and has killed its workers."""
        self._is_over = True
        self.running = 0
