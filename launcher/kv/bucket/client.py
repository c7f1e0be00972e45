"""A client of the store on a register: a `KV` around a `Journal`, with one thread that looks for news.

How often it looks follows from what happens: some times a second, or some tens of times, while something changes, and
every second or two while nothing does (`PollPace`). A put is one request where nobody else writes, and a look is one.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
import uuid
from dataclasses import dataclass

from launcher.errors import KVUnavailable
from launcher.kv.base import Entry, Snapshot, WatchEvent
from launcher.kv.bucket.beat import beat_content, beat_name, told_in
from launcher.kv.bucket.hedge import hedged
from launcher.kv.bucket.judge import Judge
from launcher.kv.bucket.ops import DeleteKey, EndLease, GrantLease, Op, PutKey, Result, entry_of
from launcher.kv.bucket.register import Register
from launcher.kv.bucket.shared import SharedJournal
from launcher.kv.bucket.upkeep import Upkeep
from launcher.kv.lease import Lease

log = logging.getLogger(__name__)

_HEDGE_FRACTION = 0.125
_BEHIND_FACTOR = 1.2
_QUIET_S, _TIDY_AT_LEAST_EVERY_S = 1.0, 20.0


@dataclass(frozen=True)
class PollPace:
    """How often a client looks, and tells that it is there.

    Attributes:
        quick_s, slow_s: seconds between two looks for news, at least and at most.
        slows_down: a look is as far from the last one as this part of the time since something changed: who has waited
            for long waits a little longer. And twice as far as it takes, where that is long.
        renewals_per_ttl: of its own leases. A worker is asked to yield at 0.6 of a lease without a renewal.
        checks_per_ttl: looks at another's lease.
        turn_s: the first pause while another writes what many wish: what that takes, about.
    """

    quick_s: float
    slow_s: float
    renewals_per_ttl: float
    checks_per_ttl: float
    turn_s: float
    slows_down: float = 0.15


LOCAL_PACE = PollPace(quick_s=0.01, slow_s=0.25, renewals_per_ttl=4, checks_per_ttl=8, turn_s=0.005)
REMOTE_PACE = PollPace(quick_s=0.1, slow_s=3.0, renewals_per_ttl=3, checks_per_ttl=3, turn_s=0.03)


class BucketKV:
    """The store on `register`, which is closed with it. The first watch or lease starts its thread."""

    def __init__(self, register: Register, pace: PollPace | None = None) -> None:
        self._register = register
        self._pace = pace or (REMOTE_PACE if register.is_remote else LOCAL_PACE)
        self._journal = SharedJournal(register, self._pace.turn_s, self._tell_news)
        self._changed = threading.Condition()  # of what follows, and told when there is news
        self._trouble: KVUnavailable | None = None
        self._news_s = time.monotonic()  # when something changed last
        self._look_took_s = 0.0
        self._tidied_s = self._news_s
        self._leases: dict[int, Lease] = {}
        self._ungranted: set[int] = set()  # those of them that are in no version yet
        self._granting = threading.Lock()
        self._told: dict[int, dict[str, bytes]] = {}  # what goes along with a lease's renewals
        self._poller: threading.Thread | None = None
        self._closed = self._journal.closed
        self._wake = threading.Event()
        self._judge = Judge()
        self._next_look_s = self._next_judging_s = 0.0
        self._upkeep = Upkeep(register, self._journal, time.monotonic())

    # --- the contract

    def get(self, key: str) -> Entry | None:
        return self._journal.look().get(key)

    def list(self, prefix: str) -> Snapshot:
        return self._journal.look().list(prefix)

    def known(self, prefix: str) -> Snapshot:
        """See `base.Remembers`."""
        journal = self._journal
        return (journal.state if journal.unlooked_s < self._pace.slow_s else journal.look()).list(prefix)

    def put(
        self, key: str, value: bytes, *, if_revision: int | None = None, lease: Lease | None = None
    ) -> Entry | None:
        if lease is not None and lease.lease_id in self._ungranted:
            return self._put_first(PutKey(key, value, if_revision, lease.lease_id, lease.ttl_s), lease)
        put = PutKey(key, value, if_revision, lease.lease_id if lease else 0)
        return entry_of(put, self._change(put))

    def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        return self._change(DeleteKey(key, if_revision)) is True

    def watch(self, prefix: str, from_revision: int) -> _BucketWatch:
        self._start()
        return _BucketWatch(self, prefix, from_revision)

    def lease(self, ttl_s: float) -> Lease:
        """As the contract has it; what is put under it first, or its first renewal, brings it into a version."""
        lease_id = secrets.randbits(48) + 1
        lease = Lease(
            lease_id,
            ttl_s,
            granted_s=time.monotonic(),
            renew=lambda: self._renew(lease),
            revoke=lambda: self._revoke(lease_id),
            close=lambda: self._forget(lease_id),
        )
        lease.renewals_per_ttl = self._pace.renewals_per_ttl
        with self._changed:
            self._leases[lease_id] = lease
            self._ungranted.add(lease_id)
        lease.start()
        self._start()
        return lease

    def tell(self, key: str, value: bytes, lease: Lease) -> None:
        """See `aside.TellsAside`."""
        with self._changed:
            if lease.lease_id in self._leases:
                self._told[lease.lease_id] = {**self._told.get(lease.lease_id, {}), key: value}

    def told(self, prefix: str) -> dict[str, bytes]:
        """See `aside.TellsAside`."""
        leases = self._journal.look().leases()
        contents = self._journal.read_all([beat_name(lease_id) for lease_id in leases])
        told = [told_in(content) for content in contents if isinstance(content, bytes)]
        return {key: value for one in told for key, value in one.items() if key.startswith(prefix)}

    def close(self) -> None:
        for lease in list(self._leases.values()):
            lease.stop()
        self._closed.set()
        self._wake.set()
        with self._changed:
            self._changed.notify_all()
        if self._poller is not None:
            self._poller.join(timeout=5)
        with contextlib.suppress(KVUnavailable):
            self._upkeep.tidy(time.monotonic())
        self._register.close()

    def _change(self, op: Op) -> Result:
        return self._journal.change(op).results[0]

    def _tell_news(self) -> None:
        self._news_s = time.monotonic()
        with self._changed:
            self._changed.notify_all()
        self._wake.set()

    # --- leases

    def _put_first(self, op: PutKey, lease: Lease) -> Entry | None:
        """Have a lease granted with what is put under it. No second time: it might have ended meanwhile."""
        with self._granting:
            if lease.lease_id not in self._ungranted:  # another thread was first
                return self.put(op.key, op.value, if_revision=op.if_revision, lease=lease)
            try:
                results, since_s = self._journal.change(op)
            except KVUnavailable:
                self._ungranted.discard(lease.lease_id)
                raise
            if results[0] is not None:  # else nothing was written
                self._ungranted.discard(lease.lease_id)
                lease.count_from(since_s)
        return entry_of(op, results[0])

    def _grant(self, lease: Lease) -> None:
        with self._granting:
            if lease.lease_id in self._ungranted:
                self._ungranted.discard(lease.lease_id)
                lease.count_from(self._journal.change(GrantLease(lease.lease_id, lease.ttl_s)).since_s)

    def _renew(self, lease: Lease) -> bool:
        if lease.lease_id in self._ungranted:
            self._grant(lease)
        told = dict(self._told.get(lease.lease_id, {}))
        name, content = beat_name(lease.lease_id), beat_content(uuid.uuid4().hex, told)
        if self._register.is_remote:  # now and then a request takes seconds, and a lease has few of them
            hedged(lambda: self._register.write(name, content), _HEDGE_FRACTION * lease.ttl_s)
        else:
            self._register.write(name, content)
        # Who judges has counted from the write before: one that comes too late is perhaps not looked at any more.
        is_in_time = time.monotonic() < lease.deadline_s
        self._look_if_behind()
        return is_in_time and lease.lease_id in self._journal.state.leases()

    def _look_if_behind(self) -> None:
        if self._journal.age_s > _BEHIND_FACTOR * self._pace.slow_s:  # else the thread's own look is about to come
            self._journal.look_unless_busy()  # a beat that was told must not be counted late, nor the next one be

    def _revoke(self, lease_id: int) -> None:
        self._forget(lease_id)
        with self._granting:
            if lease_id in self._ungranted:
                self._ungranted.discard(lease_id)
                return
        self._change(EndLease(lease_id))
        self._register.remove(beat_name(lease_id))

    def _forget(self, lease_id: int) -> None:
        with self._changed:
            self._leases.pop(lease_id, None)
            self._told.pop(lease_id, None)

    # --- the thread

    def _start(self) -> None:
        with self._changed:
            if self._poller is None and not self._closed.is_set():
                self._poller = threading.Thread(target=self._poll, name="kv-bucket", daemon=True)
                self._poller.start()

    def _poll(self) -> None:
        while not self._closed.is_set():
            self._wake.clear()
            trouble = None
            try:
                if self._trouble is not None or time.monotonic() >= self._next_look_s:
                    self._look_took_s = self._journal.peek(0.0 if self._trouble else self._pace.quick_s)
                self._mind_leases()
                self._tidy_when_quiet()
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
        pace = self._pace
        pause_s = max(pace.quick_s, pace.slows_down * (now_s - self._news_s), 2 * self._look_took_s)
        pause_s = min(pause_s, pace.slow_s)
        self._next_look_s = now_s - self._journal.unlooked_s + pause_s
        due_s = self._next_look_s
        if self._journal.state.leases():
            due_s = min(due_s, self._next_judging_s)
        self._wake.wait(max(self._pace.quick_s, due_s - now_s))
        if self._wake.is_set():  # news of our own: what follows from it may be there soon, and not at once
            self._closed.wait(self._pace.quick_s)

    def _tidy_when_quiet(self) -> None:
        """Nobody waits for what is tidied up: while something changes, the store has better things to do."""
        now_s = time.monotonic()
        if now_s - self._news_s > _QUIET_S or now_s - self._tidied_s > _TIDY_AT_LEAST_EVERY_S:
            self._tidied_s = now_s
            self._upkeep.tidy(now_s)

    def _mind_leases(self) -> None:
        """Look at leases that others hold, and end those that nobody renews."""
        now_s = time.monotonic()
        leases = self._journal.state.leases()
        if not leases or now_s < self._next_judging_s:
            return
        period_s = min(leases.values()) / self._pace.checks_per_ttl
        is_first, self._next_judging_s = self._next_judging_s == 0.0, now_s + period_s
        if is_first:  # who has just come finds nobody silent, and others write now
            return
        with self._changed:
            own = [lease_id for lease_id, lease in self._leases.items() if not lease.lost.is_set()]
        looked = self._judge.begin(leases, own, now_s)
        contents = self._journal.read_all([beat_name(lease_id) for lease_id in looked])
        answered_s = time.monotonic()
        unread: KVUnavailable | None = None
        for lease_id, content in zip(looked, contents, strict=True):
            if isinstance(content, KVUnavailable):
                unread = content  # the others can be judged
            else:
                self._judge.note(lease_id, content, now_s, answered_s)
        soon_s = time.monotonic() + self._pace.quick_s
        self._next_judging_s = min(self._next_judging_s, max(soon_s, self._judge.due_s(leases)))
        if ended := self._judge.ended(leases, looked):
            log.info("not renewed, and ended: leases %s", ", ".join(f"{i:x} of {leases[i]:g} s" for i in ended))
            self._journal.change(*map(EndLease, ended))
        for lease_id in ended:
            self._register.remove(beat_name(lease_id))
        if unread is not None:
            raise unread


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
            found, self._from_revision = kv._journal.events(self._prefix, self._from_revision)
            if found:
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

    def cancel(self) -> None:
        self._cancelled.set()
        with self._kv._changed:
            self._kv._changed.notify_all()
