"""Whether another job works on a run: two that save to one URL would take it from each other again and again.

The coordinator of a job writes a beat every 5 s, an object of its own below the run, and removes it when it closes. Who
finds a run claimed by another job watches that job's beat. If it goes away or stands still for 30 s, the job has ended
or died, and the run is free; if it goes on, the run is in use. No host's clock is compared with another's, and the
store need not honour conditions. A job that closes while its last save goes on says so in its beat, and is waited for.

Nothing that is committed relies on this. A job that is taken for dead, because it was cut off from the store or frozen,
is fenced by `storage.run.owner` like every owner that was superseded.
"""

from __future__ import annotations

import atexit
import enum
import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from storage.errors import Corrupt, InUse, NotFound, StorageError
from storage.events import CheckpointEvent, Reporter
from storage.format import layout
from storage.run import owner
from storage.run.owner import Owner
from storage.stores.objects import ObjectStore

log = logging.getLogger(__name__)

INTERVAL_S = 5.0
TIMEOUT_S = 5.0
_RETRY_INTERVAL_S = 1.0  # while the store is away, so that its return is soon known
"""A request for a beat that has not moved a byte for so long has stalled."""
SILENCE_S = 30.0
"""A beat that stands still for this long is a dead job's; a job is alive that still beats after as long a look.

A living job is silent for up to 26 s where three requests in a row stall.
"""
CLOSING_S_MAX = 600.0
"""A job that says it is closing is waited for so long; one that still beats then is in use like any other."""
_LOOK_INTERVAL_S = 1.0
_CLOSE_S = 15.0
_CLOSING = b" closing\n"


class Liveness(enum.Enum):
    """What a watch has found."""

    UNKNOWN = "look on"
    ENDED = "it has ended"
    SILENT = f"it was silent for {SILENCE_S:.0f} s"
    ALIVE = "it is alive"


@dataclass(frozen=True)
class Watch:
    """What has been seen of a beat so far; times are of the watcher's own clock.

    `beat` is None when it is gone. `closing_s`: since when the job has said that it is closing.
    """

    started_s: float
    changed_s: float
    beat: bytes | None
    closing_s: float | None = None

    @classmethod
    def begun(cls, beat: bytes | None, now_s: float) -> Watch:
        """After the first look. Pure."""
        return cls(now_s, now_s, None).seen(beat, now_s)

    def seen(self, beat: bytes | None, now_s: float) -> Watch:
        """After another look. Pure."""
        if beat == self.beat:
            return self
        is_closing = beat is not None and beat.endswith(_CLOSING)
        since_s = now_s if self.closing_s is None else self.closing_s
        return replace(self, beat=beat, changed_s=now_s, closing_s=since_s if is_closing else None)

    def liveness(self, now_s: float) -> Liveness:
        """What follows, if the beat was that at `now_s` or later. Pure."""
        silent_s = now_s - self.changed_s
        if self.beat is None:
            return Liveness.ENDED
        if silent_s >= SILENCE_S:
            return Liveness.SILENT
        if self.closing_s is not None and now_s - self.closing_s < CLOSING_S_MAX:
            return Liveness.UNKNOWN
        # a job that is just being ended may beat once or twice more
        is_steady = self.changed_s > self.started_s and silent_s <= 2 * INTERVAL_S
        return Liveness.ALIVE if is_steady and now_s - self.started_s >= SILENCE_S else Liveness.UNKNOWN


@dataclass(frozen=True)
class PreviousOwner:
    """Another job's claim that may be replaced, and why."""

    owner: Owner
    reason: str


def await_free(
    store: ObjectStore,
    mine: Owner,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> PreviousOwner | None:
    """Return once no other job works on the run; the other job, if one has claimed it and not ended properly.

    Takes no time where the run is nobody's or this job's own, or the other job has ended.

    Raises:
        InUse: another job works on it.
        Transient, Denied: by the store.
    """
    while (recorded := _other(store, mine)) is not None:
        liveness = _watch(store, recorded, mine, clock, sleep)
        if liveness is Liveness.ALIVE:
            raise InUse(
                f"{store.url} is in use: {recorded.who} saves there and is alive; end that job, give this one another"
                " URL, or take the run over (Access.TAKE_OVER, or take_over of a job's [checkpoint], after which the"
                " other job can save no more)"
            )
        if _other(store, mine) == recorded:
            return PreviousOwner(recorded, liveness.value) if liveness is Liveness.SILENT else None
    return None


def find_other(store: ObjectStore, mine: Owner) -> PreviousOwner | None:
    """The other job that has the run, alive or not, for those who take it over without asking."""
    recorded = _other(store, mine)
    if recorded is None or _beat_of(store, recorded) is None:
        return None
    return PreviousOwner(recorded, "it was asked for")


def _other(store: ObjectStore, mine: Owner) -> Owner | None:
    """The claim of another job."""
    try:
        recorded = owner.read_owner(store)
    except Corrupt:
        return None  # told by who replaces it
    return None if recorded is None or owner.is_same_job(recorded, mine) else recorded


def _watch(
    store: ObjectStore, recorded: Owner, mine: Owner, clock: Callable[[], float], sleep: Callable[[float], None]
) -> Liveness:
    looked_s = clock()  # before the look: a read that stalls must not make the beat seem older than it is
    watch = Watch.begun(_beat_of(store, recorded), looked_s)
    if watch.liveness(looked_s) is Liveness.UNKNOWN:
        log.warning(
            "%s has claimed %s; waiting for up to %.0f s to see whether it lives%s",
            *(recorded.who, store.url, 2 * SILENCE_S),
            ""
            if mine.is_recognisable
            else " (if both are one job: with --rdzv-id, torchrun's restarts wait for nobody)",
        )
    is_told = False
    while (liveness := watch.liveness(looked_s)) is Liveness.UNKNOWN:
        if watch.closing_s is not None and not is_told:
            is_told = True
            log.warning("%s is closing; waiting for its last save, for up to %.0f s", recorded.who, CLOSING_S_MAX)
        sleep(_LOOK_INTERVAL_S)
        looked_s = clock()
        watch = watch.seen(_beat_of(store, recorded), clock())
    return liveness


def _beat_of(store: ObjectStore, recorded: Owner) -> bytes | None:
    try:
        return store.read(layout.heartbeat_name(recorded.token))
    except NotFound:
        return None


def write(store: ObjectStore, token: str, count: int, *, is_closing: bool = False) -> None:
    """Tell that the process which claims by `token` is alive, and whether it will soon let the run go."""
    store.put(layout.heartbeat_name(token), [b"%d" % count + (_CLOSING if is_closing else b"\n")])


def renew(store: ObjectStore, mine: Owner, count: int, *, is_closing: bool = False) -> Owner | None:
    """Beat, unless the claim was superseded; the claim that now holds, None if there is none.

    Raises Transient, Denied, Corrupt.
    """
    recorded = owner.read_owner(store)
    if recorded is not None and (recorded.token == mine.token or owner.is_late(recorded, mine)):
        write(store, mine.token, count, is_closing=is_closing)
        return mine
    return recorded


class Heartbeat:
    """Beats for a claim, on a thread of its own, until it is closed or the claim is superseded, which it reports.

    It keeps neither `report` nor, by it, the listener alive.

    Before that it removes the last beat of the claim that was superseded, by `previous_token`. A process that ends
    without `close`, but not by a signal, lets the run go all the same.
    """

    def __init__(
        self,
        store: ObjectStore,
        mine: Owner,
        previous_token: str | None,
        report: Reporter,
        interval_s: float = INTERVAL_S,
    ) -> None:
        # beats must not wait behind the parts of a checkpoint, nor for long
        self._store = store.impatient(TIMEOUT_S)
        self._mine = mine
        self._previous_token = previous_token
        self._interval_s = interval_s
        self._report = weakref.ref(report)
        self._fenced: str | None = None
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Start the thread, which first removes the heartbeat of the claim that this one replaces."""
        self._thread = threading.Thread(target=self._run, name="storage-heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def fenced(self) -> str | None:
        """Why this process can never commit again, once it has found out."""
        return self._fenced

    def announce_end(self) -> None:
        """Tell who waits for the run that it will soon be let go."""
        self._is_closing = True
        self._wake.set()

    def stop(self) -> None:
        """Have it stop and let the run go, and do not wait for that: the garbage collector may call it anywhere."""
        self._stop.set()
        self._wake.set()

    def close(self) -> None:
        """Stop, and let the run go. Waits no longer than 15 s: a store that is away must not keep a job from ending."""
        atexit.unregister(self.close)
        self.stop()
        if self._thread is None:
            return
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("%s: the store does not answer, so another job will have to wait for it", self._store.url)

    def _run(self) -> None:
        if self._previous_token is not None:
            self._remove(self._previous_token)
        count, is_told = 0, False
        while True:
            self._wake.wait(min(self._interval_s, _RETRY_INTERVAL_S) if is_told else self._interval_s)
            self._wake.clear()
            if self._stop.is_set():
                break
            count += 1
            try:
                recorded = renew(self._store, self._mine, count, is_closing=self._is_closing)
                if recorded is not self._mine:
                    self._lose(recorded)
                    break
                is_told = False
            except StorageError as error:
                if not is_told:
                    log.warning("other jobs cannot be told that this one works on %s: %s", self._store.url, error)
                is_told = True
        self._remove(self._mine.token)

    def _lose(self, recorded: Owner | None) -> None:
        self._fenced = str(owner.fenced(recorded, self._mine))
        if (report := self._report()) is not None:
            by = "nobody" if recorded is None else recorded.who
            report(CheckpointEvent.FENCED, url=self._store.url, by=by, reason=self._fenced)

    def _remove(self, token: str) -> None:
        try:
            self._store.delete(layout.heartbeat_name(token))
        except StorageError as error:
            log.warning("a beat is left behind in %s: %s", self._store.url, error)
