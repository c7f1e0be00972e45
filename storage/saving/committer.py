"""The background half of a save: one thread stores, commits, reports and cleans up, one save after the other."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from storage.arena.stager import Staged
from storage.errors import Fenced, StorageError, Unconfirmed
from storage.events import CheckpointEvent, Reporter
from storage.format import layout
from storage.format.manifest import ItemTable, Receipt
from storage.run import retention
from storage.run.job import Origin
from storage.saving import commit, receipts
from storage.saving.commit import Attempt, StateContents
from storage.saving.ownership import Ownership
from storage.saving.receipts import Patience
from storage.saving.writing import Payload, write_payloads
from storage.stores.objects import ObjectStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveJob:
    """One save of one rank. `contents` is known to the coordinator only.

    The tensors of `payloads` lie in `staged`, and stand once that has been waited for, unless `staging_error` says why
    there are none. `healthy`: whether all ranks say so of the state.
    """

    attempt: Attempt
    rank: int
    payloads: list[Payload]
    contents: StateContents | None
    started_s: float
    staged: Staged | None = None
    staging_error: str | None = None
    healthy: bool = True


@dataclass(frozen=True)
class _Running:
    """A job that was handed over. `stored` is set once its payloads are stored, or cannot be: their memory is free."""

    job: SaveJob
    stored: threading.Event
    committed: Future[bool]


class Committer:
    """Runs jobs on a thread of its own. All methods without underscore belong to the training's thread.

    Args:
        keep: how many healthy checkpoints a commit leaves.
        timeout_s: how long ranks wait for each other once they have stored their part.
        prefix_spread: over how many prefixes the data of a save is spread.
    """

    def __init__(
        self,
        store: ObjectStore,
        ownership: Ownership,
        origin: Origin,
        report: Reporter,
        *,
        keep: int,
        timeout_s: float,
        prefix_spread: int = 1,
    ) -> None:
        self._store = store
        self._ownership = ownership
        self._origin = origin
        self._keep = keep
        self._report = report
        self._timeout_s = timeout_s
        self._prefix_spread = prefix_spread
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="storage-save")  # its thread begins with the first job
        self._stop = threading.Event()
        self._live: set[str] = set()
        self._last: _Running | None = None

    @property
    def fenced(self) -> str | None:
        """Why this process can never commit again, once it has found out (coordinator)."""
        return self._ownership.fenced

    def new_attempt(self) -> str:
        """The id of a fresh attempt, which counts as live from now on (coordinator)."""
        attempt = layout.with_spread(str(uuid.uuid4()), self._prefix_spread)
        self._live.add(attempt)
        return attempt

    def submit(self, job: SaveJob) -> None:
        """Take the job over. The payloads' memory is in use until `await_free` says it is not."""
        stored = threading.Event()
        self._last = _Running(job, stored, self._pool.submit(self._run, job, stored))

    @property
    def holds(self) -> bool:
        """Whether states can stay in memory that outlives this process."""
        return False

    def await_free(self, timeout_s: float) -> str:
        """Block until the last job's payloads are stored (or have failed): their memory is free again.

        Why it is not, after so long; "" if it is.
        """
        last = self._last
        if last is None or last.stored.wait(timeout_s):
            return ""
        return f"step {last.job.attempt.step} has been on its way to the store for {_since(last.job):.1f} s"

    def wait(self) -> bool:
        """Block until the last job has ended; whether it committed (True if there was none)."""
        return self._last is None or self._last.committed.result()

    def has_committed(self, step: int, *, healthy: bool) -> bool:
        """Whether the last job was for this step and committed; waits for it only if it was for this step.

        What was saved as unhealthy has not been if the step is healthy now.
        """
        if self._last is None or self._last.job.attempt.step != step:
            return False
        return self._last.committed.result() and (self._last.job.healthy or not healthy)

    def forget(self) -> None:
        """Wait for the last job, and let its step be saved again: what it committed may turn out to be damaged."""
        self.wait()
        self._last = None

    def close(self, *, abandon: bool) -> None:
        """End the thread after the last job; with `abandon` it waits for no other rank any more."""
        if self._last is not None and not self._last.committed.done():
            self._ownership.announce_end()
        if abandon:
            self._stop.set()
        self._pool.shutdown(wait=True)

    def _run(self, job: SaveJob, stored: threading.Event) -> bool:
        step = job.attempt.step
        try:
            with self._report.retries(self._store, "save", step=step):
                size_bytes = self._save(job, stored)
        except Exception as error:  # noqa: BLE001 - a save may fail in any way; the training goes on
            self._note(error)
            reason = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
            self._report(CheckpointEvent.FAILED, step=step, seconds=_since(job), bytes=0, reason=reason)
            return False
        finally:
            _free(job, stored)
            self._live.discard(job.attempt.id)
        if job.contents is not None:
            unhealthy = {} if job.healthy else {"healthy": False}
            self._report(CheckpointEvent.COMMITTED, step=step, seconds=_since(job), bytes=size_bytes, **unhealthy)
            self._clean(step)
        return True

    def _save(self, job: SaveJob, stored: threading.Event) -> int:
        """Store, and commit or wait for the commit; bytes of the whole checkpoint (coordinator) or of this rank."""
        receipt = self._store_payloads(job)
        _free(job, stored)
        deadline_s = time.monotonic() + self._timeout_s
        if job.contents is None:
            receipts.put_receipt(self._store, job.attempt, receipt)
            # the coordinator's own deadline comes first, so that its reason arrives
            patience = Patience(deadline_s + 0.1 * self._timeout_s, self._stop)
            receipts.await_outcome(self._store, job.attempt, patience)
            return sum(entry.size_bytes for entry in receipt.objects)
        try:
            receipts.put_receipt(self._store, job.attempt, receipt)
            return self._commit(job, job.contents, Patience(deadline_s, self._stop))
        except Unconfirmed:
            raise  # the others see for themselves whether it is committed
        except Exception as error:
            self._abort(job.attempt, error)
            raise

    def _abort(self, attempt: Attempt, error: Exception) -> None:
        """Tell the other ranks at once; if that fails as well, they wait for their deadline."""
        try:
            receipts.put_aborted(self._store, attempt, str(error))
        except Exception as failure:  # noqa: BLE001 - it must not hide the cause, which the caller reports
            log.warning("the other ranks cannot be told that step %d has failed: %s", attempt.step, failure)

    def _store_payloads(self, job: SaveJob) -> Receipt:
        """This rank's receipt, of success or of failure: the others learn of it at once, not by their deadline."""
        attempt = job.attempt
        error = job.staging_error
        if error is None:
            try:
                if job.staged is not None:
                    job.staged.wait()
                objects, items = write_payloads(self._store, attempt.prefix, attempt.id, job.rank, job.payloads)
                return Receipt(rank=job.rank, attempt=attempt.id, objects=objects, items=ItemTable.of(items))
            except Exception as failure:  # noqa: BLE001 - reported by the receipt
                error = f"{type(failure).__name__}: {failure}"
        return Receipt(rank=job.rank, attempt=attempt.id, error=error)

    def _commit(self, job: SaveJob, contents: StateContents, patience: Patience) -> int:
        claim = self._ownership.claim
        found = receipts.await_receipts(self._store, job.attempt, patience, claim)
        manifest, metadata = commit.build_manifest(
            job.attempt, self._origin, contents, found, time.time(), healthy=job.healthy
        )
        commit.publish(self._store, job.attempt, manifest, metadata, claim)
        return manifest.size_bytes

    def _clean(self, step: int) -> None:
        try:
            cleaned = retention.clean(self._store, self._ownership.claim, self._keep, self._live.copy, step)
        except Exception as error:  # noqa: BLE001 - left-overs cost space, not safety
            self._note(error)
            self._report(CheckpointEvent.CLEANUP_FAILED, step=step, reason=f"{type(error).__name__}: {error}")
            return
        if cleaned.newer_steps:
            self._report(CheckpointEvent.NOT_NEWEST, step=step, newest=cleaned.newer_steps[-1])

    def _note(self, error: Exception) -> None:
        if isinstance(error, Fenced):
            self._ownership.note(error)


def _free(job: SaveJob, stored: threading.Event) -> None:
    """The memory of the job's payloads may be used again."""
    if job.staged is not None and not stored.is_set():
        job.staged.release()
    stored.set()


def _since(job: SaveJob) -> float:
    return round(time.monotonic() - job.started_s, 3)
