"""When a watch takes a job for alive, ended or dead, and whose claim to a run stands."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest

from storage.errors import Cause, Transient
from storage.run import heartbeat, owner
from storage.run.in_use import SILENCE_S, Liveness, Watch
from storage.stores.adaptive_limit import AdaptiveLimit
from storage.stores.memory import MemoryStore
from storage.stores.retry_policy import IMPATIENT_RULES, Retrier
from storage.stores.retrying_store import RetryingStore
from tests.storage.heartbeat_cases import Time, owner_of


def verdicts(beats: list[tuple[float, bytes | None]], *at_s: float) -> list[Liveness]:
    """What a watch from second 0 says at those times, having seen those beats."""
    found = []
    for now_s in at_s:
        watch = Watch.begun(b"0", 0.0)
        for when_s, beat in beats:
            if when_s <= now_s:
                watch = watch.seen(beat, when_s)
        found.append(watch.liveness(now_s))
    return found


def test_verdicts() -> None:
    unknown, ended, silent, lives = Liveness.UNKNOWN, Liveness.ENDED, Liveness.SILENT, Liveness.ALIVE
    assert verdicts([], 0, 29, 30) == [unknown, unknown, silent]
    assert verdicts([(s, b"%d" % s) for s in range(0, 100, 5)], 10, 29, 30) == [unknown, unknown, lives]
    assert verdicts([(0, b"0")], 29, 30) == [unknown, silent]  # the beat it had when the watch began is no change
    assert verdicts([(7, None)], 6, 7) == [unknown, ended]
    dying: list[tuple[float, bytes | None]] = [(4.0, b"1"), (9.0, b"2")]  # a job that is just being ended
    assert verdicts(dying, 30, 38, 39) == [unknown, unknown, silent]


def test_a_job_that_is_closing_is_waited_for() -> None:
    unknown, ended, silent, lives = Liveness.UNKNOWN, Liveness.ENDED, Liveness.SILENT, Liveness.ALIVE
    beats: list[tuple[float, bytes | None]] = [(s, b"%d\n" % s) for s in range(0, 20, 5)]
    closing: list[tuple[float, bytes | None]] = [(s, b"%d closing\n" % s) for s in range(20, 1000, 5)]
    assert verdicts([*beats, *closing], 30, 100, 619, 620) == [unknown, unknown, unknown, lives]
    assert verdicts([*beats, *closing[:10], (66, None)], 65, 66) == [unknown, ended]
    assert verdicts([*beats, *closing[:10]], 94, 95) == [unknown, silent]
    on = [(70.0, b"70\n")]  # it goes on after all
    assert verdicts([*beats, *closing[:10], *on], 69, 70) == [unknown, lives]


class Stalling(MemoryStore):
    """Of its requests those from `first` on stall, `num_bad` of them, each for as long as a request for a beat may."""

    def __init__(self, times: Time, first: int, num_bad: int) -> None:
        super().__init__("stalling")
        self._times = times
        self._num = itertools.count()
        self._bad = range(first, first + num_bad)
        self.beats_s: list[float] = []

    def read(self, key: str) -> bytes:
        self._ask()
        return super().read(key)

    def put(self, key: str, buffers: Any, *, if_absent: bool = False) -> Any:
        self._ask()
        self.beats_s.append(self._times.now_s)
        return super().put(key, buffers, if_absent=if_absent)

    def _ask(self) -> None:
        if next(self._num) in self._bad:
            self._times.sleep(heartbeat.TIMEOUT_S)
            raise Transient("stalled", Cause.STALLED)


@pytest.mark.parametrize("first", range(8))
def test_a_job_whose_requests_stall_is_not_taken_for_dead(first: int) -> None:
    times = Time()
    behind = Stalling(times, first + 4, 3)  # the claim takes three requests
    retrier = Retrier(
        AdaptiveLimit(1), behind.retries, IMPATIENT_RULES, clock=times.clock, sleep=times.sleep, uniform=lambda: 1.0
    )
    store = RetryingStore(behind, retrier)
    mine, _ = owner.claim(store, owner_of("a", "a"))
    heartbeat.write(store, mine.token, 0)
    for count in range(1, 10):
        times.sleep(heartbeat.INTERVAL_S)
        with contextlib.suppress(Transient):
            assert heartbeat.renew(store, mine, count) is mine
    gap_s = max(after - before for before, after in itertools.pairwise(behind.beats_s[1:]))
    assert heartbeat.INTERVAL_S + 10 < gap_s <= 26
    assert gap_s + 2 * heartbeat.INTERVAL_S > SILENCE_S - 10, "the bound is no longer near what it guards"
    assert gap_s + 1 < SILENCE_S  # looked at once a second


def test_whose_claim_it_is() -> None:
    def is_same(before: tuple[str, str], now: tuple[str, str], names: tuple[str, str] = ("llama", "llama")) -> bool:
        """By lineage and rendezvous."""
        recorded = owner_of(before[0], "t", run_id=names[0], rendezvous=before[1])
        return owner.is_same_job(recorded, owner_of(now[0], "u", run_id=names[1], rendezvous=now[1]))

    assert is_same(("a", ""), ("a", ""), ("a name", "another"))
    for before, now in [("a", "b"), ("a", ""), ("", "b")]:
        assert not is_same((before, "x"), (now, "x"))
    assert is_same(("", "x"), ("", "x"), ("a name", "another"))
    assert not is_same(("", "x"), ("", ""))
    assert not is_same(("", ""), ("", "x"))
    for rendezvous in ("", "none"):  # a name is only for the messages
        assert not is_same(("", rendezvous), ("", rendezvous))
