"""What the service does with what was staged: one lane for each rank, in which its saves go one after the other."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from storage.errors import Fenced, StorageError
from storage.events import CheckpointEvent, Reporter
from storage.format.manifest import Receipt
from storage.pace.rules import Tier
from storage.priority import step_back
from storage.run.heartbeat import Heartbeat
from storage.run.job import Origin
from storage.run.owner import Claim, Owner
from storage.saving.uploads import SaveRules, Uploads
from storage.saving.writing import MadeObjects
from storage.service.messages import Accepted, CopySettled, KeptHere, Rejected, Released, Stage, Stored
from storage.service.pace import Pace, PacedStore
from storage.service.parcels import Parcel
from storage.service.processes import is_alive
from storage.service.sessions import Session
from storage.stores.objects import ObjectStore
from storage.stores.registry import open_store

log = logging.getLogger(__name__)

_NUM_CRASHES_MAX = 3


class Safe(Protocol):
    """Who keeps what was staged if this process dies. Thread-safe."""

    def keep(self, name: str, stage: Stage, fds: Sequence[int]) -> None:
        """Keep copies of the descriptors, and what to do with them, until `done`. Harmless where that was done."""

    def stored(self, name: str) -> None:
        """It was stored."""

    def released(self, name: str) -> None:
        """Its slots may come to hold something else."""

    def done(self, name: str) -> None:
        """It has come to its end, and is kept on only for as long as its slots are not released."""


class Holder(Protocol):
    """Who keeps staged states in memory, whether or not they are ever stored. Thread-safe."""

    def hold(
        self,
        parcel: Parcel,
        report: Reporter,
        release: Callable[[], None],
        kept: Callable[[], object],
        settled: Callable[[], object],
    ) -> MadeObjects | None:
        """Keep it, and return the objects that it is kept as, so that these are stored; None if it is not kept.

        `release` is called once when its slots are read no more, unless it is not kept. `kept` is called as soon as
        whoever asks for what is held waits for it; `settled`, if it is kept, once none of it is on its way to another
        node any more.
        """


class RunHold:
    """A worker's claim on a run, in the service's hands."""

    def __init__(self, store: ObjectStore, owner: Owner) -> None:
        self._claim = Claim(store, owner)
        self.fenced: str | None = None

    @property
    def claim(self) -> Claim:
        """See `storage.saving.uploads.Hold`."""
        return self._claim

    def note(self, error: Fenced) -> None:
        """See `storage.saving.uploads.Hold`."""
        self.fenced = str(error)


@dataclass(frozen=True)
class Shared:
    """What all lanes have in common. `storing` bounds how many store at once."""

    pace: Pace
    safe: Safe
    holder: Holder | None
    storing: threading.Semaphore
    on_idle: Callable[[Lane], object]


class Lane:
    """The saves of one session, in order, on threads that end when there are none.

    One has them kept in memory; what is for memory only ends there, and waits for nothing that is stored before it. The
    other stores the rest.
    """

    def __init__(self, session: Session, shared: Shared) -> None:
        self.session = session
        self._shared = shared
        self._lock = threading.Condition(threading.Lock())
        self._queue: deque[Parcel] = deque()
        self._thread: threading.Thread | None = None
        self._to_hold: deque[Parcel] = deque()
        self._hold_thread: threading.Thread | None = None
        self._opened = ExitStack()
        self._store: ObjectStore | None = None
        self._pulse: Heartbeat | None = None
        self.num_ended = 0

    @property
    def unfinished(self) -> list[Parcel]:
        """What has not come to its end, in order."""
        with self._lock:
            return list(self._queue)

    def put(self, parcel: Parcel) -> None:
        """Take a parcel over. What the lane has already is not taken twice; what waits in it gives way.

        Raises:
            RuntimeError: no thread can be started for it; nothing is taken over then, and nothing has given way.
        """
        given_way = list[Parcel]()
        with self._lock:
            known = next((known for known in self._queue if known.stage.attempt == parcel.stage.attempt), None)
            if known is not None:
                known.waits = known.waits and parcel.waits
                known.num_handed += 1
                parcel.let_go()
            else:
                self._start_threads()
                given_way = self._drop_waiting(lambda _: parcel.stage.tier is Tier.STORE)
                self._queue.append(parcel)
                if self._shared.pace.stop.is_set():
                    parcel.stop.set()
                self._to_hold.append(parcel)
            self._lock.notify_all()
        if known is not None and not known.held:  # which may have been said to a connection that had ended by then
            self.session.send(Released(attempt=known.stage.attempt.id))
        for other in given_way:
            self._end_unbegun(other)

    def go_on(self, attempt: str | None = None) -> None:
        """What waits of that attempt, or all that does, may begin."""
        with self._lock:
            for parcel in self._queue:
                parcel.waits = parcel.waits and parcel.stage.attempt.id != (attempt or parcel.stage.attempt.id)
            self._lock.notify_all()

    def stop(self, attempts: Collection[str] | None = None) -> None:
        """Wait for nobody any more in those attempts, or in all; what was stored stays, and what is committed."""
        for parcel in self.unfinished:
            if attempts is None or parcel.stage.attempt.id in attempts:
                parcel.stop.set()

    def take_back(self, attempts: Collection[str]) -> None:
        """The worker has those attempts, or wants them no more: what waits here gives way, as `stop` else."""
        with self._lock:
            given_way = self._drop_waiting(lambda parcel: parcel.stage.attempt.id in attempts)
        for parcel in given_way:
            self._end_unbegun(parcel)
        self.stop(attempts)

    def release(self, parcel: Parcel) -> None:
        """Somebody who held the parcel's slots reads them no more; the last one lets them go."""
        with self._lock:
            parcel.held -= 1
            if parcel.held:
                return
        self._shared.safe.released(parcel.safe)  # before the worker hears of it, and stages something else there
        self.session.send(Released(attempt=parcel.stage.attempt.id))
        parcel.let_go()

    def watch(self) -> None:
        """Called now and then: what a worker has left behind that is gone is seen to its end.

        What was waiting for its word begins, and its claim beats on for as long as there is something to commit.
        """
        with self._lock:
            for left in self._queue:
                if left.waits and not is_alive(left.stage.pid, left.stage.pid_began, left.stage.pid_space):
                    left.waits = False
                    self._lock.notify_all()
            parcel = next((parcel for parcel in self._queue if parcel.is_coordinators), None)
            store = self._store
            if parcel is None or store is None or self._pulse is not None or self.session.is_worker_alive:
                return
            # nobody is there to be told that the run has a newer owner; the save finds it out by itself
            try:
                self._pulse = Heartbeat(store, parcel.stage.owner, None, Reporter(None, {})).start()
            except RuntimeError as error:  # there can be no more threads; it is tried again
                log.warning("other jobs cannot be told that step %d goes on: %s", parcel.stage.attempt.step, error)

    def _start_threads(self) -> None:
        """Have both threads, before there is something for them to do; with nothing to do they end again."""
        if self._hold_thread is None:
            self._hold_thread = _started(self._hold_all, f"hold-{self.session.name}")
        if self._thread is None:
            self._thread = _started(self._work, f"lane-{self.session.name}")

    def _work(self) -> None:
        step_back()
        while True:
            with self._lock:
                self._lock.wait_for(lambda: not self._queue or ((parcel := self._next()) and not parcel.waits))
                if (parcel := self._next()) is None:
                    self._thread = None
                    pulse, self._pulse = self._pulse, None
                    opened, self._opened, self._store = self._opened, ExitStack(), None
                    break
            self._run(parcel)
        if pulse is not None:
            pulse.close()
        opened.close()
        self._shared.on_idle(self)

    def _next(self) -> Parcel | None:
        """The first that is to be stored."""
        return next((parcel for parcel in self._queue if parcel.stage.tier is Tier.STORE), None)

    def _run(self, parcel: Parcel) -> None:
        stage, fenced, committed = parcel.stage, None, False
        parcel.ready.wait()
        if parcel.is_refused:
            return
        report = Reporter(self.session.listener, stage.told)
        try:
            if (num := parcel.record.num_crashes) > _NUM_CRASHES_MAX:
                raise StorageError(f"the service has crashed {num} times while it had this save")
            store = self._open(stage.url)
            report.watch(store)
            hold = RunHold(store, stage.owner)
            rules = SaveRules(keep=stage.keep, timeout_s=stage.timeout_s)
            uploads = Uploads(store, hold, Origin(**dict(stage.origin)), report, rules, parcel.stop)
            committed, fenced = self._upload(uploads, parcel), hold.fenced
        except Exception as error:
            log.exception("step %d of %s cannot be saved", stage.attempt.step, stage.url)
            reason = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
            report(CheckpointEvent.FAILED, step=stage.attempt.step, seconds=0.0, bytes=0, reason=reason)
            self._shared.safe.stored(parcel.safe)  # or a crash now has it stored from a slot that is used again
            self.release(parcel)
        self._end(parcel, committed=committed, fenced=fenced)

    def _end(self, parcel: Parcel, *, committed: bool, fenced: str | None) -> None:
        """Tell the worker, and be done with it.

        A worker that has lost its connection meanwhile, and handed the parcel over by the next one, is told once more:
        it would wait for ever.
        """
        parcel.has_ended, is_over = True, False
        while not is_over:
            num_handed = parcel.num_handed
            is_heard = self.session.end(parcel.stage.attempt.id, committed=committed, fenced=fenced)
            with self._lock:
                is_over = is_heard or parcel.num_handed == num_handed
                if is_over:
                    self._queue.remove(parcel)
                    self.num_ended += 1
                    self._lock.notify_all()
        self._shared.safe.done(parcel.safe)

    def _hold_all(self) -> None:
        """Have parcels kept in memory, in order: a state there neither waits for the store nor fails with it."""
        if not self._shared.pace.truce.is_on:  # else a whole job waits for the checksums
            step_back()
        while True:
            with self._lock:
                if not self._to_hold:
                    self._hold_thread = None
                    return
                parcel = self._to_hold.popleft()
            if not parcel.has_given_way and not self._open_parcel(parcel):
                continue
            try:
                parcel.made = None if parcel.has_given_way else self._hold(parcel)
            except Exception:
                log.exception("step %d is not held in memory", parcel.stage.attempt.step)
            finally:
                if parcel.made is None:
                    self._settled(parcel)
                with self._lock:
                    parcel.ready.set()
                    has_given_way = parcel.has_given_way
                if has_given_way:
                    self._end_unbegun(parcel)
            if parcel.stage.tier is Tier.RAM:
                self.release(parcel)
                self._end(parcel, committed=parcel.made is not None, fenced=None)

    def _open_parcel(self, parcel: Parcel) -> bool:
        """Look into a parcel; whether it is one. What is none is its worker's again."""
        attempt = parcel.stage.attempt
        try:
            parcel.open()
        except Exception as error:  # noqa: BLE001 - of one worker's, and the others' saves go on
            reason = str(error) if isinstance(error, (StorageError, ValueError, OSError)) else repr(error)
            log.warning("what was staged for step %d cannot be taken: %s", attempt.step, reason)
            with self._lock:
                parcel.is_refused = True
                if not parcel.has_given_way:
                    self._queue.remove(parcel)
                parcel.ready.set()
                self._lock.notify_all()
            if parcel.has_given_way:
                self._end_unbegun(parcel)
                return False
            self._shared.safe.released(parcel.safe)
            self._shared.safe.done(parcel.safe)
            self.session.send(Rejected(reason=reason, attempt=attempt.id))
            return False
        self.session.send(Accepted(attempt=attempt.id))
        return True

    def _hold(self, parcel: Parcel) -> MadeObjects | None:
        stage = parcel.stage
        report = Reporter(self.session.listener, stage.told)
        made, holder, settled = None, self._shared.holder, functools.partial(self._settled, parcel)
        told = functools.partial(self.session.send, KeptHere(attempt=stage.attempt.id))
        # what is to be stored comes to be found there, though its objects are not made yet: only the store is slower
        early = told if stage.tier is Tier.STORE else lambda: None
        if holder is not None and parcel.record.is_intact:
            with self._lock:
                parcel.held += 1
            try:
                made = holder.hold(parcel, report, functools.partial(self.release, parcel), early, settled)
            except Exception as error:  # the slots go back all the same, and the save goes on
                log.exception("step %d is not held in memory", stage.attempt.step)
                reason = f"step {stage.attempt.step} is not held in memory: {type(error).__name__}: {error}"
                report(CheckpointEvent.MEMORY_AWAY, reason=reason)
            if made is None:
                self.release(parcel)
            elif stage.tier is Tier.RAM:
                told()
        if made is None:
            self._shared.pace.truce.end()  # the store will be all that has it
        if stage.tier is Tier.RAM:
            step, seconds = stage.attempt.step, round(time.monotonic() - stage.started_s, 3)
            if made is not None:
                num_bytes = sum(entry.size_bytes for entry in made.entries)
                report(CheckpointEvent.HELD, step=step, seconds=seconds, bytes=num_bytes)
                self.session.send(Stored(attempt=stage.attempt.id))
            else:
                reason = "this node's service holds no states in memory"
                report(CheckpointEvent.FAILED, step=step, seconds=seconds, bytes=0, reason=reason)
        return made

    def _settled(self, parcel: Parcel) -> None:
        """None of it is on its way to another node any more, or it never was."""
        self.session.send(CopySettled(attempt=parcel.stage.attempt.id))

    def _drop_waiting(self, is_meant: Callable[[Parcel], bool]) -> list[Parcel]:
        """Take out of the queue what waits and is meant; what of it nobody else will let go of."""
        given_way = [other for other in self._queue if other.waits and is_meant(other)]
        for other in given_way:
            self._queue.remove(other)
            other.has_given_way = True
        self._lock.notify_all()
        return [other for other in given_way if other.ready.is_set()]

    def _end_unbegun(self, parcel: Parcel) -> None:
        self.release(parcel)
        self._shared.safe.done(parcel.safe)

    def _upload(self, uploads: Uploads, parcel: Parcel) -> bool:
        def stored(receipt: Receipt | None) -> None:
            self._shared.storing.release()  # those that wait for other ranks' parts keep nobody from storing theirs
            self._shared.safe.stored(parcel.safe)
            if receipt is not None and receipt.error is None:
                self.session.send(Stored(attempt=parcel.stage.attempt.id))
            self.release(parcel)

        self._shared.storing.acquire()
        return uploads.run(parcel.job(), stored, tried=parcel.stage.tried)

    def _open(self, url: str) -> ObjectStore:
        with self._lock:
            if self._store is None or self._store.url != url:
                self._opened.close()
                store = PacedStore(open_store(url), self._shared.pace)
                self._opened.callback(store.close)
                self._store = store
            return self._store


def _started(target: Callable[[], None], name: str) -> threading.Thread:
    """A thread that runs. Raises RuntimeError where there can be none."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread
