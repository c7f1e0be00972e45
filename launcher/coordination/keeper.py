"""A node's own record: what the store should say of it, the lease that it lives under, and the thread that writes it.

The agent changes the record without ever waiting for the store; the thread writes it, and tries until it is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from typing import Any

from launcher.errors import KVUnavailable
from launcher.events import Emit, EventName
from launcher.kv import KV, Entry, Lease
from launcher.rounds.history import Exclusion
from launcher.rounds.records import LEFT, Node, Status

log = logging.getLogger(__name__)

_TICK_S = 1.0
_RETRY_S = 0.2
_FENCE_FRACTION = 0.15
_YIELD_FRACTION = 0.6
_CHECK_PERIOD_S = 10.0


class RecordKeeper:
    """`register` first, `leave` last. `lock` guards the record; `changed`, on that lock, is notified of changes."""

    def __init__(
        self,
        kv: KV,
        key: str,
        node: Node,
        lock: threading.RLock,
        changed: threading.Condition,
        emit: Emit,
        *,
        lease_ttl_s: float,
    ) -> None:
        self._kv = kv
        self._key = key
        self._record = node  # what the store should say of this node
        self._stored: Node | None = None
        self._revision = 0  # at which the store last had the record, as far as this node heard
        self._changed = changed
        self._to_write = threading.Condition(lock)  # one of its own: `changed` tells of every change of the job
        self._lease_ttl_s = lease_ttl_s
        self._lease: Lease | None = None
        self._fenced = False
        self._unfit = ""
        self._emit = emit
        self._silent_since_s: float | None = None
        self._checked_s = time.monotonic()
        self._registered_revision = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="member-record", daemon=True)

    @property
    def record(self) -> Node:
        """The record as it should be."""
        return self._record

    @property
    def lease(self) -> Lease | None:
        """The lease that the record lives under; what must go with this node is put under it too."""
        return self._lease

    @property
    def lease_ttl_s(self) -> float:
        """Of the lease as it was granted."""
        return self._lease.ttl_s if self._lease else self._lease_ttl_s

    @property
    def registered_revision(self) -> int:
        """The store's revision at which the record was last written under a new lease."""
        return self._registered_revision

    def change(self, **fields: Any) -> None:
        """Change fields of the record; it is written as soon as the store takes it."""
        with self._changed:
            self._record = dataclasses.replace(self._record, **fields)
            self._changed.notify_all()
            self._to_write.notify()

    def stand(self, excluded: Exclusion | None) -> None:
        """Say of a node that waits that it is excluded, or that it is ready again."""
        with self._changed:
            status = Status.EXCLUDED if excluded or self._unfit else Status.READY
            if self._record.status is not status and self._record.status in (Status.READY, Status.EXCLUDED):
                reason = f"excluded: {excluded.reason}" if excluded else "readmitted"
                log.warning("[%s] %s", self._record.node_id, reason)
                self.change(status=status, reason=reason)

    def hold_back(self, unfit: str) -> None:
        """Say that this node finds itself unfit to take part, and why; "" once it is fit. `stand` does not end that."""
        with self._changed:
            self._unfit = unfit
            if unfit:
                self.change(status=Status.EXCLUDED, reason=unfit)

    def fence(self) -> None:
        """The record is gone from the store: somebody deleted it, or the lease ended."""
        with self._changed:
            self._fenced = True
            self._changed.notify_all()

    def fenced(self) -> bool:
        """Whether this node must not run workers: its lease ended, or is so near its end that it cannot be saved.

        Workers are killed on this, before anybody else can see the lease end and start them elsewhere.
        """
        with self._changed:
            lease = self._lease
            if lease is not None:
                margin_s = _FENCE_FRACTION * lease.ttl_s
                if lease.lost.is_set() or time.monotonic() > lease.deadline_s - margin_s:
                    self._fenced = True
            return self._fenced

    def store_silent(self) -> bool:
        """Whether the store has been silent for so long that this node will be fenced soon if it goes on.

        Time to save what has been done: a refusal that proves that no lease ends is not silence.
        """
        lease = self._lease
        return lease is not None and time.monotonic() > lease.deadline_s - (1.0 - _YIELD_FRACTION) * lease.ttl_s

    def register(self, *, first: bool = False) -> Node:
        """Write the record under a new lease. Until that has succeeded, a fenced node stays fenced.

        Raises:
            KVUnavailable: the store does not answer, or another node has this one's id.
        """
        with self._changed:
            status = Status.EXCLUDED if self._unfit else Status.READY
            self._record = record = dataclasses.replace(self._record, status=status, failure=None)
        lease = self._kv.lease(self._lease_ttl_s)
        try:
            written = self._write_first(record, lease) if first else self._write_again(record, lease)
            if written is None:
                raise KVUnavailable("the lease ended at once, or the record changed meanwhile")
        except BaseException:
            lease.stop()
            raise
        with self._changed:
            before, self._lease = self._lease, lease
            self._stored = record
            self._registered_revision = self._revision = written.revision
            self._fenced = False
            self._to_write.notify()  # of changes that were made meanwhile
        if before is not None:
            before.revoke()  # with what else was under it, if it stands yet: a claim to lead, say
        return record

    def _write_first(self, record: Node, lease: Lease) -> Entry | None:
        """No two nodes may share an id: each would overwrite the other's record."""
        written = self._kv.put(self._key, record.to_json(), if_revision=0, lease=lease)
        if written is not None or (there := self._kv.get(self._key)) is None:
            return written
        if there.value != record.to_json():
            raise KVUnavailable(f"node id {record.node_id} is taken")
        # written before by this node, unheard: the answer was lost
        return self._kv.put(self._key, record.to_json(), if_revision=there.revision, lease=lease)

    def _write_again(self, record: Node, lease: Lease) -> Entry | None:
        there = self._kv.get(self._key)
        return self._kv.put(self._key, record.to_json(), if_revision=there.revision if there else 0, lease=lease)

    def start(self) -> None:
        """Start the thread that writes changes."""
        self._thread.start()

    def stop(self) -> None:
        """Write no more changes."""
        self._stopping.set()
        with self._to_write:
            self._to_write.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def leave(self) -> None:
        """After `stop`: say that this node goes of its own accord, and go."""
        if self._lease is None:
            return
        with contextlib.suppress(KVUnavailable):
            left = dataclasses.replace(self._record, status=Status.EXCLUDED, reason=LEFT)
            self._kv.put(self._key, left.to_json(), lease=self._lease)
            self._tell_back()  # the lease's next renewal would have shown it
        self._lease.revoke()

    def _keep(self) -> None:
        failed = False  # told once: an outage of the store is long, and its end is told too
        while not self._stopping.is_set():
            self._tell_silence()
            with self._changed:
                idle = self._stored == self._record or self._fenced
                if idle and (self._fenced or time.monotonic() < self._checked_s + _CHECK_PERIOD_S):
                    self._to_write.wait(_TICK_S)
                    continue
            written = False
            try:
                written = self._check() if idle else self._write()
            except KVUnavailable as error:
                if not failed:
                    log.warning("[%s] record not written, trying until it is: %s", self._record.node_id, error)
            except Exception:
                log.exception("[%s] record not written, trying again", self._record.node_id)
            failed = not written
            if failed:
                self._stopping.wait(_RETRY_S)

    def _tell_silence(self) -> None:
        silence = self._lease.silence if self._lease else None
        generation = self._record.generation
        if silence is not None and self._silent_since_s is None:
            self._silent_since_s = silence.since_s
            told = {"reason": silence.reason, "leases_stand": silence.stands}
            seconds = round(time.monotonic() - silence.since_s, 3)
            self._emit(EventName.STORE_UNREACHABLE, generation=generation, seconds=seconds, **told)
        elif silence is None:
            self._tell_back()

    def _tell_back(self) -> None:
        if self._silent_since_s is not None:
            seconds = round(time.monotonic() - self._silent_since_s, 3)
            self._silent_since_s = None
            self._emit(EventName.STORE_BACK, generation=self._record.generation, seconds=seconds)
            log.warning("[%s] the store answers again, after %.1f s", self._record.node_id, seconds)

    def _check(self) -> bool:
        """See that the record is still there: nobody else would miss one that was deleted while its lease stands."""
        lease = self._lease
        there = self._kv.get(self._key)
        with self._changed:
            self._checked_s = time.monotonic()
            if lease is self._lease and not self._fenced:
                self._take(there)
        return True

    def _take(self, there: Entry | None) -> None:
        """Learn what the store has in the place of what was written last."""
        if there is None:
            log.error("[%s] this node's record was deleted", self._record.node_id)
            self.fence()
        elif there.revision != self._revision:
            self._revision, self._stored = there.revision, None

    def _write(self) -> bool:
        """Write the record as it is now. The store is asked without the lock: it may be slow, the agent may not.

        Only in the place of what was there: a write that was given up, and that the store carries out late, must not
        replace a newer one, nor bring back a record that another node deleted.
        """
        with self._changed:
            record, lease, revision = self._record, self._lease, self._revision
        if lease is None or lease.lost.is_set():
            return False
        written = self._kv.put(self._key, record.to_json(), if_revision=revision, lease=lease)
        there = written or self._kv.get(self._key)
        with self._changed:
            if lease is not self._lease:  # registered anew meanwhile
                return False
            if written is None:
                self._take(there)
                return False
            self._stored, self._revision = record, written.revision
        return True
