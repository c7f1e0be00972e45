"""Carries out what `Supervision` decides about this node's workers: asks them, tells the others, has stacks written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection

from launcher.coordination.member import Member
from launcher.drain.draining import DrainRequest, DrainRequests, Timetable
from launcher.events import Emit, EventName
from launcher.health.watchdog import Watchdog
from launcher.node.supervision import (
    AskWorkers,
    EndWorkers,
    ExplainHang,
    FinishJob,
    GracePeriods,
    Order,
    Supervision,
    TellTimedOut,
    TellYielded,
    WorkersSeen,
)
from launcher.rounds.records import Status
from launcher.workers.channel import StopReason, WorkerPhase
from launcher.workers.local_workers import LocalWorkers


class Supervisor:
    """Begun anew for every generation. For the agent's main thread only."""

    def __init__(
        self, member: Member, drain: DrainRequests, graces: GracePeriods, emit: Emit, watchdog: Watchdog
    ) -> None:
        self._member = member
        self._drain = drain
        self._graces = graces
        self._emit = emit
        self._watchdog = watchdog
        self._drain_told = False
        self._workers: LocalWorkers
        self._supervision = Supervision(graces, 0.0)

    def begin(self, workers: LocalWorkers, started_s: float) -> None:
        """Begin anew with workers that were started at the monotonic time `started_s`."""
        self._workers = workers
        self._supervision = Supervision(self._graces, started_s)

    @property
    def have_yielded(self) -> bool:
        """Whether all workers of this node have stopped at their step boundary."""
        return self._supervision.have_yielded

    @property
    def pause_s(self) -> float:
        """How long to wait until the next look, if nothing is heard."""
        return self._supervision.pause_s(time.monotonic())

    def look(
        self, generation: int, exit_codes: Collection[int | None], exited: Callable[[], Collection[int]]
    ) -> EndWorkers | FinishJob | None:
        """Look at the workers once, and do what there is to do while they run.

        Args:
            exit_codes: of all workers of this node; None for those that run.
            exited: the local ranks of those that have ended, by now.

        Returns:
            How the generation ends on this node, None while it goes on.
        """
        now_s = time.monotonic()
        seen = self._see(generation, set(exit_codes))
        awaited = self._supervision.are_awaited(now_s)
        if not seen.have_failed and (hang := self._watchdog.look(now_s, exited=exited(), paused=awaited)):
            return self._supervision.end_within_step(self._watchdog.report(hang, self._member.announce))
        for order in self._supervision.step(seen, now_s):
            if isinstance(order, EndWorkers | FinishJob):
                return order
            self._carry_out(order)
        return None

    def _see(self, generation: int, exit_codes: set[int | None]) -> WorkersSeen:
        have_exited = exit_codes == {0}
        yielded = [progress.phase is WorkerPhase.YIELDED for progress in self._workers.progress().values()]
        request = self._drain.current
        return WorkersSeen(
            have_failed=bool(exit_codes - {0, None}),
            have_exited=have_exited,
            have_yielded=any(yielded) if have_exited else bool(yielded) and all(yielded),
            are_cooperative=self._workers.is_cooperative(),
            broken=self._member.broken(generation),
            fenced=self._member.fenced(),
            stop=self._member.stop_requested(generation),
            store_silent=self._member.store_silent(),
            all_stopped=self._member.all_stop(generation),
            drain=request.reason if request else "",
            drain_until_s=self.tell_drain(request).ask_until_s if request else math.inf,
        )

    def _carry_out(self, order: Order) -> None:
        match order:
            case AskWorkers(drains=drains):
                self._workers.request_stop(StopReason.DRAIN if drains else StopReason.MEMBERSHIP)
            case TellYielded(reason):
                self._emit(EventName.WORKERS_YIELDED, reason=reason, **self._workers.last_step_fields())
                self._member.announce(Status.STOPPING, reason=reason, yielded=True)
            case TellTimedOut(reason):
                self._emit(EventName.YIELD_TIMED_OUT, reason=reason, seconds=self._graces.yield_s)
                self._watchdog.dump_stacks(EventName.YIELD_TIMED_OUT)
            case ExplainHang(reason):
                self._watchdog.answer(reason, self._member.announce)

    # --- a node that is to leave

    def tell_drain(self, request: DrainRequest) -> Timetable:
        """Tell the others, once, that this node is to leave; returns what there is time for."""
        if not self._drain_told:
            self._drain_told = True
            self._emit(EventName.DRAIN_STARTED, source=request.source, detail=request.detail, seconds=request.grace_s)
            self._member.drain(request.reason)
        times = self._drain.timetable
        assert times is not None
        return times

    def is_overdue(self) -> bool:
        """Whether a node whose workers are done has waited for the others' for as long as its drain allows."""
        request = self._drain.current
        return request is not None and self.tell_drain(request).ask_until_s < time.monotonic()
