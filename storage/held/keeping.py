"""A store that remembers in memory what is put into it: so a save's objects are held as they are stored."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import Executor

from storage.held.inventory import HeldObject
from storage.parallel import run_all
from storage.stores.objects import Fetch, ObjectInfo, ObjectStore, parts_of_size
from storage.stores.wrapper import StoreWrapper


class KeepingStore(StoreWrapper):
    """`store`, and of each object that is put by `put_from` the pieces of memory that it was fetched from.

    What was fetched once is whole, its checksums are made. Without `stores` nothing goes to the store: for a state that
    is held in memory only. The pieces keep no memory alive: that is for whoever has staged what is put. Whoever wraps a
    store so does not close the wrapper.
    """

    def __init__(self, store: ObjectStore, *, stores: bool = True) -> None:
        super().__init__(store)
        self._stores = stores
        self._lock = threading.Lock()
        self._kept: dict[str, HeldObject] = {}

    def put_from(self, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
        """See `ObjectStore.put_from`."""
        if self._stores:
            info = self._store.put_from(key, size_bytes, fetch, pool)
        else:
            run_all(pool, [functools.partial(fetch, *part) for part in parts_of_size(size_bytes)])
            info = ObjectInfo(key, size_bytes, "")
        kept = HeldObject(fetch(0, size_bytes))
        with self._lock:
            self._kept[key] = kept
        return info

    def objects(self, prefix: str) -> dict[str, HeldObject]:
        """What was put, by name below `prefix`."""
        with self._lock:
            return {key.removeprefix(prefix): kept for key, kept in self._kept.items()}
