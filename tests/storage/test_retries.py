"""Trying again: the table, the adaptive limit, and what a retried store keeps or settles."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import AlreadyExists, Cause, Corrupt, Denied, Interrupted, StorageError, Transient
from storage.stores.adaptive_limit import AdaptiveLimit, CongestionWindow
from storage.stores.buffers import skip, views_of
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectInfo
from storage.stores.retry_policy import RULES, Retrier, RetryLog, Rule
from storage.stores.retrying_store import RetryingStore, stored_equal


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept_s: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds


def make_retrier(time: Time, limit_max: int = 8) -> Retrier:
    limit = AdaptiveLimit(limit_max, clock=lambda: time.now_s)
    return Retrier(limit, RetryLog(), clock=lambda: time.now_s, sleep=time.sleep, uniform=random.Random(1).random)


def failing(errors: Sequence[StorageError]) -> Callable[[], str]:
    left = list(errors)

    def request() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return request


class TestRules:
    def test_every_cause_has_one(self) -> None:
        assert set(RULES) == set(Cause)

    @given(st.integers(1, 30), st.floats(0, 1, exclude_max=True))
    def test_the_pause_grows_up_to_its_bound_with_jitter(self, num_failures: int, uniform: float) -> None:
        rule = Rule(num_tries=9, wait_s=0.5, wait_s_max=20.0, deadline_s=100.0)
        longest = min(0.5 * 2 ** (num_failures - 1), 20.0)
        assert longest / 2 <= rule.pause_s(num_failures, uniform) <= longest

    @pytest.mark.parametrize("cause", Cause)
    def test_a_cause_that_stays_ends_as_its_rule_says(self, cause: Cause) -> None:
        time = Time()
        retrier = make_retrier(time)
        num_tries = 0

        def request() -> None:
            nonlocal num_tries
            num_tries += 1
            raise Transient("no", cause)

        with pytest.raises(Transient, match="tried") as caught:
            retrier.call("x", request)
        assert caught.value.given_up
        assert 2 <= num_tries <= RULES[cause].num_tries
        assert time.now_s <= RULES[cause].deadline_s
        assert retrier.retries.snapshot().num_by_cause == {cause.value: num_tries - 1}
        assert retrier.retries.snapshot().waited_s == pytest.approx(sum(time.slept_s))

    def test_a_cause_that_goes_is_only_counted(self) -> None:
        time = Time()
        retrier = make_retrier(time)
        errors = [Transient("a", Cause.THROTTLED), Transient("b", Cause.RESET), Transient("c", Cause.THROTTLED)]
        before = retrier.retries.snapshot()
        assert retrier.call("x", failing(errors)) == "done"
        assert str(retrier.retries.snapshot().since(before)).startswith("1 reset, 2 throttled; waited ")

    def test_no_try_begins_after_the_deadline(self) -> None:
        time = Time()
        retrier = make_retrier(time)
        num_tries = 0

        def request() -> None:
            nonlocal num_tries
            num_tries += 1
            time.now_s += RULES[Cause.STALLED].deadline_s * 0.6
            raise Transient("no", Cause.STALLED)

        with pytest.raises(Transient):
            retrier.call("x", request)
        assert num_tries == 2

    def test_what_the_store_asks_for_is_waited(self) -> None:
        time = Time()
        make_retrier(time).call("x", failing([Transient("no", Cause.THROTTLED, retry_after_s=33.0)]))
        assert time.slept_s == [33.0]

    @pytest.mark.parametrize("error", [Denied("no"), Corrupt("no"), AlreadyExists("no")])
    def test_other_errors_are_final(self, error: StorageError) -> None:
        time = Time()
        with pytest.raises(type(error)):
            make_retrier(time).call("x", failing([error]))
        assert not time.slept_s

    def test_what_was_given_up_below_is_not_tried_again_above(self) -> None:
        time = Time()
        retrier = make_retrier(time)
        with pytest.raises(Transient):
            retrier.call("outer", lambda: retrier.call("inner", failing([Transient("no")] * 100)))
        assert len(time.slept_s) == RULES[Cause.OTHER].num_tries - 1


class TestFlight:
    @given(st.lists(st.booleans(), max_size=300))
    def test_the_limit_stays_within_its_bounds(self, outcomes: list[bool]) -> None:
        window = CongestionWindow(32.0, 32)
        for index, throttled in enumerate(outcomes):
            window = window.throttled(float(index), float(index)) if throttled else window.succeeded()
            assert 1 <= window.limit <= 32

    def test_throttling_halves_once_for_all_that_flew_then(self) -> None:
        window = CongestionWindow(32.0, 32)
        for _ in range(32):
            window = window.throttled(now_s=10.0, started_s=9.0)
        assert window.limit == 16

    def test_it_recovers_by_one_for_each_round_of_successes(self) -> None:
        window = CongestionWindow(8.0, 32)
        for _ in range(8):
            window = window.succeeded()
        assert 8.5 < window.limit <= 9
        for _ in range(2000):
            window = window.succeeded()
        assert window.limit == 32

    def test_a_throttled_retrier_lets_fewer_through(self) -> None:
        time = Time()
        limit = AdaptiveLimit(4, clock=lambda: time.now_s)
        retrier = Retrier(limit, RetryLog(), clock=lambda: time.now_s, sleep=time.sleep)
        retrier.call("x", failing([Transient("no", Cause.THROTTLED)] * 2))
        assert limit.limit == 2  # 4, halved twice: 1, and one up for the success

    def test_no_more_fly_than_the_limit_and_none_waits_for_ever(self) -> None:
        limit, lock, num_under_way, most = AdaptiveLimit(3), threading.Lock(), 0, 0

        def work() -> None:
            nonlocal num_under_way, most
            for _ in range(50):
                with limit.slot():
                    with lock:
                        num_under_way += 1
                        most = max(most, num_under_way)
                    with lock:
                        num_under_way -= 1
                limit.succeeded()

        threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert most <= 3


class Breaking(MemoryStore):
    """Fails as a test tells it to, before or after it has done the work."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.before: list[StorageError] = []
        self.after: list[StorageError] = []
        self.break_after: list[int] = []
        self.reads: list[tuple[int, int]] = []

    def put(self, key: str, buffers: Any, *, if_absent: bool = False) -> ObjectInfo:
        if self.before:
            raise self.before.pop(0)
        info = super().put(key, buffers, if_absent=if_absent)
        if self.after:
            raise self.after.pop(0)
        return info

    def read_into(self, key: str, offset: int, buffers: Any, *, if_match: str | None = None) -> str:
        wanted = sum(buffer.nbytes for buffer in buffers)
        self.reads.append((offset, wanted))
        if not self.break_after:
            return super().read_into(key, offset, buffers, if_match=if_match)
        left = received = min(self.break_after.pop(0), wanted)
        etag = self.info(key).etag
        for buffer in buffers:
            part = buffer[:left]
            super().read_into(key, offset, [part], if_match=if_match)
            offset, left = offset + part.nbytes, left - part.nbytes
        raise Interrupted("broke off", Cause.TRUNCATED, received, etag)


@pytest.fixture
def breaking(memory_url: str) -> tuple[Breaking, RetryingStore]:
    store = Breaking(memory_url)
    return store, RetryingStore(store, make_retrier(Time()))


class TestRetryingStore:
    def test_a_broken_read_goes_on_where_it_ended(self, breaking: tuple[Breaking, RetryingStore]) -> None:
        below, store = breaking
        data = random.Random(7).randbytes(1000)
        below.put("k", [data])
        below.break_after = [10, 0, 333, 0, 1]
        memory = memoryview(bytearray(900))
        store.read_into("k", 50, [memory[:5], memory[5:400], memory[400:400], memory[400:]])
        assert memory == data[50:950]
        assert below.reads == [(50, 900), (60, 890), (60, 890), (393, 557), (393, 557), (394, 556)]

    def test_progress_starts_the_counting_anew(self, breaking: tuple[Breaking, RetryingStore]) -> None:
        below, store = breaking
        below.put("k", [bytes(100)])
        below.break_after = [1] * 100
        store.read_into("k", 0, [memoryview(bytearray(100))])
        below.break_after = [0] * 100
        with pytest.raises(Transient):
            store.read_into("k", 0, [memoryview(bytearray(100))])

    def test_a_read_is_never_pieced_together_from_two_versions(self, breaking: tuple[Breaking, RetryingStore]) -> None:
        below, _ = breaking
        below.put("k", [b"old" * 100])
        below.break_after = [150]
        time = Time()
        sleep = time.sleep
        time.sleep = lambda seconds: (sleep(seconds), below.put("k", [b"new" * 100]))[0]  # type: ignore[method-assign]
        with pytest.raises(Corrupt, match="changed"):
            RetryingStore(below, make_retrier(time)).read_into("k", 0, [memoryview(bytearray(300))])

    @pytest.mark.parametrize("if_absent", [False, True])
    def test_a_put_whose_answer_is_lost_is_known_as_its_own(
        self, breaking: tuple[Breaking, RetryingStore], if_absent: bool
    ) -> None:
        below, store = breaking
        below.after = [Transient("lost", Cause.RESET)]
        assert store.put("k", [b"mine", b"!"], if_absent=if_absent) == below.info("k")
        assert below.read("k") == b"mine!"

    @pytest.mark.parametrize("theirs", [b"them!", b"longer than mine", b""])
    def test_a_put_that_another_has_won_meanwhile_is_not(
        self, breaking: tuple[Breaking, RetryingStore], theirs: bytes
    ) -> None:
        below, store = breaking
        MemoryStore.put(below, "k", [theirs])
        below.before = [Transient("lost", Cause.RESET)]
        with pytest.raises(AlreadyExists):
            store.put("k", [b"mine", b"!"], if_absent=True)
        assert below.read("k") == theirs

    def test_without_a_doubt_equal_bytes_are_anothers(self, breaking: tuple[Breaking, RetryingStore]) -> None:
        below, store = breaking
        below.put("k", [b"same"])
        with pytest.raises(AlreadyExists):
            store.put("k", [b"same"], if_absent=True)

    @given(st.lists(st.binary(max_size=20), max_size=6), st.integers(0, 200))
    def test_skip(self, pieces: list[bytes], at: int) -> None:
        whole = b"".join(pieces)
        assert b"".join(skip([memoryview(piece) for piece in pieces], at)) == whole[at:]

    def test_stored_equal(self, breaking: tuple[Breaking, RetryingStore]) -> None:
        below, _ = breaking
        assert stored_equal(below, "k", views_of([b""])) is None
        info = below.put("k", [b"abcdef"])
        assert stored_equal(below, "k", views_of([b"abc", b"", b"def"])) == info
        assert stored_equal(below, "k", views_of([b"abc", b"deg"])) is None
        assert stored_equal(below, "k", views_of([b"abc"])) is None
