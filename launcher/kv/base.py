"""The contract of a rendezvous store, a subset of etcd v3's.

Revisions: every successful write takes the store's next revision, so revisions order all writes of all keys. A key's
`create_revision` is that of the write that made it, its `revision` that of the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from launcher.kv.lease import Lease


@dataclass(frozen=True)
class Entry:
    """A key as it stood after the write of `revision`."""

    key: str
    value: bytes
    revision: int
    create_revision: int


@dataclass(frozen=True)
class Snapshot:
    """All entries under a prefix, in the order of their keys, as of one `revision` of the store."""

    entries: tuple[Entry, ...]
    revision: int


@dataclass(frozen=True)
class WatchEvent:
    """One change: the new entry, or None where the key was deleted or its lease ended."""

    key: str
    entry: Entry | None
    revision: int


class Watch(Protocol):
    """Changes under a prefix, each exactly once, in order of revision. For one thread."""

    def next(self, timeout_s: float) -> tuple[WatchEvent, ...]:
        """Wait for changes, and return all that are there; none after `timeout_s`.

        Raises:
            Compacted: the next revision is forgotten; list again.
            KVUnavailable: the store does not answer; calling again resumes where this watch stood.
        """
        ...

    def cancel(self) -> None:
        """Stop watching; a `next` in another thread returns soon."""
        ...


class KV(Protocol):
    """A store of small values. All methods may be called from any thread; none blocks longer than a few seconds.

    Every method raises `KVUnavailable` where the store does not answer. A write that raised may still have happened.
    """

    def get(self, key: str) -> Entry | None:
        """Return the entry of `key`, or None."""
        ...

    def put(
        self, key: str, value: bytes, *, if_revision: int | None = None, lease: Lease | None = None
    ) -> Entry | None:
        """Write `key`, atomically. With `if_revision` at most once; without, again where the first answer did not come:
        watches may see two writes of one value, and what another wrote in between is replaced.

        Args:
            if_revision: write only if the key's revision is still this one; 0: only if the key does not exist.
            lease: the key is deleted when it ends. Without one the key stays, and leaves the lease that it had.

        Returns:
            The entry as written; None where nothing was, because another was first or the lease has ended.
        """
        ...

    def list(self, prefix: str) -> Snapshot:
        """Return every entry whose key starts with `prefix`."""
        ...

    def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        """Delete `key`. Returns False where it does not exist, or is not at `if_revision`."""
        ...

    def watch(self, prefix: str, from_revision: int) -> Watch:
        """Watch for changes under `prefix` whose revision is at least `from_revision`, past ones included."""
        ...

    def lease(self, ttl_s: float) -> Lease:
        """Grant a lease that renews itself on a thread of its own until it is revoked or lost."""
        ...

    def close(self) -> None:
        """Let go of connections and threads; leases are left to end by themselves."""
        ...


@runtime_checkable
class Remembers(Protocol):
    """What a store can do besides, a client of which holds all keys: tell some with no request."""

    def known(self, prefix: str) -> Snapshot:
        """As `KV.list`, as of a moment ago perhaps, but not of before what this client has read or written. For whoever
        hears of changes anyway."""
        ...
