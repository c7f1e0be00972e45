"""The keys of a store that start with one prefix, without that prefix: etcd's `namespace`."""

from __future__ import annotations

import dataclasses

from launcher.kv.base import KV, Entry, Remembers, Snapshot, Watch, WatchEvent
from launcher.kv.lease import Lease


class Prefixed:
    """A `KV` over `kv` in which every key stands without `prefix`, which may be "". Views may be put on one another."""

    def __init__(self, kv: KV, prefix: str) -> None:
        self._kv = kv
        self._prefix = prefix

    def get(self, key: str) -> Entry | None:
        return self._without_prefix(self._kv.get(self._prefix + key))

    def put(
        self, key: str, value: bytes, *, if_revision: int | None = None, lease: Lease | None = None
    ) -> Entry | None:
        return self._without_prefix(self._kv.put(self._prefix + key, value, if_revision=if_revision, lease=lease))

    def list(self, prefix: str) -> Snapshot:
        return self._without_prefixes(self._kv.list(self._prefix + prefix))

    def known(self, prefix: str) -> Snapshot:
        """See `base.Remembers`."""
        if not isinstance(self._kv, Remembers):
            return self.list(prefix)
        return self._without_prefixes(self._kv.known(self._prefix + prefix))

    def _without_prefixes(self, found: Snapshot) -> Snapshot:
        entries = (self._without_prefix(entry) for entry in found.entries)
        return Snapshot(tuple(entry for entry in entries if entry), found.revision)

    def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        return self._kv.delete(self._prefix + key, if_revision=if_revision)

    def watch(self, prefix: str, from_revision: int) -> Watch:
        return _PrefixedWatch(self._kv.watch(self._prefix + prefix, from_revision), self._prefix)

    def lease(self, ttl_s: float) -> Lease:
        return self._kv.lease(ttl_s)

    def close(self) -> None:
        """Do nothing: the store is closed by whoever opened it."""

    def _without_prefix(self, entry: Entry | None) -> Entry | None:
        return dataclasses.replace(entry, key=entry.key.removeprefix(self._prefix)) if entry else None


class _PrefixedWatch:
    def __init__(self, watch: Watch, prefix: str) -> None:
        self._watch = watch
        self._prefix = prefix

    def next(self, timeout_s: float) -> tuple[WatchEvent, ...]:
        return tuple(self._without_prefix(event) for event in self._watch.next(timeout_s))

    def cancel(self) -> None:
        self._watch.cancel()

    def _without_prefix(self, event: WatchEvent) -> WatchEvent:
        key = event.key.removeprefix(self._prefix)
        entry = dataclasses.replace(event.entry, key=key) if event.entry else None
        return WatchEvent(key, entry, event.revision)
