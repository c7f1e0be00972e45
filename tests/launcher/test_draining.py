"""What there is time for when a node is asked to leave, and the last resort. Times are arguments."""

from __future__ import annotations

import signal
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.drain.deadline import DrainDeadline
from launcher.drain.draining import DrainOrder, DrainRequest, DrainRequests, DrainSource, settle, timetable
from launcher.drain.signals import handle_signals, stop_at_once
from launcher.errors import DRAINED_EXIT_CODE

SECONDS = st.floats(0, 1000)


def request(asked_s: float, grace_s: float, **fields) -> DrainRequest:
    return DrainRequest(
        **{"source": DrainSource.NOTICE, "detail": "spot", **fields}, asked_s=asked_s, deadline_s=asked_s + grace_s
    )


class TestTimetable:
    @given(asked_s=SECONDS, grace_s=SECONDS, stop_s=SECONDS)
    def test_every_part_has_its_time_and_the_grace_is_not_overrun(
        self, asked_s: float, grace_s: float, stop_s: float
    ) -> None:
        asked = request(asked_s, grace_s)
        times = timetable(asked, stop_s)
        tolerance = 1e-6
        assert asked_s <= times.ask_until_s + tolerance
        assert times.ask_until_s <= times.kill_at_s <= times.gone_by_s <= asked.deadline_s
        assert times.kill_at_s - times.ask_until_s <= stop_s + tolerance
        if grace_s > 1:
            assert times.ask_until_s - asked_s > grace_s / 2, "most of it is for a step and a save"
            assert times.kill_at_s < times.gone_by_s < asked.deadline_s

    def test_the_default(self) -> None:
        times = timetable(request(0, 30), 30)
        assert (times.ask_until_s, times.kill_at_s, times.gone_by_s) == (19.5, 27, 29.5)

    def test_no_time_is_kept_for_a_stop_that_takes_none(self) -> None:
        times = timetable(request(0, 30), 0)
        assert times.ask_until_s == times.kill_at_s


class TestRequests:
    def test_none(self) -> None:
        requests = DrainRequests(grace_s=30, stop_s=5)
        assert requests.current is None
        assert requests.timetable is None
        assert requests.kill_by(7.0) == 7.0

    def test_a_notices_own_time_counts_longer_or_shorter(self) -> None:
        for within_s in (10.0, 120.0):
            requests = DrainRequests(grace_s=30, stop_s=5)
            requests.ask(DrainSource.NOTICE, "spot", 100.0, within_s=within_s)
            assert requests.current is not None
            assert requests.current.deadline_s == 100.0 + within_s
            assert requests.current.exit_code == DRAINED_EXIT_CODE

    def test_a_time_that_is_over_leaves_no_grace(self) -> None:
        requests = DrainRequests(grace_s=30, stop_s=5)
        requests.ask(DrainSource.NOTICE, "spot", 100.0, within_s=-3)
        times = requests.timetable
        assert times is not None
        assert times.ask_until_s == times.gone_by_s == 100.0

    def test_the_earliest_deadline_holds_and_the_signal_makes_the_exit_code(self) -> None:
        requests = DrainRequests(grace_s=30, stop_s=5)
        requests.ask(DrainSource.NOTICE, "spot", 100.0, within_s=60)
        assert requests.ask_signal(signal.SIGTERM, 101.0)
        current = requests.current
        assert current is not None
        assert (current.deadline_s, current.asked_s, current.exit_code) == (131.0, 101.0, 143)
        late = DrainRequests(grace_s=30, stop_s=5)
        late.ask(DrainSource.NOTICE, "spot", 100.0, within_s=60)
        assert late.ask_signal(signal.SIGTERM, 155.0)
        current = late.current
        assert current is not None
        assert (current.deadline_s, current.detail, current.exit_code) == (160.0, "spot", 143)

    def test_a_second_signal_is_no_request(self) -> None:
        requests = DrainRequests(grace_s=30, stop_s=5)
        assert requests.ask_signal(signal.SIGTERM, 1.0)
        assert not requests.ask_signal(signal.SIGHUP, 2.0)

    @given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1))
    def test_more_requests_never_give_more_time(self, asked: list[tuple[float, float]]) -> None:
        requests = tuple(request(*times) for times in asked)
        settled = settle(requests)
        assert settled is not None
        assert settled.deadline_s == min(r.deadline_s for r in requests)


@pytest.mark.parametrize("order", [DrainOrder(("a", "b"), "me@here"), DrainOrder((), "me@here", 12.5)])
def test_orders_are_read_as_written(order: DrainOrder) -> None:
    assert DrainOrder.from_json(order.to_json()) == order


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"now",
        b"[]",
        b"{}",
        b'{"node_ids": [], "by": "x", "grace_s": "soon"}',
        b'{"node_ids": [], "by": "x", "grace_s": -1}',
    ],
)
def test_what_is_no_order_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        DrainOrder.from_json(data)


@pytest.mark.parametrize("telling", ["", "blocks"])
def test_the_deadline_ends_a_process_that_overstays_even_if_it_cannot_tell(
    telling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not telling:
        monkeypatch.setattr("launcher.drain.deadline._TELL_S", 60.0)  # it can tell, however late its thread comes to it
    requests = DrainRequests(grace_s=0.01, stop_s=5)
    ended, told, never = threading.Event(), threading.Event(), threading.Event()
    codes: list[int] = []

    def tell(overrun: DrainRequest) -> None:
        never.wait(60 if telling else 0)
        told.set()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    deadline = DrainDeadline(requests, tell, end)
    deadline.start()
    try:
        assert not ended.wait(0.3), "nobody has asked"
        requests.ask_signal(signal.SIGTERM, 0.0)
        assert ended.wait(60)
        assert codes == [143]
        assert told.is_set() is not bool(telling)
    finally:
        never.set()
        deadline.close()


def test_a_deadline_that_is_closed_ends_nothing() -> None:
    requests = DrainRequests(grace_s=0.01, stop_s=5)
    codes: list[int] = []
    deadline = DrainDeadline(requests, lambda overrun: None, codes.append)
    deadline.start()
    deadline.close()
    requests.ask_signal(signal.SIGTERM, 0.0)
    deadline._thread.join(60)
    assert not deadline._thread.is_alive()
    assert codes == []


@pytest.mark.parametrize("was", [signal.SIG_IGN, signal.SIG_DFL])
def test_the_end_of_children_is_told_though_it_was_ignored(was: object, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[int, object] = {}
    monkeypatch.setattr(threading, "current_thread", threading.main_thread)
    monkeypatch.setattr(signal, "getsignal", lambda signum: was)
    monkeypatch.setattr(signal, "signal", given.__setitem__)
    handle_signals(stop_at_once)
    assert given.pop(signal.SIGCHLD, signal.SIG_IGN) is (signal.SIG_DFL if was is signal.SIG_IGN else signal.SIG_IGN)
    assert set(given.values()) == {stop_at_once}
