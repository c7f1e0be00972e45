"""How many requests may be under way at once: additive increase, multiplicative decrease.

The rule is TCP's (Chiu and Jain, 1989): a store that throttles gets half as many at a time, and one more for each
limit's worth of successes after that. Every process finds its own share of a busy store that way.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

_DECREASE = 0.5


@dataclass(frozen=True, slots=True)
class CongestionWindow:
    """The limit now, and when it last went down. `limit` is between 1 and `limit_max`."""

    limit: float
    limit_max: int
    decreased_s: float = float("-inf")

    def succeeded(self) -> CongestionWindow:
        """The window after a request that the store did not throttle."""
        return replace(self, limit=min(self.limit + 1.0 / self.limit, float(self.limit_max)))

    def throttled(self, now_s: float, started_s: float) -> CongestionWindow:
        """The window after a request that it did throttle. One sent before the last decrease says nothing new."""
        if started_s < self.decreased_s:
            return self
        return replace(self, limit=max(1.0, self.limit * _DECREASE), decreased_s=now_s)


class AdaptiveLimit:
    """Lets as many threads of this process through as the window says. Thread-safe."""

    def __init__(self, limit_max: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = CongestionWindow(float(limit_max), limit_max)
        self._clock = clock
        self._num_under_way = 0
        self._changed = threading.Condition()

    @property
    def limit(self) -> int:
        """How many requests may be under way now."""
        return int(self._window.limit)

    @contextlib.contextmanager
    def slot(self) -> Iterator[float]:
        """Wait for a slot and hold it during the `with`; yields the time at which it was got, for `throttled`."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_under_way < self.limit)
            self._num_under_way += 1
        try:
            yield self._clock()
        finally:
            with self._changed:
                self._num_under_way -= 1
                self._changed.notify_all()

    def succeeded(self) -> None:
        """Tell that a request was answered."""
        with self._changed:
            self._window = self._window.succeeded()
            self._changed.notify_all()

    def throttled(self, started_s: float) -> None:
        """Tell that the store throttled the request which got its slot at `started_s`."""
        with self._changed:
            self._window = self._window.throttled(self._clock(), started_s)
