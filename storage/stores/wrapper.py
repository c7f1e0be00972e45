"""A store around another one: every method of the contract is passed on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

from storage.stores.buffers import Buffer
from storage.stores.objects import Capability, Fetch, ObjectInfo, ObjectStore, Upload


class StoreWrapper(ObjectStore):
    """The store behind it, method for method: what wraps a store overrides what it changes, and loses nothing else.

    Closing it closes the store behind it, which it therefore owns.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.retries = store.retries

    @property
    def url(self) -> str:
        """See `ObjectStore.url`."""
        return self._store.url

    def can(self, capability: Capability) -> bool:
        """See `ObjectStore.can`."""
        return self._store.can(capability)

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        """See `ObjectStore.put`."""
        return self._store.put(key, buffers, if_absent=if_absent)

    def put_from(self, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
        """See `ObjectStore.put_from`."""
        return self._store.put_from(key, size_bytes, fetch, pool)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        """See `ObjectStore.read_into`."""
        return self._store.read_into(key, offset, buffers, if_match=if_match)

    def read(self, key: str) -> bytes:
        """See `ObjectStore.read`."""
        return self._store.read(key)

    def info(self, key: str) -> ObjectInfo:
        """See `ObjectStore.info`."""
        return self._store.info(key)

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        """See `ObjectStore.list`."""
        return self._store.list(prefix)

    def folders(self, prefix: str) -> Sequence[str]:
        """See `ObjectStore.folders`."""
        return self._store.folders(prefix)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        self._store.delete(key)

    def delete_version(self, key: str, etag: str) -> bool:
        """See `ObjectStore.delete_version`."""
        return self._store.delete_version(key, etag)

    def uploads(self) -> Sequence[Upload]:
        """See `ObjectStore.uploads`."""
        return self._store.uploads()

    def abort(self, upload: Upload) -> None:
        """See `ObjectStore.abort`."""
        self._store.abort(upload)

    def impatient(self, timeout_s: float) -> ObjectStore:
        """See `ObjectStore.impatient`."""
        return self._store.impatient(timeout_s)

    def bite_bytes(self, key: str) -> int | None:
        """See `ObjectStore.bite_bytes`."""
        return self._store.bite_bytes(key)

    def num_readers(self, key: str) -> int | None:
        """See `ObjectStore.num_readers`."""
        return self._store.num_readers(key)

    def doubt(self, key: str, reason: str) -> bool:
        """See `ObjectStore.doubt`."""
        return self._store.doubt(key, reason)

    def close(self) -> None:
        """See `ObjectStore.close`."""
        self._store.close()
