"""While a job changes its workers and restores, nothing is stored or copied behind it; and never for long."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any
from unittest.mock import Mock

import pytest

from storage.errors import StorageError
from storage.events import CheckpointEvent
from storage.held.rate import RateLimit
from storage.held.truce import LONGEST_S, Standstill, Truce
from storage.service import memory
from storage.service.held_messages import AskHeld
from storage.service.memory import HeldStates
from storage.service.on_the_way import OnTheWay
from storage.service.pace import Pace
from tests.cluster import until


class Clock:
    """Tells those times, and the last one from then on."""

    def __init__(self, times_s: Sequence[float]) -> None:
        self._times_s = list(times_s)

    def __call__(self) -> float:
        return self._times_s.pop(0) if len(self._times_s) > 1 else self._times_s[0]


def test_a_standstill_grows_with_who_asks_but_not_beyond_its_longest() -> None:
    began = Standstill().asked(100.0, 10.0)
    assert (began.is_on(109.9), began.is_on(110.0)) == (True, False)
    assert began.asked(105.0, 1.0) == began, "others have asked for more"
    assert began.asked(105.0, 10.0).ends_s == 115.0
    assert began.asked(105.0, 1000.0).ends_s == 100.0 + LONGEST_S
    assert Standstill().asked(100.0, 1000.0).ends_s == 100.0 + LONGEST_S


def test_what_waits_has_half_of_all_time() -> None:
    ended = Standstill().asked(100.0, 10.0).ended(104.0)
    assert not ended.is_on(104.0)
    assert ended.asked(107.9, 10.0) == ended, "it has lasted for four seconds"
    assert ended.asked(108.0, 10.0).ends_s == 118.0
    assert Standstill().asked(100.0, 10.0).asked(119.9, 5.0).ends_s == 110.0, "one that nobody has ended"
    assert ended.ended(200.0) == ended


def test_a_standstill_ends_a_little_later_for_who_asks_for_that_and_never_later_than_it_would() -> None:
    began = Standstill().asked(100.0, 10.0)
    later = began.ended(104.0, 0.25)
    assert (later.is_on(104.2), later.is_on(104.25)) == (True, False)
    assert later.ended(104.1, 0.25) == later, "another rank has read all by then"
    assert began.ended(109.9, 0.25).ends_s == 110.0
    assert later.asked(104.1, 10.0).ends_s == 114.1, "another restore"


def test_a_truce_holds_back_what_is_sent_until_it_ends() -> None:
    pace = Pace(None)
    pace.truce = Truce(lambda: 0.0)  # a machine that stands still does not end it
    pace.truce.ask(LONGEST_S)
    sent = threading.Event()

    def send() -> None:
        pace.before(1)
        sent.set()

    thread = threading.Thread(target=send)
    thread.start()
    assert not sent.wait(0.05)
    pace.truce.end()
    thread.join(30)
    assert sent.is_set()


def test_a_copy_under_way_says_something_now_and_then() -> None:
    rate, stop = RateLimit(None), threading.Event()
    rate.truce = Truce(Clock([0.0, 1.0, 1.0, 5.9, 6.0]))
    rate.truce.ask(LONGEST_S)
    assert rate.wait(1, stop), "its connection would be given up else"
    assert rate.truce.wait(stop, 0.0)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_nobody_waits_for_a_truce_who_is_to_end(is_stopped: bool) -> None:
    truce, stop = Truce(), threading.Event()
    truce.ask(LONGEST_S)
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(truce.wait(stop)))
    thread.start()
    if is_stopped:
        stop.set()
    else:
        truce.end_all()
        truce.ask(LONGEST_S)
        assert not truce.is_on
    thread.join(30)
    assert found == [not is_stopped]


def test_what_is_given_up_is_not_sent_after_a_truce() -> None:
    pace = Pace(None)
    pace.truce.ask(LONGEST_S)
    pace.stop.set()
    with pytest.raises(StorageError, match="given up"):
        pace.before(1)


def test_who_asks_waits_for_what_had_begun_and_for_nothing_else() -> None:
    coming = OnTheWay()
    assert coming.wait(0.0)
    first, second = coming.begin(), coming.begin()
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(coming.wait(60.0)))
    thread.start()
    until("it waits", lambda: bool(coming._changed._waiters))  # type: ignore[attr-defined]
    third = coming.begin()
    first()
    assert not coming.wait(0.0)
    second()
    thread.join(30)
    assert found == [True], "the third one has begun later"
    third()


def test_a_state_that_takes_too_long_is_gone_on_without_and_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[CheckpointEvent, dict[str, Any]]] = []
    held, caller = HeldStates(), Mock()
    monkeypatch.setattr(held, "_report", lambda event, **fields: told.append((event, fields)))
    monkeypatch.setattr(memory, "_WHOLE_S_MAX", 0.0)
    held._held(caller, AskHeld(run="r"), [])
    assert not told
    made = held._on_the_way.begin()
    held._held(caller, AskHeld(run="r"), [])
    made()
    assert caller.answer.call_count == 2
    assert [event for event, _ in told] == [CheckpointEvent.MEMORY_AWAY]
    held.close()
