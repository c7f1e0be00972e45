"""The background half of a save, as the training's thread sees it: what was handed over, and what became of it."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from storage.format import layout
from storage.format.manifest import Receipt
from storage.pace.rules import Tier
from storage.run import attempt_ids
from storage.saving.ownership import Ownership
from storage.saving.proposal import Fate
from storage.saving.uploads import SaveJob, Tried, Uploads

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Running:
    """A job that was handed over. `stored` is set once its payloads are stored, or cannot be, and `freed` once nobody
    reads their memory any more: the service may hold a state there for longer. `kept`: the node's memory has it, for
    whoever goes on there; `settled` once that is so, or the job has ended. `is_shared`: a process that this one has
    lost sight of may read it for ever, so it is not used again.
    """

    job: SaveJob
    stored: threading.Event = field(default_factory=threading.Event)
    committed: Future[bool] = field(default_factory=Future)
    freed: threading.Event = field(default_factory=threading.Event)
    is_shared: bool = False
    kept: threading.Event = field(default_factory=threading.Event)
    settled: threading.Event = field(default_factory=threading.Event)

    def keep(self) -> None:
        """The node's memory has it. Any thread."""
        self.kept.set()
        self.settled.set()

    def is_safe(self) -> bool:
        """Wait until that is so, or the job has ended; whether it can be gone on from, as it is kept or committed."""
        self.settled.wait()
        return self.kept.is_set() or self.committed.result()

    def free(self) -> None:
        """The memory of the job's payloads may be used again. Any thread; harmless where that was said."""
        if self.job.staged is not None and not self.freed.is_set():
            if self.is_shared:
                self.job.staged.abandon()
            else:
                self.job.staged.release()
        self.freed.set()
        self.job.payloads.clear()  # whoever asks later what has become of the job holds none of it
        self.stored.set()


class Backend(Protocol):
    """Who carries jobs out, one after the other. All methods belong to the training's thread."""

    @property
    def holds(self) -> bool:
        """Whether states stay in memory that outlives this process."""

    @property
    def is_copying(self) -> bool:
        """Whether a state that stays in memory so is still on its way to another node's. It waits for nothing."""

    def submit(self, running: Running) -> None:
        """Take a job over; settles `running` in time, whatever happens."""

    def park(self, running: Running) -> bool:
        """Take a job over that is not to begin before `go_on`, or before this process has died; whether it was.

        Where it was not, nothing outlives this process. One that is parked gives way to the next job, if that comes
        without `go_on`; its memory is freed then.
        """

    def go_on(self, running: Running) -> None:
        """Let a job begin that was parked; settles it as `submit` does."""

    def give_way(self, running: Running) -> None:
        """A job that was parked is not wanted any more: another one is about to take its place."""

    def close(self, *, abandon: bool) -> None:
        """End after the last job; with `abandon`, without waiting for other ranks."""


class InProcess:
    """Carries jobs out on a thread of this process.

    Args:
        stop: the one that `uploads` heeds.
    """

    holds = False
    is_copying = False

    def __init__(self, uploads: Uploads, stop: threading.Event) -> None:
        self._uploads = uploads
        self._stop = stop
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="storage-save")  # its thread begins with the first job

    def submit(self, running: Running, tried: Tried = Tried.NOT_YET) -> None:
        """See `Backend.submit`. `tried`: what somebody else may have done of it.

        Where not even a thread can be started (the limit of a user's processes, or of a container's), it is done here.
        """
        job = _MadeOnce(functools.partial(self._run, running, tried))
        try:
            self._pool.submit(job)
        except RuntimeError as error:  # the pool has it all the same, for its next thread
            log.warning("step %d is saved while the training waits for it: %s", running.job.attempt.step, error)
            job()

    def park(self, running: Running) -> bool:
        """See `Backend.park`. Nothing here outlives this process."""
        return False

    def go_on(self, running: Running) -> None:
        """See `Backend.go_on`. Nothing was parked."""

    def give_way(self, running: Running) -> None:
        """See `Backend.give_way`. Nothing was parked."""

    def close(self, *, abandon: bool) -> None:
        """See `Backend.close`."""
        if abandon:
            self._stop.set()
        self._pool.shutdown(wait=True)

    def _run(self, running: Running, tried: Tried) -> None:
        def stored(receipt: Receipt | None) -> None:
            running.free()

        try:
            committed = self._uploads.run(running.job, stored, tried=tried)
        except BaseException as error:
            running.free()
            running.committed.set_exception(error)
            raise
        running.committed.set_result(committed)


class _MadeOnce:
    """A call that is made once, by the first who comes."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._made = threading.Lock()

    def __call__(self) -> None:
        if self._made.acquire(blocking=False):
            self._call()


class Committer:
    """Hands jobs over, and knows of the last one what became of it. All methods belong to the training's thread.

    Args:
        prefix_spread: over how many prefixes the data of a save is spread.
    """

    def __init__(self, ownership: Ownership, backend: Backend, *, prefix_spread: int = 1) -> None:
        self._ownership = ownership
        self._backend = backend
        self._prefix_spread = prefix_spread
        self._num_attempts = 0
        self._last: dict[Tier, Running] = {}
        self._under_way: dict[Tier, list[Running]] = {tier: [] for tier in Tier}

    @property
    def fenced(self) -> str | None:
        """Why this process can never commit again, once it has found out (coordinator)."""
        return self._ownership.fenced

    def confirm(self) -> None:
        """Nothing is saved before this has returned: see `Ownership.confirm`. A collective once."""
        self._ownership.confirm()

    def new_attempt(self) -> str:
        """The id of a fresh attempt (coordinator)."""
        self._num_attempts += 1
        attempt = attempt_ids.new_id(self._ownership.claim.token, self._num_attempts)
        return layout.with_spread(attempt, self._prefix_spread)

    def submit(self, job: SaveJob) -> None:
        """Take the job over. The payloads' memory is in use until `await_free` says it is not."""
        running = Running(job)
        self._begin(running)
        self._backend.submit(running)

    def park(self, job: SaveJob) -> Running | None:
        """Have a job kept that is to wait, so that it outlives this process; None where it cannot be."""
        running = Running(job)
        return running if self._backend.park(running) else None

    def go_on(self, running: Running) -> None:
        """Let a job begin that was parked."""
        self._begin(running)
        self._backend.go_on(running)

    def give_way(self, running: Running) -> None:
        """A job that was parked makes way for the one that is about to be handed over."""
        self._backend.give_way(running)

    @property
    def holds(self) -> bool:
        """Whether states can stay in memory that outlives this process."""
        return self._backend.holds

    @property
    def is_copying(self) -> bool:
        """See `Backend.is_copying`."""
        return self._backend.is_copying

    def await_free(self, timeout_s: float, tier: Tier, in_line: int = 1) -> str:
        """Block until fewer than `in_line` jobs of that tier have payloads that are not stored (and have not failed).

        Why there are more, after so long; "" if there are not.
        """
        under_way = [running for running in self._under_way[tier] if not running.stored.is_set()]
        if len(under_way) < in_line or (first := under_way[-in_line]).stored.wait(timeout_s):
            return ""
        seconds = time.monotonic() - first.job.started_s
        where = "the store" if tier is Tier.STORE else "the service's memory"
        return f"step {first.job.attempt.step} has been on its way to {where} for {seconds:.1f} s"

    def await_end(self, timeout_s: float) -> bool:
        """Block until the last job for the store has ended, for at most so long; whether it has, or there was none."""
        last = self._last.get(Tier.STORE)
        return last is None or bool(futures.wait([last.committed], timeout_s).done)

    def wait(self, *, held: bool = False) -> bool:
        """Block until the last job has ended, of each tier; whether they committed (True if there was none).

        With `held` it is enough that this node's memory has it: so that whoever goes on on this node finds it there.
        """
        outcomes = [last.is_safe() if held else last.committed.result() for last in self._last.values()]
        return all(outcomes)

    def fate_of(self, step: int) -> Fate:
        """What is known of the last job for the store, if it was for this step; waits for nothing."""
        last = self._last.get(Tier.STORE)
        if last is None or last.job.attempt.step != step:
            return Fate.NONE
        if not last.committed.done() or last.committed.cancelled() or last.committed.exception() is not None:
            return Fate.UNDER_WAY  # or what `has_committed` raises
        if not last.committed.result():
            return Fate.NONE
        return Fate.COMMITTED if last.job.healthy else Fate.UNHEALTHY

    def has_committed(self, step: int, *, healthy: bool) -> bool:
        """Whether the last job was for this step and committed; waits for it only if it was for this step.

        What was saved as unhealthy has not been if the step is healthy now.
        """
        last = self._last.get(Tier.STORE)
        if last is None or last.job.attempt.step != step:
            return False
        return last.committed.result() and (last.job.healthy or not healthy)

    def forget(self) -> None:
        """Wait for the last job, and let its step be saved again: what it committed may turn out to be damaged."""
        self.wait()
        self._last.clear()

    def _begin(self, running: Running) -> None:
        tier = running.job.tier
        running.committed.add_done_callback(lambda _: running.settled.set())
        self._last[tier] = running
        self._under_way[tier] = [*(other for other in self._under_way[tier] if not other.stored.is_set()), running]

    def close(self, *, abandon: bool) -> None:
        """End after the last job; with `abandon` no other rank is waited for any more."""
        if not all(last.committed.done() for last in self._last.values()):
            self._ownership.announce_end()
        self._backend.close(abandon=abandon)
