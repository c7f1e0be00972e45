"""A store at a limited rate, whose puts can be broken off: what the service writes must not push the training aside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from storage.errors import StorageError
from storage.held.truce import Truce
from storage.stores.objects import Fetch, ObjectInfo, ObjectStore
from storage.stores.wrapper import StoreWrapper

_BURST_S = 0.1


@dataclass(frozen=True)
class Allowance:
    """Bytes that may be sent, which come in at a rate and are kept for a tenth of a second. Pure.

    `left` may be less than nothing: of a part that was larger than what was there, the rest is owed.
    """

    bytes_per_s: float
    left: float
    at_s: float

    def take(self, num_bytes: int, now_s: float) -> tuple[Allowance, float]:
        """The bucket without those bytes, and for how long whoever took them has to wait."""
        most = self.bytes_per_s * _BURST_S
        left = min(most, self.left + (now_s - self.at_s) * self.bytes_per_s) - num_bytes
        return Allowance(self.bytes_per_s, left, now_s), max(0.0, -left / self.bytes_per_s)


class Pace:
    """One rate for all that the service sends, and the end of it. Thread-safe.

    Args:
        bytes_per_s: None: as fast as it goes.
    """

    def __init__(self, bytes_per_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bucket = None if bytes_per_s is None else Allowance(bytes_per_s, 0.0, clock())
        self._lock = threading.Lock()
        self.truce = Truce()
        """While it lasts nothing is sent."""
        self.stop = threading.Event()
        """Set where nothing more is to be sent."""
        self.reason = "the service has been ended"

    def before(self, num_bytes: int) -> None:
        """Wait until that much may be sent. Raises StorageError once nothing more is to be."""
        self.truce.wait(self.stop)
        wait_s = 0.0
        if self._bucket is not None:
            with self._lock:
                self._bucket, wait_s = self._bucket.take(num_bytes, self._clock())
        if self.stop.wait(wait_s) if wait_s else self.stop.is_set():
            raise StorageError(f"given up: {self.reason}")


class PacedStore(StoreWrapper):
    """A store whose large objects are sent at a `Pace`; small ones, and reads, are not held up."""

    def __init__(self, store: ObjectStore, pace: Pace) -> None:
        super().__init__(store)
        self._pace = pace

    def put_from(self, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
        """See `ObjectStore.put_from`."""

        def paced(offset: int, length: int) -> list[memoryview]:
            self._pace.before(length)
            return list(fetch(offset, length))

        return self._store.put_from(key, size_bytes, paced, pool)
