"""Trying again: one table for every remote store, and a record of what had to be tried again."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import tenacity

from storage.errors import Cause, Transient
from storage.stores.adaptive_limit import AdaptiveLimit
from storage.stores.health import StoreHealth

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rule:
    """How often one request is tried in all, and how long to wait before each further try.

    The wait doubles from `wait_s` up to `wait_s_max`, of which a random half to whole is waited, so that many clients
    do not come back at the same moment. No try begins once `deadline_s` has passed since the first.
    """

    num_tries: int
    wait_s: float
    wait_s_max: float
    deadline_s: float

    def pause_s(self, num_failures: int, uniform: float) -> float:
        """The wait after that many failures in a row; `uniform` is random in [0, 1). Pure."""
        longest = min(self.wait_s * 2.0 ** (num_failures - 1), self.wait_s_max)
        return longest * (0.5 + 0.5 * uniform)


RULES: Mapping[Cause, Rule] = {
    Cause.THROTTLED: Rule(num_tries=12, wait_s=0.5, wait_s_max=20.0, deadline_s=180.0),
    Cause.SERVER_ERROR: Rule(num_tries=8, wait_s=0.2, wait_s_max=10.0, deadline_s=90.0),
    Cause.RESET: Rule(num_tries=8, wait_s=0.1, wait_s_max=5.0, deadline_s=90.0),
    Cause.STALE: Rule(num_tries=8, wait_s=0.0, wait_s_max=0.0, deadline_s=90.0),
    Cause.STALLED: Rule(num_tries=4, wait_s=0.5, wait_s_max=5.0, deadline_s=180.0),
    Cause.TRUNCATED: Rule(num_tries=8, wait_s=0.05, wait_s_max=5.0, deadline_s=90.0),
    Cause.DAMAGED: Rule(num_tries=4, wait_s=0.05, wait_s_max=1.0, deadline_s=90.0),
    Cause.UNREACHABLE: Rule(num_tries=7, wait_s=0.2, wait_s_max=5.0, deadline_s=30.0),
    Cause.CONFLICT: Rule(num_tries=6, wait_s=0.1, wait_s_max=2.0, deadline_s=30.0),
    Cause.OTHER: Rule(num_tries=4, wait_s=0.2, wait_s_max=5.0, deadline_s=60.0),
}


IMPATIENT_RULES: Mapping[Cause, Rule] = {
    cause: Rule(num_tries=2, wait_s=0.5, wait_s_max=0.5, deadline_s=15.0) for cause in RULES
}
"""For requests that are soon made anew anyway. A `Retry-After` that is longer than the deadline is not waited for."""


@dataclass(frozen=True, slots=True)
class RetryCounts:
    """How many tries failed by cause, and how long their requests waited for the next, all together."""

    num_by_cause: Mapping[str, int] = field(default_factory=dict)
    waited_s: float = 0.0

    def since(self, earlier: RetryCounts) -> RetryCounts:
        """The counts of what came after `earlier`. Pure."""
        counts = {c: n - earlier.num_by_cause.get(c, 0) for c, n in sorted(self.num_by_cause.items())}
        return RetryCounts({c: n for c, n in counts.items() if n}, self.waited_s - earlier.waited_s)

    def __str__(self) -> str:
        """Such as `3 throttled, 1 reset; waited 2.4 s`."""
        counts = ", ".join(f"{number} {cause}" for cause, number in self.num_by_cause.items())
        return f"{counts or 'none'}; waited {self.waited_s:.1f} s"


class RetryLog:
    """Counts what was tried again, and sees whether the store answers at all. Thread-safe.

    `health`: that of another log for the same store, whose requests are counted apart.
    """

    def __init__(self, health: StoreHealth | None = None) -> None:
        self.health = health or StoreHealth()
        self._lock = threading.Lock()
        self._num_by_cause: Counter[str] = Counter()
        self._waited_s = 0.0

    def add(self, cause: Cause, wait_s: float) -> None:
        """Count one try that failed."""
        with self._lock:
            self._num_by_cause[cause.value] += 1
            self._waited_s += wait_s

    def snapshot(self) -> RetryCounts:
        """Return the counts so far."""
        with self._lock:
            return RetryCounts(dict(self._num_by_cause), self._waited_s)


class Retrier:
    """Carries requests out, within `limit`, and again while the table says so. Thread-safe."""

    def __init__(
        self,
        limit: AdaptiveLimit,
        retries: RetryLog,
        rules: Mapping[Cause, Rule] = RULES,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._limit = limit
        self.retries = retries
        self._rules = rules
        self._clock = clock
        self._sleep = sleep
        self._uniform = uniform

    def call(
        self,
        what: str,
        request: Callable[[], T],
        progressed: Callable[[Transient], bool] | None = None,
        *,
        takes_slot: bool = True,
    ) -> T:
        """Make `request` until it succeeds or the table gives up; returns its result. `what` names it in the log.

        `progressed(error)` may tell that the failed try got something done: the failures before it count no more.
        With `takes_slot` False it takes no slot of the limit: for work that sends its requests through this retrier.

        Raises the last Transient, marked as given up, and at once any other error.
        """
        tries = _Tries(self._rules, self._clock, self._uniform, progressed)

        def before_sleep(state: tenacity.RetryCallState) -> None:
            self.retries.add(tries.error.cause, tries.pause_s)
            log.info("%s: %s (%s); tried again in %.2f s", what, tries.error, tries.error.cause.value, tries.pause_s)

        try:
            result: T = tenacity.Retrying(
                retry=tries.take,
                stop=lambda state: tries.is_over,
                wait=lambda state: tries.pause_s,
                sleep=self._sleep,
                before_sleep=before_sleep,
                reraise=True,
            )(self._call_in_slot if takes_slot else self._call_watched, request)
            return result
        except Transient as error:
            if not error.given_up:
                error.given_up = True
                if tries.num_tries > 1:
                    error.args = (f"{error} (tried {tries.num_tries} times)",)
            raise

    def _call_in_slot(self, request: Callable[[], T]) -> T:
        with self._limit.slot() as started_s:
            try:
                result = self._call_watched(request)
            except Transient as error:
                if error.cause is Cause.THROTTLED and not error.given_up:
                    self._limit.throttled(started_s)
                raise
            self._limit.succeeded()
            return result

    def _call_watched(self, request: Callable[[], T]) -> T:
        with self.retries.health.watched():
            return request()


class _Tries:
    """The failures of one call so far: how long to wait before its next try, and whether there is one."""

    def __init__(
        self,
        rules: Mapping[Cause, Rule],
        clock: Callable[[], float],
        uniform: Callable[[], float],
        progressed: Callable[[Transient], bool] | None,
    ) -> None:
        self._rules = rules
        self._clock = clock
        self._uniform = uniform
        self._progressed = progressed
        self._origin_s = clock()
        self._failures: Counter[Cause] = Counter()
        self.num_tries = 0
        self.error = Transient("")
        self.pause_s = 0.0
        self.is_over = False

    def take(self, state: tenacity.RetryCallState) -> bool:
        """Count a try's outcome; returns whether it is one that may be tried again. tenacity calls this first."""
        error = state.outcome.exception() if state.outcome is not None else None
        if not isinstance(error, Transient) or error.given_up:
            return False
        self.error = error
        self.num_tries += 1
        if self._progressed is not None and self._progressed(error):
            self._failures.clear()
            self._origin_s = self._clock()
        self._failures[error.cause] += 1
        rule = self._rules[error.cause]
        pause_s = rule.pause_s(self._failures[error.cause], self._uniform())
        self.pause_s = max(pause_s, error.retry_after_s or 0.0)
        late = self._clock() - self._origin_s + self.pause_s > rule.deadline_s
        self.is_over = late or self._failures[error.cause] >= rule.num_tries
        return True
