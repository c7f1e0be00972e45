"""One rank's part of a save, from its staged payloads to the outcome: what a worker and the service run alike."""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from storage.arena.slot import Slot
from storage.errors import AlreadyExists, Denied, Fenced, StorageError, Transient, Unconfirmed
from storage.events import CheckpointEvent, Reporter
from storage.format.manifest import ItemTable, Receipt
from storage.pace.rules import Tier
from storage.run import attempt_ids, retention
from storage.run.attempt import Attempt, StateContents, build_manifest
from storage.run.job import Origin
from storage.run.owner import Claim
from storage.saving import commit, receipts
from storage.saving.receipts import Patience
from storage.saving.writing import MadeObjects, Payload, put_made, write_payloads
from storage.stores.objects import Capability, ObjectStore

log = logging.getLogger(__name__)

_TELL_AGAIN_S = (0.05, 0.2, 0.5, 1.0, 2.0)


class StagedMemory(Protocol):
    """What `storage.arena.stager` has made of a rank's tensors, for those who need no torch. Thread-safe."""

    slot: Slot

    @property
    def is_pending(self) -> bool:
        """Whether the copy may not be whole yet."""

    def then(self, call: Callable[[], object]) -> None:
        """Have `call`, which must not take long, made when `wait` will not block for long any more; any thread."""

    def wait(self) -> None:
        """Block until the copy is whole. Raises where it is not what was to be saved."""

    def drain(self) -> None:
        """Block until nothing is written any more, whatever became of it; what nobody copies is copied here."""

    def release(self) -> None:
        """Let the slot be overwritten; releasing twice is harmless."""

    def abandon(self) -> None:
        """Let go of the slot for good: another process may still read it, so nothing else may come into it."""


@dataclass(frozen=True)
class SaveJob:
    """One save of one rank. `contents` is known to the coordinator only.

    Each entry of `payloads` is staged already, unless `staging_error` says why there are none. `healthy`: whether all
    ranks say so of the state. `started_s` is by the clock that all processes of a host share (`time.monotonic`).
    """

    attempt: Attempt
    rank: int
    payloads: list[Payload]
    contents: StateContents | None
    started_s: float
    staging_error: str | None = None
    healthy: bool = True
    created_unix_s: float = field(default_factory=time.time)
    """The same at every try, and so is the manifest."""
    staged: StagedMemory | None = None
    """Where the tensors of `payloads` lie; they stand once it has been waited for."""
    tier: Tier = Tier.STORE
    made: MadeObjects | None = None
    """The objects of `payloads`, if they were made already."""
    yields: bool = False
    """The workers stop for others once it is in their nodes' memory: its way to the store begins after that."""
    copies: bool = True
    """Where it is held in memory it is copied to another node's, as on all nodes."""


class Tried(enum.StrEnum):
    """What may have been done of a save already."""

    NOT_YET = "not yet"
    BEGUN = "begun"
    """Somebody has begun it, and may have come to any point of the way."""
    STORED = "stored"
    """The rank's part was stored, and the memory in which it was staged may hold something else by now."""


class Hold(Protocol):
    """A claim on a run, and who has to know that it is lost. Thread-safe."""

    @property
    def claim(self) -> Claim:
        """What the coordinator asks before it commits."""

    def note(self, error: Fenced) -> None:
        """A save has found that another process owns the run."""


@dataclass(frozen=True)
class SaveRules:
    """What a run wants of its saves.

    Args:
        keep: how many healthy checkpoints a commit leaves.
        timeout_s: how long ranks wait for each other once they have stored their part.
    """

    keep: int
    timeout_s: float


class Uploads:
    """Stores, commits, reports and cleans up; one call of `run` for each save of a rank, from one thread at a time.

    A save may be run again, by another process as well, after any part of the way: what was stored already is taken as
    it is, and the outcome is the same.

    Args:
        stop: set where no other rank is to be waited for any more.
    """

    def __init__(
        self, store: ObjectStore, hold: Hold, origin: Origin, report: Reporter, rules: SaveRules, stop: threading.Event
    ) -> None:
        self._store = store
        self._hold = hold
        self._origin = origin
        self._report = report
        self._rules = rules
        self._stop = stop

    def run(self, job: SaveJob, stored: Callable[[Receipt | None], object], *, tried: Tried = Tried.NOT_YET) -> bool:
        """Whether the save has committed. Never raises: a failure is an event.

        Args:
            stored: called once, when the payloads are stored, and their receipt says so, or when they cannot be (None).
            tried: what may have been done of it before.
        """
        if job.tier is Tier.RAM:  # other nodes only hold it: their parts would be waited for
            reason = "it was to stay in the memory of the node's checkpoint service, which is away"
            self._report(CheckpointEvent.FAILED, step=job.attempt.step, seconds=_since(job), bytes=0, reason=reason)
            stored(None)
            return False
        step, claim = job.attempt.step, self._hold.claim.of_attempt(job.attempt.id)
        telling = _Once(stored)
        try:
            with self._report.retries(self._store, "save", step=step):
                size_bytes = self._save(job, claim, telling, tried)
        except Exception as error:  # noqa: BLE001 - a save may fail in any way; the training goes on
            self._note(error)
            reason = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
            self._report(CheckpointEvent.FAILED, step=step, seconds=_since(job), bytes=0, reason=reason)
            if job.contents is not None and not claim.is_adopted:
                self._make_room(job.attempt, error)
            return False
        finally:
            telling(None)
        if job.contents is not None:
            unhealthy = {} if job.healthy else {"healthy": False}
            self._report(CheckpointEvent.COMMITTED, step=step, seconds=_since(job), bytes=size_bytes, **unhealthy)
            if not claim.is_adopted:  # else the newer owner cleans up
                self._clean(job.attempt)
        return True

    def _save(self, job: SaveJob, claim: Claim, stored: Callable[[Receipt | None], object], tried: Tried) -> int:
        """Store, and commit or wait for the commit; bytes of the whole checkpoint (coordinator) or of this rank."""
        try:
            receipt = self._store_part(job, tried)
            deadline_s = time.monotonic() + self._rules.timeout_s
            if job.contents is None:
                self._put_receipt(job, receipt, tried)
                stored(receipt)
                # the coordinator's own deadline comes first, so that its reason arrives
                patience = Patience(deadline_s + 0.1 * self._rules.timeout_s, self._stop)
                receipts.await_outcome(self._store, job.attempt, patience)
                return sum(entry.size_bytes for entry in receipt.objects)
            size_bytes = None if tried is Tried.NOT_YET else self._outcome(job.attempt)
            if size_bytes is None and not self._put_receipt(job, receipt, tried) and tried is Tried.NOT_YET:
                size_bytes = self._outcome(job.attempt)
            stored(receipt)
            if size_bytes is not None:
                return size_bytes
            return self._commit(job, job.contents, claim, Patience(deadline_s, self._stop))
        except Unconfirmed:
            raise  # the others see for themselves whether it is committed
        except Exception as error:
            if (found := self._committed_all_the_same(job.attempt, error)) is not None:
                return found
            if job.contents is not None:
                self._abort(job.attempt, error)
            raise

    def _outcome(self, attempt: Attempt) -> int | None:
        """The size of what somebody else has committed of it by now, if it is. Raises where it was given up."""
        if (size_bytes := receipts.committed_bytes(self._store, attempt)) is None:
            receipts.check_not_aborted(self._store, attempt)
        return size_bytes

    def _committed_all_the_same(self, attempt: Attempt, error: Exception) -> int | None:
        """The size of the attempt if it is committed in spite of the error.

        A process that was frozen for long finds its save carried out by whoever has lost sight of it meanwhile.
        """
        if isinstance(error, Transient) and error.given_up:
            return None  # the store is away: whether it is cannot be told
        try:
            size_bytes = receipts.committed_bytes(self._store, attempt)
        except Exception as failure:  # noqa: BLE001 - it must not hide the cause, which is reported
            log.warning("whether step %d is committed cannot be told: %s", attempt.step, failure)
            return None
        if size_bytes is not None:
            log.warning("step %d was committed by another process meanwhile; here: %s", attempt.step, error)
        return size_bytes

    def _store_part(self, job: SaveJob, tried: Tried) -> Receipt:
        if tried is Tried.NOT_YET:
            return self._store_payloads(job)
        if (found := receipts.find_receipt(self._store, job.attempt, job.rank)) is not None:
            return found
        if tried is Tried.STORED:
            raise StorageError(f"what rank {job.rank} had stored of it is gone")
        return self._store_payloads(job)

    def _put_receipt(self, job: SaveJob, receipt: Receipt, tried: Tried) -> bool:
        """Whether it was put now, and not before: by one who carries the save out as well, and writes the same."""
        try:
            self._put_yet(lambda: receipts.put_receipt(self._store, job.attempt, receipt))
        except AlreadyExists:
            if tried is Tried.NOT_YET and receipts.find_receipt(self._store, job.attempt, job.rank) is None:
                raise
            return False
        return True

    def _abort(self, attempt: Attempt, error: Exception) -> None:
        """Tell the other ranks at once; if that fails as well, they wait for their deadline."""
        try:
            self._put_yet(lambda: receipts.put_aborted(self._store, attempt, str(error)))
        except Exception as failure:  # noqa: BLE001 - it must not hide the cause, which the caller reports
            log.warning("the other ranks cannot be told that step %d has failed: %s", attempt.step, failure)

    def _put_yet(self, put: Callable[[], object]) -> None:
        """Put what others wait for, though a disk may be full now: what has failed of other ranks makes room."""
        for pause_s in _TELL_AGAIN_S:
            try:
                put()
                return
            except Transient as error:
                if error.given_up or self._stop.wait(pause_s):
                    raise
        put()

    def _store_payloads(self, job: SaveJob) -> Receipt:
        """This rank's receipt, of success or of failure: the others learn of it at once, not by their deadline."""
        attempt = job.attempt
        error = job.staging_error
        if error is None:
            try:
                if job.staged is not None:
                    job.staged.wait()
                if job.made is not None:
                    objects, items = put_made(self._store, attempt.prefix, job.made), job.made.items
                else:
                    objects, items = write_payloads(self._store, attempt.prefix, attempt.id, job.rank, job.payloads)
                return Receipt(rank=job.rank, attempt=attempt.id, objects=objects, items=ItemTable.of(items))
            except Exception as failure:  # noqa: BLE001 - reported by the receipt
                error = f"{type(failure).__name__}: {failure}"
        return Receipt(rank=job.rank, attempt=attempt.id, error=error)

    def _commit(self, job: SaveJob, contents: StateContents, claim: Claim, patience: Patience) -> int:
        found = receipts.await_receipts(self._store, job.attempt, patience, claim)
        manifest, metadata = build_manifest(
            job.attempt, self._origin, contents, found, job.created_unix_s, healthy=job.healthy
        )
        commit.publish(self._store, job.attempt, manifest, metadata, claim)
        return manifest.size_bytes

    def _clean(self, attempt: Attempt) -> None:
        claim = self._hold.claim
        try:
            cleaned = retention.clean(
                self._store,
                claim,
                self._rules.keep,
                lambda seen: attempt_ids.live_beside(attempt.id, seen, claim.owner.adopts),
                attempt.step,
            )
        except Exception as error:  # noqa: BLE001 - left-overs cost space, not safety
            self._note(error)
            self._report(CheckpointEvent.CLEANUP_FAILED, step=attempt.step, reason=f"{type(error).__name__}: {error}")
            return
        if cleaned.newer_steps:
            self._report(CheckpointEvent.NOT_NEWEST, step=attempt.step, newest=cleaned.newer_steps[-1])

    def _make_room(self, attempt: Attempt, error: Exception) -> None:
        """Remove what saves have left that can never be committed: on a full disk the next one would lack just that."""
        if isinstance(error, Fenced | Denied) or (isinstance(error, Transient) and error.given_up):
            return  # it is not this owner's any more, or the store is away
        claim = self._hold.claim
        try:
            retention.clear(
                self._store, claim, lambda seen: attempt_ids.live_beside(attempt.id, seen, claim.owner.adopts)
            )
            if not isinstance(error, receipts.PartFailed) or not self._store.can(Capability.CONDITIONAL_PUTS):
                return
            if receipts.committed_bytes(self._store, attempt) is None:  # by another process, before that receipt
                retention.drop_data(self._store, attempt.prefix, attempt.id)
        except Fenced as failure:
            self._note(failure)  # the newer owner cleans up
        except Exception as failure:  # noqa: BLE001 - left-overs cost space, not safety
            self._report(
                CheckpointEvent.CLEANUP_FAILED, step=attempt.step, reason=f"{type(failure).__name__}: {failure}"
            )

    def _note(self, error: Exception) -> None:
        if isinstance(error, Fenced):
            self._hold.note(error)


class _Once:
    def __init__(self, call: Callable[[Receipt | None], object]) -> None:
        self._call: Callable[[Receipt | None], object] | None = call

    def __call__(self, receipt: Receipt | None) -> None:
        call, self._call = self._call, None
        if call is not None:
            call(receipt)


def _since(job: SaveJob) -> float:
    return round(time.monotonic() - job.started_s, 3)
