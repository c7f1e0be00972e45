"""One object's bytes on their way through a copy: read in parts, verified, and counted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from storage.errors import Corrupt, StorageError
from storage.stores.objects import ObjectStore
from storage.verified.source import blaming, scratch
from storage.verified.verifiers import Verifier

Advance = Callable[[int], None]


class VerifiedRead:
    """One pass over an object: what is read of it is verified and counted. Thread-safe.

    Without a `verifier` nothing says what its bytes must be. `is_owed`: the object has to be there, as in the source of
    a copy, so its absence is damage.
    """

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        size_bytes: int,
        verifier: Verifier | None,
        advance: Advance,
        stop: threading.Event,
        *,
        is_owed: bool,
    ) -> None:
        """Raises Corrupt, and NotFound unless `is_owed`."""
        self._store = store
        self._advance = advance
        self._stop = stop
        self._is_owed = is_owed
        self._lock = threading.Lock()
        self._num_bytes = 0
        self._key = key
        with self._judging():
            self._info = store.info(key)
        if self._info.size_bytes != size_bytes:
            raise Corrupt(f"{key} has {self._info.size_bytes} bytes, and must have {size_bytes}")
        self._verifier = verifier

    def fetch(self, offset: int, length: int) -> list[memoryview]:
        """Those bytes, in the version of the object that the pass began with.

        Raises Corrupt, and NotFound unless the object is owed.
        """
        if self._stop.is_set():
            raise StorageError(f"{self._key} is not copied: another object could not be")
        memory = scratch(length)
        if length:
            with self._judging():
                self._store.read_into(self._key, offset, [memory], if_match=self._info.etag)
            if self._verifier is not None:
                self._verifier.take(offset, memory)
        with self._lock:
            self._num_bytes += length
        self._advance(length)
        return [memory]

    def take_back(self) -> None:
        """Take back what was counted: it has to be read again."""
        with self._lock:
            num_bytes, self._num_bytes = self._num_bytes, 0
        self._advance(-num_bytes)

    def _judging(self) -> contextlib.AbstractContextManager[None]:
        return blaming(self._key) if self._is_owed else contextlib.nullcontext()
