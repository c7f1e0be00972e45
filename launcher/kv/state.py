"""The store itself as a state machine: keys, revisions, leases and a bounded history. No clock, no thread, no I/O.

`memory` and `embedded` put a lock, a clock and a socket around it; the simulator drives it with virtual time.
"""

from __future__ import annotations

import base64
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import Compacted
from launcher.kv.base import Entry, Snapshot, WatchEvent

HISTORY_EVENTS = 10_000


@dataclass
class _Grant:
    ttl_s: float
    ends_s: float
    keys: set[str] = field(default_factory=set)


class State:
    """A store's keys and leases. Methods that depend on time take `now_s`, of one monotonic clock for all calls."""

    def __init__(self, history_events: int = HISTORY_EVENTS, first_lease_id: int = 1) -> None:
        """`first_lease_id`: random where clients may outlive a store: an old lease must not be a new one's id."""
        self.revision = 0
        self._entries: dict[str, Entry] = {}
        self._lease_of: dict[str, int] = {}
        self._grants: dict[int, _Grant] = {}
        self._history: deque[WatchEvent] = deque(maxlen=history_events)
        self._next_lease_id = first_lease_id

    def get(self, key: str) -> Entry | None:
        """Return the entry of `key`, or None."""
        return self._entries.get(key)

    def list(self, prefix: str) -> Snapshot:
        """Return the entries under `prefix`, in the order of their keys."""
        found = (self._entries[key] for key in sorted(self._entries) if key.startswith(prefix))
        return Snapshot(tuple(found), self.revision)

    def put(self, key: str, value: bytes, if_revision: int | None, lease_id: int | None) -> Entry | None:
        """Write `key`. Returns None on a lost race or an unknown lease."""
        current = self._entries.get(key)
        if if_revision is not None and (current.revision if current else 0) != if_revision:
            return None
        if lease_id is not None and lease_id not in self._grants:
            return None
        self._detach(key)
        if lease_id is not None:
            self._lease_of[key] = lease_id
            self._grants[lease_id].keys.add(key)
        self.revision += 1
        created = current.create_revision if current else self.revision
        entry = Entry(key, value, self.revision, created)
        self._entries[key] = entry
        self._history.append(WatchEvent(key, entry, self.revision))
        return entry

    def delete(self, key: str, if_revision: int | None = None) -> bool:
        """Delete `key` if it is there (at `if_revision`)."""
        current = self._entries.get(key)
        if current is None or (if_revision is not None and current.revision != if_revision):
            return False
        self._detach(key)
        del self._entries[key]
        self.revision += 1
        self._history.append(WatchEvent(key, None, self.revision))
        return True

    def events(self, prefix: str, from_revision: int) -> tuple[WatchEvent, ...]:
        """Return the changes under `prefix` from `from_revision` on.

        Raises:
            Compacted: some of them are no longer in the history.
        """
        oldest = self._history[0].revision if self._history else 1
        if from_revision < oldest and oldest > 1:
            raise Compacted(f"revision {from_revision} is forgotten; the oldest kept is {oldest}")
        recent: deque[WatchEvent] = deque()
        for event in reversed(self._history):
            if event.revision < from_revision:
                break
            if event.key.startswith(prefix):
                recent.appendleft(event)
        return tuple(recent)

    def grant(self, ttl_s: float, now_s: float) -> int:
        """Grant a lease, and return its id."""
        lease_id = self._next_lease_id
        self._next_lease_id += 1
        self._grants[lease_id] = _Grant(ttl_s, now_s + ttl_s)
        return lease_id

    def adopt(self, lease_id: int, ttl_s: float) -> None:
        """Grant a lease under an id that its holder has made up; it ends when it is revoked, not with time."""
        self._grants.setdefault(lease_id, _Grant(ttl_s, math.inf))

    def renew(self, lease_id: int, now_s: float) -> bool:
        """Start the lease's TTL anew. Returns False if the lease has ended."""
        grant = self._grants.get(lease_id)
        if grant is None:
            return False
        grant.ends_s = now_s + grant.ttl_s
        return True

    def revoke(self, lease_id: int) -> None:
        """End a lease and delete its keys."""
        grant = self._grants.pop(lease_id, None)
        for key in sorted(grant.keys) if grant else ():
            self.delete(key)

    def expire(self, now_s: float) -> float | None:
        """End the leases whose time is over. Returns when the next one would end, or None."""
        for lease_id in [i for i, grant in self._grants.items() if grant.ends_s <= now_s]:
            self.revoke(lease_id)
        return min((grant.ends_s for grant in self._grants.values()), default=None)

    def leases(self) -> dict[int, float]:
        """The TTL of each lease, seconds."""
        return {lease_id: grant.ttl_s for lease_id, grant in self._grants.items()}

    def dump(self) -> dict[str, Any]:
        """All but the history and the times at which leases end, as what JSON knows."""
        return {
            "revision": self.revision,
            "next_lease": self._next_lease_id,
            "entries": [
                [entry.key, base64.b64encode(entry.value).decode(), entry.revision, entry.create_revision]
                for entry in self._entries.values()
            ],
            "leases": [[lease_id, grant.ttl_s, sorted(grant.keys)] for lease_id, grant in self._grants.items()],
        }

    @classmethod
    def load(cls, told: dict[str, Any]) -> State:
        """The state that `dump` has told of, without its history; its leases end when they are revoked, not with time.

        Raises:
            ValueError, KeyError, TypeError: it has told of none.
        """
        state = cls(first_lease_id=int(told["next_lease"]))
        state.revision = int(told["revision"])
        for key, value, revision, created in told["entries"]:
            state._entries[str(key)] = Entry(
                str(key), base64.b64decode(value, validate=True), int(revision), int(created)
            )
        for lease_id, ttl_s, keys in told["leases"]:
            state._grants[int(lease_id)] = _Grant(float(ttl_s), math.inf, set(map(str, keys)))
            state._lease_of |= {str(key): int(lease_id) for key in keys}
        return state

    def fork(self) -> State:
        """A copy without the history, which may be changed on its own."""
        copy = State(first_lease_id=self._next_lease_id)
        copy.revision = self.revision
        copy._entries = dict(self._entries)
        copy._lease_of = dict(self._lease_of)
        copy._grants = {i: _Grant(grant.ttl_s, grant.ends_s, set(grant.keys)) for i, grant in self._grants.items()}
        return copy

    def extend_all(self, seconds: float) -> None:
        """Add `seconds` to every lease: the store itself was stopped for so long that nobody could renew."""
        for grant in self._grants.values():
            grant.ends_s += seconds

    def _detach(self, key: str) -> None:
        lease_id = self._lease_of.pop(key, None)
        if lease_id is not None and lease_id in self._grants:
            self._grants[lease_id].keys.discard(key)
