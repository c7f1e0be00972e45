"""Asks the workers of this node to stop at a step boundary, and finds that they have come to one.

Workers agree on the boundary among themselves (`elastic_moe.worker.should_stop` is an all-reduce), so it makes no
difference which node's are asked, or that one's are asked first.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from launcher.coordination.member import Member
from launcher.drain.draining import DrainRequest, DrainRequests, Timetable
from launcher.events import Emit, EventName
from launcher.rounds.records import Breakage, Status
from launcher.workers.channel import StopReason, WorkerPhase
from launcher.workers.local_workers import LocalWorkers


@dataclasses.dataclass(frozen=True)
class GracePeriods:
    """How long the agent waits for workers, in seconds."""

    stop_s: float
    """From SIGTERM to SIGKILL, when a generation ends otherwise than at a step boundary."""
    yield_s: float = 300.0
    """For workers that report progress to reach a step boundary and save, when asked to."""
    attach_s: float = 15.0
    """For a started worker to report progress at all; a script that never does is stopped without asking."""


class CooperativeStop:
    """One stop after another, begun anew for every generation. For the agent's main thread only."""

    def __init__(
        self,
        member: Member,
        drain: DrainRequests,
        graces: GracePeriods,
        emit: Emit,
        dump_stacks: Callable[[str], object],
    ) -> None:
        self._member = member
        self._drain = drain
        self._graces = graces
        self._emit = emit
        self._dump_stacks = dump_stacks
        self._drain_told = False
        self._workers: LocalWorkers
        self._started_s = 0.0
        self._asked_for = ""
        self.done = False
        """Whether all workers of this node have stopped at their step boundary."""

    def begin(self, workers: LocalWorkers, started_s: float) -> None:
        """Begin anew with workers that were started at the monotonic time `started_s`."""
        self._workers = workers
        self._started_s = started_s
        self._asked_for = ""
        self.done = False

    def why(self) -> str:
        """Say why this node's workers stop at a step boundary, as far as it knows: others' may have been asked."""
        return self._asked_for or "workers of another node were asked to stop"

    def look(self, reason: str, *, exited: bool) -> bool:
        """Find out whether all workers of this node have stopped at their boundary; tell the other nodes once.

        Args:
            reason: why they were asked to.
            exited: whether all of them have ended.
        """
        progress = self._workers.progress().values()
        yielded = [p.phase is WorkerPhase.YIELDED for p in progress]
        if not self.done and (any(yielded) if exited else all(yielded)):
            self.done = True
            self._emit(EventName.WORKERS_YIELDED, reason=reason, **self._workers.last_step_fields())
            self._member.announce(Status.STOPPING, reason=reason, yielded=True)
        return self.done

    def ask(self, reason: str) -> bool:
        """Ask the workers to stop at a step boundary; returns False once there is no sense in waiting for it."""
        if self._workers.asked_s is None:
            code = StopReason.DRAIN if reason.startswith("drain") else StopReason.MEMBERSHIP
            self._workers.request_stop(code)
            self._asked_for = reason
        assert self._workers.asked_s is not None
        now_s = time.monotonic()
        if not self._workers.is_cooperative() and now_s > self._started_s + self._graces.attach_s:
            return False
        if now_s > self._workers.asked_s + self._graces.yield_s:
            self._emit(EventName.YIELD_TIMED_OUT, reason=reason, seconds=self._graces.yield_s)
            self._dump_stacks(EventName.YIELD_TIMED_OUT)
            return False
        return True

    def is_awaited(self) -> bool:
        """Whether the workers were asked to stop and may still be about to; then nobody counts their time as a hang."""
        asked_s = self._workers.asked_s
        return asked_s is not None and time.monotonic() <= asked_s + self._graces.yield_s

    def may_finish(self, broken: Breakage) -> bool:
        """Whether workers of a broken round are given time: if peers stopped at the boundary, they may as well."""
        return broken.graceful and self.ask(broken.reason)

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

    def follow_drain(self, request: DrainRequest) -> str:
        """Let the workers stop at a step boundary because this node is to leave; they are asked at once.

        Returns:
            Why they must be stopped otherwise, "" while they may still come to a boundary.
        """
        times = self.tell_drain(request)
        self._workers.request_stop(StopReason.DRAIN)
        if not self._workers.is_cooperative():
            return "the script has not said that it can stop at a step boundary"
        if time.monotonic() >= times.ask_until_s:
            return "no step boundary was reached and saved in time"
        return ""

    def overdue(self) -> bool:
        """Whether a node whose workers are done has waited for the others' for as long as its drain allows."""
        request = self._drain.current
        return request is not None and self.tell_drain(request).ask_until_s < time.monotonic()
