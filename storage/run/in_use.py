"""Whether another job works on a run: two that save to one URL would take it from each other again and again.

Whoever finds a run claimed by another job watches that job's heartbeat (`storage.run.heartbeat`). If it goes away or
stands still for 30 s, the job has ended or died, and the run is free; if it goes on, the run is in use. No host's clock
is compared with another's, and the store need not honour conditions. A job that closes while its last save goes on says
so in its heartbeat, and is waited for.

No commit relies on this. A job that is taken for dead, because it was cut off from the store or frozen, is fenced by
`storage.run.owner` like every owner that was superseded.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from storage.errors import Corrupt, InUse, NotFound
from storage.format import layout
from storage.run import heartbeat, owner
from storage.run.heartbeat import CLOSING
from storage.run.owner import Owner
from storage.stores.objects import ObjectStore

log = logging.getLogger(__name__)

SILENCE_S = 30.0
"""A heartbeat that stands still for this long is a dead job's; a job is alive that still beats after as long a look.

A living job is silent for up to 26 s where three requests in a row stall.
"""
CLOSING_S_MAX = 600.0
"""A job that says it is closing is waited for so long; one that still beats then is in use like any other."""
_LOOK_INTERVAL_S = 1.0


class Liveness(enum.Enum):
    """Whether another job lives, as far as its heartbeat tells."""

    UNKNOWN = "look on"
    ENDED = "it has ended"
    SILENT = f"it was silent for {SILENCE_S:.0f} s"
    ALIVE = "it is alive"


@dataclass(frozen=True)
class Watch:
    """What has been seen of another job's heartbeat so far; times are of the watcher's own clock.

    `beat` is the heartbeat's content, None when it is gone. `closing_s`: since when the job says that it is closing.
    """

    started_s: float
    changed_s: float
    beat: bytes | None
    closing_s: float | None = None

    @classmethod
    def begun(cls, beat: bytes | None, now_s: float) -> Watch:
        """The watch after its first look. Pure."""
        return cls(now_s, now_s, None).seen(beat, now_s)

    def seen(self, beat: bytes | None, now_s: float) -> Watch:
        """The watch after another look. Pure."""
        if beat == self.beat:
            return self
        is_closing = beat is not None and beat.endswith(CLOSING)
        since_s = now_s if self.closing_s is None else self.closing_s
        return replace(self, beat=beat, changed_s=now_s, closing_s=since_s if is_closing else None)

    def liveness(self, now_s: float) -> Liveness:
        """Whether the job lives, if its heartbeat was last seen unchanged at `now_s`. Pure."""
        silent_s = now_s - self.changed_s
        if self.beat is None:
            return Liveness.ENDED
        if silent_s >= SILENCE_S:
            return Liveness.SILENT
        if self.closing_s is not None and now_s - self.closing_s < CLOSING_S_MAX:
            return Liveness.UNKNOWN
        # a job that is just being ended may beat once or twice more
        is_steady = self.changed_s > self.started_s and silent_s <= 2 * heartbeat.INTERVAL_S
        return Liveness.ALIVE if is_steady and now_s - self.started_s >= SILENCE_S else Liveness.UNKNOWN


@dataclass(frozen=True)
class PreviousOwner:
    """The claim of another job that may be replaced, and why."""

    owner: Owner
    reason: str


def await_free(
    store: ObjectStore,
    mine: Owner,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> PreviousOwner | None:
    """Wait until no other job works on the run. Returns the one that had claimed it and not let it go, if there is one.

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
