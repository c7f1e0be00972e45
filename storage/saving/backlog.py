"""Between a save that is copied and the one before it, which is still under way: at most one waits."""

from __future__ import annotations

import time

from storage.events import CheckpointEvent, Reporter
from storage.pace.rules import Backlog, Tier
from storage.saving.committer import Committer, Running
from storage.saving.uploads import SaveJob

_NUM_IN_LINE = 2
"""So many saves are under way at most where there is memory for more: one is stored, and one is the next."""
_LOST = "the process ends while the save before it is under way, and no checkpoint service keeps what waits for that"


class SaveQueue:
    """Hands saves to the committer; with `Backlog.REPLACE` one of them waits here while the one before is under way.

    It can be taken back for as long as it waits, since nobody has begun it. It goes on with the next call of any method
    once the one before has ended. A service keeps it meanwhile, and begins it if this process dies; where there is none
    it dies with this process. All methods belong to the training's thread.
    """

    def __init__(self, committer: Committer, report: Reporter, policy: Backlog, timeout_s: float) -> None:
        self._committer = committer
        self._report = report
        self._policy = policy
        self._timeout_s = timeout_s
        self._waiting: SaveJob | None = None
        self._parked: Running | None = None  # what waits, where the service keeps it

    @property
    def waiting(self) -> str:
        """The attempt that waits; "" if there is none."""
        self.go_on()
        return "" if self._waiting is None else self._waiting.attempt.id

    @property
    def gives_memory(self) -> bool:
        """Whether there is one that waits, whose memory is free at once when it gives way."""
        return self._waiting is not None and self._parked is None

    def why_full(self, tier: Tier, *, must: bool, has_room: bool) -> str:
        """Why there is to be no other copy, after a wait of as long as the policy says; "" if there is.

        What stays in memory waits for no store: for the last one of its kind alone.

        Args:
            must: wait for all that is under way whatever the policy is, though not for ever.
            has_room: there is memory for two copies. One save then waits in line behind another, and the training
                does not.
        """
        self.go_on()
        patience_s = self._timeout_s if must or self._policy is Backlog.WAIT else 0.0
        if tier is Tier.RAM:
            return self._committer.await_free(patience_s, tier)
        if self._policy is Backlog.REPLACE and not must:
            return ""  # one is under way at most, and what waits gives way
        in_line = _NUM_IN_LINE if self._policy is Backlog.WAIT and has_room else 1
        ends_s = time.monotonic() + patience_s
        if self._waiting is not None:
            if not self._committer.await_end(patience_s):
                return self._committer.await_free(0.0, tier) or "the save before has not ended"
            self.go_on()
        return self._committer.await_free(max(0.0, ends_s - time.monotonic()), tier, in_line)

    def put(self, job: SaveJob) -> None:
        """Take a save over."""
        if self._policy is Backlog.REPLACE and job.tier is Tier.STORE and not self._committer.await_end(0.0):
            assert self._waiting is None, "what waits was to be dropped before"
            self._waiting, self._parked = job, self._committer.park(job)
            return
        self._committer.submit(job)

    def drop(self, by: int) -> None:
        """Let what waits give its place to the save of step `by`."""
        job, parked = self._take()
        if job is None:
            return
        if parked is not None:
            self._committer.give_way(parked)
        elif job.staged is not None:
            job.staged.release()  # whatever has become of its copy, which nobody wants
        if job.contents is not None:
            self._report(CheckpointEvent.REPLACED, step=job.attempt.step, by=by)

    def go_on(self) -> None:
        """Hand over what waits, if the one before has ended."""
        if self._waiting is None or not self._committer.await_end(0.0):
            return
        job, parked = self._take()
        if parked is not None:
            self._committer.go_on(parked)
        elif job is not None:
            self._committer.submit(job)

    def flush(self) -> None:
        """Hand over what waits, after a wait for the one before."""
        if self._waiting is not None:
            self._committer.wait()
            self.go_on()

    def abandon(self) -> None:
        """This process ends, and waits for nothing: what waits goes on if the service keeps it, and else is lost."""
        job, parked = self._take()
        if parked is not None:
            self._committer.go_on(parked)
        elif job is not None and job.contents is not None:
            self._report(CheckpointEvent.FAILED, step=job.attempt.step, seconds=0.0, bytes=0, reason=_LOST)

    def _take(self) -> tuple[SaveJob | None, Running | None]:
        found = self._waiting, self._parked
        self._waiting = self._parked = None
        return found
