"""The store within one process: for tests, the simulator's twin, and jobs of a single node.

`Hub` is the store (a `State` with a lock, a clock and an expiry thread), and what `embedded` serves over a socket;
`MemoryKV` is one client of it.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time

from launcher.kv.base import Entry, Snapshot, WatchEvent
from launcher.kv.lease import Lease
from launcher.kv.state import State

log = logging.getLogger(__name__)

_PAUSE_NOTICED_S = 1.0
_EXPIRY_PERIOD_S = 0.1


class Hub:
    """A store that several clients share. Safe for threads; its own one starts with the first lease."""

    def __init__(self, state: State | None = None) -> None:
        self._state = state or State(first_lease_id=secrets.randbits(48) + 1)
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._expiry: threading.Thread | None = None

    def _expire(self) -> None:
        last_s = time.monotonic()
        while not self._closed.wait(_EXPIRY_PERIOD_S):
            now_s = time.monotonic()
            late_s = now_s - last_s - _EXPIRY_PERIOD_S
            last_s = now_s
            with self._changed:
                if late_s > _PAUSE_NOTICED_S:
                    log.warning("the store was stopped for %.1f s; leases are longer by that much", late_s)
                    self._state.extend_all(late_s)
                before = self._state.revision
                self._state.expire(now_s)
                if self._state.revision != before:
                    self._changed.notify_all()

    def get(self, key: str) -> Entry | None:
        with self._changed:
            return self._state.get(key)

    def list(self, prefix: str) -> Snapshot:
        with self._changed:
            return self._state.list(prefix)

    def put(self, key: str, value: bytes, if_revision: int | None, lease_id: int | None) -> Entry | None:
        with self._changed:
            entry = self._state.put(key, value, if_revision, lease_id)
            if entry:
                self._changed.notify_all()
            return entry

    def delete(self, key: str, if_revision: int | None) -> bool:
        with self._changed:
            deleted = self._state.delete(key, if_revision)
            if deleted:
                self._changed.notify_all()
            return deleted

    def events(
        self, prefix: str, from_revision: int, timeout_s: float, cancelled: threading.Event | None = None
    ) -> tuple[tuple[WatchEvent, ...], int]:
        """Wait for changes. Returns them, and the revision to ask from next time."""
        ends_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                found = self._state.events(prefix, from_revision)
                left_s = ends_s - time.monotonic()
                if found or left_s <= 0 or self._closed.is_set() or (cancelled and cancelled.is_set()):
                    return found, max(from_revision, self._state.revision + 1)
                self._changed.wait(left_s)

    def grant(self, ttl_s: float) -> int:
        with self._changed:
            if self._expiry is None and not self._closed.is_set():
                self._expiry = threading.Thread(target=self._expire, name="kv-expiry", daemon=True)
                self._expiry.start()
            return self._state.grant(ttl_s, time.monotonic())

    def renew(self, lease_id: int) -> bool:
        with self._changed:
            return self._state.renew(lease_id, time.monotonic())

    def revoke(self, lease_id: int) -> None:
        with self._changed:
            self._state.revoke(lease_id)
            self._changed.notify_all()

    def wake(self) -> None:
        """Make waiting `events` calls look at their `cancelled`."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Let waiting `events` calls return, and end no more leases."""
        self._closed.set()
        self.wake()
        if self._expiry is not None:
            self._expiry.join(timeout=2)


class _MemoryWatch:
    def __init__(self, hub: Hub, prefix: str, from_revision: int) -> None:
        self._hub = hub
        self._prefix = prefix
        self._from_revision = from_revision
        self._cancelled = threading.Event()

    def next(self, timeout_s: float) -> tuple[WatchEvent, ...]:
        found, self._from_revision = self._hub.events(self._prefix, self._from_revision, timeout_s, self._cancelled)
        return found

    def cancel(self) -> None:
        self._cancelled.set()
        self._hub.wake()


class MemoryKV:
    """A client of `hub` in the same process."""

    def __init__(self, hub: Hub | None = None) -> None:
        self._own_hub = hub is None
        self.hub = hub or Hub()
        self._leases: list[Lease] = []

    def get(self, key: str) -> Entry | None:
        return self.hub.get(key)

    def put(
        self, key: str, value: bytes, *, if_revision: int | None = None, lease: Lease | None = None
    ) -> Entry | None:
        return self.hub.put(key, value, if_revision, lease.lease_id if lease else None)

    def list(self, prefix: str) -> Snapshot:
        return self.hub.list(prefix)

    def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        return self.hub.delete(key, if_revision)

    def watch(self, prefix: str, from_revision: int) -> _MemoryWatch:
        return _MemoryWatch(self.hub, prefix, from_revision)

    def lease(self, ttl_s: float) -> Lease:
        granted_s = time.monotonic()
        lease_id = self.hub.grant(ttl_s)
        lease = Lease(
            lease_id,
            ttl_s,
            granted_s=granted_s,
            renew=lambda: self.hub.renew(lease_id),
            revoke=lambda: self.hub.revoke(lease_id),
        ).start()
        self._leases.append(lease)
        return lease

    def close(self) -> None:
        for lease in self._leases:
            lease.stop()
        if self._own_hub:
            self.hub.close()
