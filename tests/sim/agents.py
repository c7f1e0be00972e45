"""The agent of a node and its workers. What is decided about workers is `Supervision`, which real agents run.

The rest is made up, because it is torch's loop around processes (`elastic.agent`, `elastic.rendezvous`): it reads what
`Member` lets it read, and says what they say, in the same order. Workers are told here when to yield, fail or be stuck.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from launcher.node.events import Announced, Draining, HeldBack, Joining, PeersDoubted, PeerSilent
from launcher.node.supervision import AskWorkers, EndWorkers, GracePeriods, Supervision, TellYielded, WorkersSeen
from launcher.rounds.failures import FailureClass
from launcher.rounds.records import Failure, Round, Status

if TYPE_CHECKING:
    from tests.sim.nodes import SimNode

GRACES = GracePeriods(stop_s=8.0, yield_s=4.0, attach_s=2.0, capture_s=1.0)
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
        self._failure: Failure | None = None
        self._have_yielded = self._have_exited = False
        self._is_cooperative = True
        self._supervision = Supervision(GRACES, 0.0)
        self._drain_until_s = math.inf
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
                self._start(generation)
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
        """As `Supervisor.look`."""
        view, record = self._engine.view, self._engine.own.record
        seen = WorkersSeen(
            have_failed=self._failure is not None,
            have_exited=self._have_exited,
            have_yielded=self._have_yielded,
            are_cooperative=self._is_cooperative,
            broken=view.broken(self.running, now_s),
            fenced=view.fenced(now_s),
            stop=view.stop_requested(self.running),
            store_silent=self._engine.own.store_silent(now_s),
            all_stopped=view.all_stopped(self.running),
            drain=record.reason if record.draining else "",
            drain_until_s=self._drain_until_s,
        )
        for order in self._supervision.step(seen, now_s):
            match order:
                case AskWorkers():
                    self._yield()
                case TellYielded(reason):
                    self._node.feed(Announced(Status.STOPPING, reason, yielded=True))
                case EndWorkers(reason, grace_s, capture_s):
                    self._stop(reason, grace_s, capture_s)

    def _start(self, generation: int) -> None:
        chance = self._world.random
        self.running, self.are_stuck = generation, False
        self._failure, self._have_yielded, self._have_exited = None, False, False
        self._is_cooperative = chance.random() < 0.8
        self._supervision = Supervision(GRACES, self._world.now_s)

    def _yield(self) -> None:
        """The workers come to a step boundary, and end a moment later; those that are stuck do not."""
        generation = self.running

        def come() -> None:
            if self.running == generation and not self._is_stopping and not self.are_stuck and self._is_cooperative:
                self._have_yielded = True
                self._world.at(self._world.random.uniform(0.0, 1.0), end)
                self.look()

        def end() -> None:
            if self.running == generation and not self._is_stopping:
                self._have_exited = True
                self.look()

        self._world.at(self._world.random.uniform(0.0, 0.8), come)

    def _stop(self, reason: str, grace_s: float, capture_s: float) -> None:
        """As `ElasticAgent._end_generation`; keeping the workers' state takes up to `capture_s`."""
        self._is_stopping = True
        if grace_s == 0.0:
            self._stopped()
            return
        self._later(0.4 + capture_s, self._stopped, at_least_s=grace_s if self.are_stuck else 0.0)
        if self._failure is not None:
            self._node.feed(Announced(Status.STOPPING, "worker failed", self._failure))
            self._node.feed(PeersDoubted())
        self._node.feed(Announced(Status.STOPPING, reason))

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
        self._failure = Failure(0, 1, "", self._world.now_s, kind=kind, step=step, place=place)
        self.look()

    def be_unfit(self, seconds: float) -> None:
        """A check before the next round fails for a while."""
        is_busy = self.running or self._joining or self._is_stopping or self._is_out
        if not is_busy and not self._node.frozen:
            self._later(0.1, self._come_back, at_least_s=seconds)
            self.hold_back("a device is missing")

    def drain(self) -> None:
        """Somebody asks this node to leave."""
        self._drain_until_s = self._world.now_s + 5.0
        self._node.feed(Draining("drain: asked to"))

    @property
    def is_idle_or_running(self) -> bool:
        """Whether its workers run and are not being stopped."""
        return bool(self.running) and not self._is_stopping

    def end(self) -> None:
        """The process is gone, or is about to go and has killed its workers."""
        self._is_over = True
        self.running = 0
