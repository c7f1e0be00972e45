"""A store around a remote one: every operation is tried again as the table in `storage.stores.retry_policy` says."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor

from storage.errors import AlreadyExists, Interrupted, NotFound, Transient
from storage.stores.adaptive_limit import AdaptiveLimit
from storage.stores.buffers import Buffer, skip, views_of
from storage.stores.objects import Capability, Fetch, ObjectInfo, ObjectStore, Upload
from storage.stores.retry_policy import IMPATIENT_RULES, Retrier, RetryLog
from storage.stores.wrapper import StoreWrapper

_COMPARED_SIZE_BYTES = 8 * 1024 * 1024
_NUM_IMPATIENT_MAX = 32
"""Requests that must not wait are small and few; a second try beside one that takes long is one of them."""


class RetryingStore(StoreWrapper):
    """The store behind it, with its Transient errors tried again.

    A put with `if_absent` whose answer was lost may have arrived: a later try that meets the object compares it with
    what was sent, and counts it as its own where they are equal.
    """

    def __init__(self, store: ObjectStore, retrier: Retrier) -> None:
        super().__init__(store)
        self._retrier = retrier
        self.retries = retrier.retries

    def can(self, capability: Capability) -> bool:
        """See `ObjectStore.can`."""
        return self._retrier.call(f"probe of {self.url}", lambda: self._store.can(capability))

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        """See `ObjectStore.put`."""
        doubts: list[Transient] = []

        def attempt() -> ObjectInfo:
            try:
                return self._store.put(key, buffers, if_absent=if_absent)
            except Transient as error:
                doubts.append(error)
                raise
            except AlreadyExists:
                if doubts and (info := stored_equal(self._store, key, views_of(buffers))) is not None:
                    return info
                raise

        return self._retrier.call(f"put {key}", attempt)

    def put_from(self, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
        """See `ObjectStore.put_from`. After a failure the object is begun anew."""
        # the content may come from a store that shares this limit: whoever waits for it must hold no slot
        put = functools.partial(self._store.put_from, key, size_bytes, fetch, pool)
        return self._retrier.call(f"put {key}", put, takes_slot=False)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        """See `ObjectStore.read_into`. What a broken read has brought is not fetched again."""
        return read_resuming(self._store, self._retrier, key, offset, buffers, if_match)

    def read(self, key: str) -> bytes:
        """See `ObjectStore.read`."""
        return self._retrier.call(f"read {key}", lambda: self._store.read(key))

    def info(self, key: str) -> ObjectInfo:
        """See `ObjectStore.info`."""
        return self._retrier.call(f"info {key}", lambda: self._store.info(key))

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        """See `ObjectStore.list`."""
        return self._retrier.call(f"list {prefix}", lambda: self._store.list(prefix))

    def folders(self, prefix: str) -> Sequence[str]:
        """See `ObjectStore.folders`."""
        return self._retrier.call(f"folders {prefix}", lambda: self._store.folders(prefix))

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        self._retrier.call(f"delete {key}", lambda: self._store.delete(key))

    def delete_version(self, key: str, etag: str) -> bool:
        """See `ObjectStore.delete_version`."""
        return self._retrier.call(f"delete {key}", lambda: self._store.delete_version(key, etag))

    def uploads(self) -> Sequence[Upload]:
        """See `ObjectStore.uploads`."""
        return self._retrier.call("list uploads", self._store.uploads)

    def abort(self, upload: Upload) -> None:
        """See `ObjectStore.abort`."""
        self._retrier.call(f"abort {upload.key}", lambda: self._store.abort(upload))

    def impatient(self, timeout_s: float) -> ObjectStore:
        """See `ObjectStore.impatient`. What is tried again is counted apart."""
        retrier = Retrier(AdaptiveLimit(_NUM_IMPATIENT_MAX), RetryLog(self.retries.health), IMPATIENT_RULES)
        return RetryingStore(self._store.impatient(timeout_s), retrier)


def read_resuming(
    store: ObjectStore,
    retrier: Retrier,
    key: str,
    offset: int,
    buffers: Sequence[memoryview],
    if_match: str | None,
) -> str:
    """Like `store.read_into`, but a read that broke off goes on where it ended, in the same version of the object."""
    rest, at, etag = list(buffers), offset, if_match

    def attempt() -> str:
        nonlocal rest, at, etag
        try:
            return store.read_into(key, at, rest, if_match=etag)
        except Interrupted as error:
            if error.received_bytes:
                rest, at, etag = skip(rest, error.received_bytes), at + error.received_bytes, etag or error.etag or None
            raise

    def progressed(error: Transient) -> bool:
        return isinstance(error, Interrupted) and error.received_bytes > 0

    return retrier.call(f"read {key} from byte {offset}", attempt, progressed)


def stored_equal(store: ObjectStore, key: str, views: Iterable[memoryview]) -> ObjectInfo | None:
    """The object's info if it holds exactly the bytes of `views`, else None."""
    try:
        info = store.info(key)
        memory, read_bytes = memoryview(bytearray(min(_COMPARED_SIZE_BYTES, info.size_bytes))), 0
        found = memory[:0]
        for expected in views:
            while expected.nbytes:
                if not found.nbytes:
                    found = memory[: info.size_bytes - read_bytes]
                    store.read_into(key, read_bytes, [found], if_match=info.etag)
                    read_bytes += found.nbytes
                size = min(expected.nbytes, found.nbytes)
                if not size or expected[:size] != found[:size]:
                    return None
                expected, found = expected[size:], found[size:]
    except NotFound:
        return None
    return info if read_bytes == info.size_bytes and not found.nbytes else None
