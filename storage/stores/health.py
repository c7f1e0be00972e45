"""Whether a store answers: told once it has failed for some seconds without a break, and once it is back.

What is tried again with success costs nobody anything, and is counted only; of an outage a person wants to hear.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from storage.errors import Cause, StorageError, Transient

TOLD_AFTER_S = 3.0
"""An outage of so many seconds is told. Shorter ones are what retries are for."""

_BETWEEN_S = 2.5
"""An outage counts from so long before the first request that failed, at most: nobody knows when the store went away
since the last one that it answered, and a run's owner asks it every 5 s."""

_ANSWERS = (Cause.CONFLICT, Cause.DAMAGED, Cause.STALE)
"""Causes of failures that only a store that is there gives."""


@dataclass(frozen=True, slots=True)
class StoreAway:
    """The store has not answered for `seconds`."""

    seconds: float
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class StoreBack:
    """It answers again, after `seconds`."""

    seconds: float


Tell = Callable[[StoreAway | StoreBack], None]


class StoreHealth:
    """Learns from all requests to one store whether it answers, and tells when that changes.

    Thread-safe; `tell` is called on the thread that has found it out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.tell: Tell | None = None
        self._clock = clock
        self._lock = threading.Lock()
        self._good_s: float | None = None
        self._since_s: float | None = None
        self._is_told = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Learn from one request, which the `with` holds."""
        started_s = self._clock()
        try:
            yield
        except Transient as error:
            if error.cause in _ANSWERS:
                self._succeeded()
            elif not error.given_up:  # else its tries have been seen
                self._failed(error, started_s)
            raise
        except StorageError:
            self._succeeded()  # a refusal is an answer
            raise
        self._succeeded()

    def _failed(self, error: Transient, started_s: float) -> None:
        with self._lock:
            now_s = self._clock()
            if self._since_s is None:
                self._since_s = started_s
                if self._good_s is not None:
                    halfway_s = (self._good_s + started_s) / 2
                    self._since_s = max(self._good_s, started_s - _BETWEEN_S, halfway_s)
            seconds = now_s - self._since_s
            if self._is_told or seconds < TOLD_AFTER_S:
                return
            self._is_told = True
        self._say(StoreAway(round(seconds, 3), error.cause, str(error)))

    def _succeeded(self) -> None:
        with self._lock:
            self._good_s = now_s = self._clock()
            since_s, is_told = self._since_s, self._is_told
            self._since_s, self._is_told = None, False
        if is_told and since_s is not None:
            self._say(StoreBack(round(now_s - since_s, 3)))

    def _say(self, what: StoreAway | StoreBack) -> None:
        if self.tell is not None:
            self.tell(what)
