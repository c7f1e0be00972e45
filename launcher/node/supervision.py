"""What an agent does about its workers, look after look, while one generation of them runs.

Workers that know how are asked to stop at a step boundary, and given time for it. They agree on the boundary among
themselves (`launcher.script.worker.should_stop` is an all-reduce), so it makes no difference which node's are asked, or
that one's are asked first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.rounds.records import Breakage

_LOOK_S, _LOOK_SOON_S = 0.05, 0.01


@dataclass(frozen=True)
class GracePeriods:
    """How long the agent waits for workers, in seconds."""

    stop_s: float
    """From SIGTERM to SIGKILL, when a generation ends otherwise than at a step boundary."""
    yield_s: float = 300.0
    """For workers that report progress to reach a step boundary and save, when asked to."""
    attach_s: float = 15.0
    """For a started worker to report progress at all; a script that never does is stopped without asking."""
    capture_s: float = 0.0
    """For the sidecar to keep the state of workers that are ended within a step; 0 where there is none."""


@dataclass(frozen=True)
class WorkersSeen:
    """One look at this node's workers, and at what its local view says of their round."""

    have_failed: bool = False
    """At least one has ended badly."""
    have_exited: bool = False
    """All have ended, and well."""
    have_yielded: bool = False
    """All have stopped at a step boundary; where all have ended, at least one did so there."""
    are_cooperative: bool = False
    """The script reports its progress, and so can be asked to stop."""
    broken: Breakage | None = None
    """Why the round cannot go on."""
    fenced: bool = False
    stop: str = ""
    """Why the leader wants another round."""
    store_silent: bool = False
    all_stopped: bool = False
    """No node's workers need another's any more."""
    drain: str = ""
    """Why this node is to leave."""
    drain_until_s: float = math.inf
    """Until when its workers may come to a step boundary then."""


@dataclass(frozen=True)
class AskWorkers:
    """Ask them to stop at their next step boundary; `drains`: because this node leaves."""

    reason: str
    drains: bool


@dataclass(frozen=True)
class TellYielded:
    """Tell the other nodes that these have stopped at their boundary."""

    reason: str


@dataclass(frozen=True)
class TellTimedOut:
    """Tell that they have come to no boundary in time, with their stacks."""

    reason: str


@dataclass(frozen=True)
class ExplainHang:
    """Another node has found a hang: find out what these wait for, before they are ended."""

    reason: str


@dataclass(frozen=True)
class EndWorkers:
    """End the generation on this node; its workers have `grace_s` from SIGTERM to SIGKILL.

    Before that their state is kept, within `capture_s`: they have not saved it, as those that stop at a step boundary.
    """

    reason: str
    grace_s: float
    capture_s: float = 0.0


@dataclass(frozen=True)
class FinishJob:
    """They have done their work: wait for those of the other nodes."""


Order = AskWorkers | TellYielded | TellTimedOut | ExplainHang | EndWorkers | FinishJob


class Supervision:
    """Of the workers of one generation, started at `started_s`. Times are one monotonic clock's."""

    def __init__(self, graces: GracePeriods, started_s: float) -> None:
        self._graces = graces
        self._started_s = started_s
        self._asked_s: float | None = None  # when they were first asked to stop, and why
        self._asked_for = ""
        self._drains = False
        self.have_yielded = False
        """Whether all workers of this node have stopped at their step boundary."""

    def are_awaited(self, now_s: float) -> bool:
        """Whether they were asked to stop and may still be about to; then nobody counts their time as a hang."""
        return self._asked_s is not None and now_s <= self._asked_s + self._graces.yield_s

    def pause_s(self, now_s: float) -> float:
        """How long to wait until the next look, if nothing is heard: less where a whole job waits for these workers."""
        return _LOOK_SOON_S if self.are_awaited(now_s) else _LOOK_S

    def end_within_step(self, reason: str) -> EndWorkers:
        """How workers are ended that have not come to a step boundary."""
        return EndWorkers(reason, self._graces.stop_s, 0.0 if self.have_yielded else self._graces.capture_s)

    def step(self, seen: WorkersSeen, now_s: float) -> tuple[Order, ...]:
        """What to do now, in this order; nothing more after an `EndWorkers` or a `FinishJob`."""
        orders: list[Order] = []
        if last := self._judge(seen, now_s, orders):
            orders.append(last)
        return tuple(orders)

    def _judge(self, seen: WorkersSeen, now_s: float, orders: list[Order]) -> Order | None:
        """How it ends, None while it goes on; `orders` come first."""
        if seen.have_failed:
            return self.end_within_step("worker failed")
        if seen.stop and not self._ask(seen.stop, seen, now_s, orders):
            return self.end_within_step(seen.stop)
        reason = seen.stop
        if seen.store_silent and seen.are_cooperative and self._asked_s is None:
            reason = reason or "the store is silent"
            self._ask(reason, seen, now_s, orders)  # saved now, no step is lost if this node has to stop its workers
        broken = seen.broken
        # Peers that stopped at the step boundary are no reason to kill workers that are about to do the same.
        if broken and not (broken.graceful and self._ask(broken.reason, seen, now_s, orders)):
            if broken.hung and not seen.fenced:
                orders.append(ExplainHang(broken.reason))
            # Workers of a node whose lease may have ended must be gone before others start in their place.
            return EndWorkers(broken.reason, 0.0) if seen.fenced else self.end_within_step(broken.reason)
        if seen.drain and (why := self._drain(seen, now_s, orders)):
            return self.end_within_step(f"{seen.drain}: {why}")
        reason = reason or seen.drain or self._asked_for or "workers of another node were asked to stop"
        if seen.have_yielded and not self.have_yielded:
            self.have_yielded = True
            orders.append(TellYielded(reason))
        if self.have_yielded and (seen.have_exited or seen.all_stopped):
            # Every rank has saved its state and needs no other any more: not worth an interpreter's last second.
            return EndWorkers(reason, 0.0)
        return FinishJob() if seen.have_exited and not self.have_yielded else None

    def _ask(self, reason: str, seen: WorkersSeen, now_s: float, orders: list[Order]) -> bool:
        """Ask the workers to stop at a step boundary; False once there is no sense in waiting for it."""
        if self._asked_s is None:
            self._asked_s, self._asked_for = now_s, reason
            orders.append(AskWorkers(reason, drains=reason.startswith("drain")))
        if not seen.are_cooperative and now_s > self._started_s + self._graces.attach_s:
            return False
        if now_s > self._asked_s + self._graces.yield_s:
            orders.append(TellTimedOut(reason))
            return False
        return True

    def _drain(self, seen: WorkersSeen, now_s: float, orders: list[Order]) -> str:
        """Let the workers stop at a step boundary because this node is to leave; they are asked at once.

        Returns:
            Why they must be stopped otherwise, "" while they may still come to a boundary.
        """
        if not self._drains:
            self._drains = True
            self._asked_s = now_s if self._asked_s is None else self._asked_s
            orders.append(AskWorkers(seen.drain, drains=True))
        if not seen.are_cooperative:
            return "the script has not said that it can stop at a step boundary"
        return "no step boundary was reached and saved in time" if now_s >= seen.drain_until_s else ""
