"""A client of the store on a register: a `KV` around a `Journal`, with one thread that looks for news.

How often it looks follows from what happens: some times a second, or some tens of times, while something changes, and
every second or two while nothing does (`PollPace`). A put is one request where nobody else writes, and a look is one.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from launcher.errors import Compacted, KVUnavailable
from launcher.kv.base import Entry, Snapshot, WatchEvent
from launcher.kv.bucket.hedge import hedged
from launcher.kv.bucket.journal import KEPT_VERSIONS, Journal
from launcher.kv.bucket.judge import Judge
from launcher.kv.bucket.register import Create, Pause, Read, Register, Request, Steps, answer
from launcher.kv.bucket.version import LOG, TOMBSTONE, beat_name, number_of, version_name
from launcher.kv.lease import Lease
from launcher.kv.state import State

log = logging.getLogger(__name__)

T = TypeVar("T")

_TOMBSTONE_KEPT_S = 24 * 3600.0
_SWEEP_EVERY_S = 3600.0
_HEDGE_FRACTION = 0.125
_STALE_S = 12 * 3600.0  # of a client's knowledge: well below what keeps a name taken
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # the first goes on while the machine hibernates


def _elapsed_s() -> float:
    return time.clock_gettime(_CLOCK)


@dataclass(frozen=True)
class PollPace:
    """How often a client looks, and tells that it is there.

    Attributes:
        quick_s, slow_s: seconds between two looks for news, for `hot_s` after the last change and later.
        renewals_per_ttl: of its own leases. A worker is asked to yield at 0.6 of a lease without a renewal.
        checks_per_ttl: looks at another's lease.
    """

    quick_s: float
    slow_s: float
    renewals_per_ttl: float
    checks_per_ttl: float
    hot_s: float = 5.0


LOCAL_PACE = PollPace(quick_s=0.01, slow_s=0.25, renewals_per_ttl=4, checks_per_ttl=8)
REMOTE_PACE = PollPace(quick_s=0.1, slow_s=3.0, renewals_per_ttl=3, checks_per_ttl=3.5)


class BucketKV:
    """The store on `register`, which is closed with it. The first watch or lease starts its thread."""

    def __init__(self, register: Register, pace: PollPace | None = None) -> None:
        self._register = register
        self._pace = pace or (REMOTE_PACE if register.is_remote else LOCAL_PACE)
        self._journal = Journal(lambda: uuid.uuid4().hex)
        self._lock = threading.Lock()  # of the journal while its steps are carried out
        self._changed = threading.Condition()  # of what follows, and told when there is news
        self._trouble: KVUnavailable | None = None
        self._synced_s = _elapsed_s()  # at this time it had read the newest version
        self._hot_until_s = time.monotonic()
        self._leases: dict[int, Lease] = {}
        self._poller: threading.Thread | None = None
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._judge = Judge()
        self._next_look_s = self._next_judging_s = 0.0
        self._to_bury: list[int] = []
        self._tombstones: dict[str, float] = {}
        self._next_sweep_s = time.monotonic() + _SWEEP_EVERY_S

    # --- the contract

    def get(self, key: str) -> Entry | None:
        return self._after_look(lambda state: state.get(key))

    def list(self, prefix: str) -> Snapshot:
        return self._after_look(lambda state: state.list(prefix))

    def put(
        self, key: str, value: bytes, *, if_revision: int | None = None, lease: Lease | None = None
    ) -> Entry | None:
        lease_id = lease.lease_id if lease else None
        return self._change(lambda state: state.put(key, value, if_revision, lease_id))

    def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        return self._change(lambda state: state.delete(key, if_revision))

    def watch(self, prefix: str, from_revision: int) -> _BucketWatch:
        self._start()
        return _BucketWatch(self, prefix, from_revision)

    def lease(self, ttl_s: float) -> Lease:
        granted_s = time.monotonic()

        def grant(state: State) -> int:
            nonlocal granted_s  # just before it is written: where many write, that takes many tries
            granted_s = time.monotonic()
            return state.grant(ttl_s, 0.0)

        lease_id = self._change(grant)
        lease = Lease(
            lease_id,
            ttl_s,
            granted_s=granted_s,
            renew=lambda: self._renew(lease),
            revoke=lambda: self._revoke(lease_id),
            close=lambda: self._forget(lease_id),
        )
        lease.renewals_per_ttl = self._pace.renewals_per_ttl
        lease.start()
        with self._changed:
            self._leases[lease_id] = lease
        self._start()
        return lease

    def close(self) -> None:
        for lease in list(self._leases.values()):
            lease.stop()
        self._closed.set()
        self._wake.set()
        with self._changed:
            self._changed.notify_all()
        if self._poller is not None:
            self._poller.join(timeout=5)
        self._register.close()

    # --- steps, carried out

    def _after_look(self, look: Callable[[State], T]) -> T:
        with self._lock:
            self._forget_if_stale()
            self._carry_out(self._journal.catch_up())
            return look(self._journal.state)

    def _change(self, act: Callable[[State], T]) -> T:
        with self._lock:
            self._forget_if_stale()
            before = self._journal.number
            result = self._carry_out(self._journal.change(act))
            if self._journal.number > before and self._journal.number > KEPT_VERSIONS:
                self._to_bury.append(self._journal.number - KEPT_VERSIONS)
        return result

    def _forget_if_stale(self) -> None:
        """Begin anew where this process was stopped for so long that a name it takes for free may have been in use."""
        if self._age_s() > _STALE_S:
            log.warning("this process was stopped for hours: what it knows of the store is void")
            self._journal = Journal(lambda: uuid.uuid4().hex)

    def _age_s(self) -> float:
        return _elapsed_s() - self._synced_s

    def _ask(self, request: Request) -> Any:
        """Have a request answered; note where that shows that the newest version is known."""
        asked_s = _elapsed_s()
        told = answer(self._register, request)
        next_version = version_name(self._journal.number + 1)
        match request:
            case Read(name) if told is None and name == next_version:
                self._synced_s = asked_s
            case Create() if told:
                self._synced_s = asked_s
        return told

    def _carry_out(self, steps: Steps[T]) -> T:
        """Do the steps; with the lock held. News is told to who waits.

        Raises:
            KVUnavailable
        """
        if self._closed.is_set():
            raise KVUnavailable("this client is closed")
        before = self._journal.number
        try:
            request = next(steps)
            while True:
                try:
                    if isinstance(request, Pause):
                        self._closed.wait(request.seconds * random.uniform(0.5, 1.5))
                        told = None
                    else:
                        told = self._ask(request)
                except KVUnavailable as error:
                    request = steps.throw(error)
                else:
                    request = steps.send(told)
        except StopIteration as end:
            if self._journal.number != before:
                self._tell_news()
            result: T = end.value
            return result

    def _tell_news(self) -> None:
        self._hot_until_s = time.monotonic() + self._pace.hot_s
        with self._changed:
            self._changed.notify_all()
        self._wake.set()

    # --- leases

    def _renew(self, lease: Lease) -> bool:
        name, content = beat_name(lease.lease_id), uuid.uuid4().hex.encode()
        if self._register.is_remote:  # now and then a request takes seconds, and a lease has few of them
            hedged(lambda: self._register.write(name, content), _HEDGE_FRACTION * lease.ttl_s)
        else:
            self._register.write(name, content)
        # Who judges has counted from the write before: one that comes too late is perhaps not looked at any more.
        is_in_time = time.monotonic() < lease.deadline_s
        self._look_if_behind()
        return is_in_time and lease.lease_id in self._journal.state.leases()

    def _look_if_behind(self) -> None:
        if self._age_s() > self._pace.slow_s:
            self._after_look(lambda state: None)

    def _revoke(self, lease_id: int) -> None:
        self._forget(lease_id)
        self._change(lambda state: state.revoke(lease_id))
        self._register.remove(beat_name(lease_id))

    def _forget(self, lease_id: int) -> None:
        with self._changed:
            self._leases.pop(lease_id, None)

    # --- the thread

    def _start(self) -> None:
        with self._changed:
            if self._poller is None and not self._closed.is_set():
                self._poller = threading.Thread(target=self._poll, name="kv-bucket", daemon=True)
                self._poller.start()

    def _poll(self) -> None:
        while not self._closed.is_set():
            woken = self._wake.is_set()
            self._wake.clear()
            trouble = None
            try:
                if woken or self._trouble is not None or time.monotonic() >= self._next_look_s:
                    self._after_look(lambda state: None)
                self._mind_leases()
                self._clean()
            except KVUnavailable as error:
                trouble = error
            except Exception as error:
                log.exception("the store's news are not read, trying again")
                trouble = KVUnavailable(f"{type(error).__name__}: {error}")
            if trouble is not None or self._trouble is not None:
                with self._changed:
                    self._trouble = trouble
                    self._changed.notify_all()
            self._wait()

    def _wait(self) -> None:
        now_s = time.monotonic()
        pause_s = self._pace.quick_s if now_s < self._hot_until_s else self._pace.slow_s
        self._next_look_s = now_s - self._age_s() + pause_s
        due_s = self._next_look_s
        if self._journal.state.leases():
            due_s = min(due_s, self._next_judging_s)
        self._wake.wait(max(self._pace.quick_s, due_s - now_s))
        if self._wake.is_set():  # news of our own: what follows from it may be there soon, and not at once
            self._closed.wait(self._pace.quick_s)

    def _mind_leases(self) -> None:
        """Look at leases that others hold, and end those that nobody renews."""
        now_s = time.monotonic()
        leases = self._journal.state.leases()
        if not leases or now_s < self._next_judging_s:
            return
        period_s = min(leases.values()) / self._pace.checks_per_ttl
        self._next_judging_s = now_s + period_s
        with self._changed:
            own = [lease_id for lease_id, lease in self._leases.items() if not lease.lost.is_set()]
        looked = self._judge.begin(leases, own, period_s, now_s)
        unread: KVUnavailable | None = None
        for lease_id in looked:
            asked_s = time.monotonic()
            try:
                content = self._register.read(beat_name(lease_id))
            except KVUnavailable as error:
                unread = error  # the others can be judged
            else:
                self._judge.note(lease_id, content, asked_s, time.monotonic())
            self._look_if_behind()  # of many leases this takes long
        for lease_id in self._judge.ended(leases, looked):
            log.info("lease %x was not renewed for %g s, and ends", lease_id, leases[lease_id])
            self._change(lambda state, lease_id=lease_id: state.revoke(lease_id))  # type: ignore[misc]
            self._register.remove(beat_name(lease_id))
        if unread is not None:
            raise unread

    def _clean(self) -> None:
        """Replace old versions by tombstones; remove tombstones that have stood for a day."""
        with self._lock:
            numbers, self._to_bury = self._to_bury, []
        for number in numbers:
            self._register.write(version_name(number), TOMBSTONE)
        now_s = time.monotonic()
        if now_s < self._next_sweep_s:
            return
        self._next_sweep_s = now_s + _SWEEP_EVERY_S
        oldest = self._journal.number - 2 * KEPT_VERSIONS
        names = [name for name in self._register.names(LOG) if 0 < number_of(name) < oldest]
        self._tombstones = {name: self._tombstones.get(name, now_s) for name in names}
        for name, since_s in self._tombstones.items():
            if now_s - since_s > _TOMBSTONE_KEPT_S:
                self._register.remove(name)


class _BucketWatch:
    def __init__(self, kv: BucketKV, prefix: str, from_revision: int) -> None:
        self._kv = kv
        self._prefix = prefix
        self._from_revision = from_revision
        self._cancelled = threading.Event()

    def next(self, timeout_s: float) -> tuple[WatchEvent, ...]:
        kv = self._kv
        ends_s = time.monotonic() + timeout_s
        while not self._cancelled.is_set() and not kv._closed.is_set():
            with kv._changed:
                number = kv._journal.number
            if found := self._found():
                return found
            with kv._changed:
                left_s = ends_s - time.monotonic()
                if left_s <= 0 and kv._trouble is not None:
                    raise kv._trouble
                if left_s <= 0:
                    return ()
                if kv._journal.number == number and not self._cancelled.is_set():
                    kv._changed.wait(left_s)
        return ()

    def _found(self) -> tuple[WatchEvent, ...]:
        kv = self._kv
        with kv._lock:
            journal = kv._journal
            if journal.number == 0:
                kv._carry_out(journal.catch_up())
            try:
                found = journal.events(self._prefix, self._from_revision)
            except Compacted:
                kv._carry_out(journal.look_back(self._from_revision))
                found = journal.events(self._prefix, self._from_revision)
            self._from_revision = max(self._from_revision, journal.state.revision + 1)
        return found

    def cancel(self) -> None:
        self._cancelled.set()
        with self._kv._changed:
            self._kv._changed.notify_all()
