"""What is done about a node's workers, look after look; and the agent's loop, which finds out nothing but by a look."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.elastic.agent import ElasticAgent
from launcher.elastic.supervisor import Supervisor
from launcher.node.supervision import (
    AskWorkers,
    EndWorkers,
    ExplainHang,
    FinishJob,
    GracePeriods,
    Supervision,
    TellTimedOut,
    TellYielded,
    WorkersSeen,
)
from launcher.rounds.records import Breakage
from launcher.workers.channel import StopReason

GRACES = GracePeriods(stop_s=7.0, yield_s=300.0, attach_s=15.0)
STARTED_S = 1000.0
RUNNING = WorkersSeen(are_cooperative=True)
STOCK = WorkersSeen()
PEER_GONE = Breakage("node b lost", graceful=False)
PEER_YIELDED = Breakage("node b yielded", graceful=True)


def seen(before: WorkersSeen = RUNNING, **fields: Any) -> WorkersSeen:
    return dataclasses.replace(before, **fields)


def first(look: WorkersSeen, after_s: float = 1.0) -> tuple[object, ...]:
    """What the first look leads to."""
    return Supervision(GRACES, STARTED_S).step(look, STARTED_S + after_s)


@pytest.mark.parametrize(
    ("look", "orders"),
    [
        (RUNNING, ()),
        (seen(have_failed=True, stop="join: c", broken=PEER_GONE), (EndWorkers("worker failed", 7.0),)),
        (seen(have_exited=True), (FinishJob(),)),
        (seen(stop="join: c"), (AskWorkers("join: c", drains=False),)),
        (seen(stop="drain: b"), (AskWorkers("drain: b", drains=True),)),
        (seen(store_silent=True), (AskWorkers("the store is silent", drains=False),)),
        (seen(STOCK, store_silent=True), ()),
        (seen(broken=PEER_GONE), (EndWorkers("node b lost", 7.0),)),
        (seen(broken=PEER_GONE, fenced=True), (EndWorkers("node b lost", 0.0),)),
        (seen(broken=PEER_YIELDED), (AskWorkers("node b yielded", drains=False),)),
        (
            seen(broken=Breakage("hang", graceful=False, hung=True)),
            (ExplainHang("hang"), EndWorkers("hang", 7.0)),
        ),
        (seen(broken=Breakage("hang", graceful=False, hung=True), fenced=True), (EndWorkers("hang", 0.0),)),
        (seen(drain="SIGTERM"), (AskWorkers("SIGTERM", drains=True),)),
        (
            seen(STOCK, drain="SIGTERM"),
            (
                AskWorkers("SIGTERM", drains=True),
                EndWorkers("SIGTERM: the script has not said that it can stop at a step boundary", 7.0),
            ),
        ),
        (
            seen(have_yielded=True),
            (TellYielded("workers of another node were asked to stop"),),
        ),
    ],
)
def test_the_first_look(look: WorkersSeen, orders: tuple[object, ...]) -> None:
    assert first(look) == orders


def test_a_script_that_reports_nothing_is_stopped_once_it_had_time_to() -> None:
    assert first(seen(STOCK, stop="join: c"), 15.0) == (AskWorkers("join: c", drains=False),)
    assert first(seen(STOCK, stop="join: c"), 16.0)[-1] == EndWorkers("join: c", 7.0)


def test_workers_that_come_to_no_boundary_are_stopped() -> None:
    supervision = Supervision(GRACES, STARTED_S)
    asked = seen(stop="join: c")
    supervision.step(asked, STARTED_S)
    assert supervision.pause_s(STARTED_S + 300.0) < Supervision(GRACES, STARTED_S).pause_s(STARTED_S), "others wait"
    assert supervision.step(asked, STARTED_S + 300.0) == ()
    assert supervision.pause_s(STARTED_S + 301.0) == Supervision(GRACES, STARTED_S).pause_s(STARTED_S)
    assert supervision.step(asked, STARTED_S + 301.0) == (TellTimedOut("join: c"), EndWorkers("join: c", 7.0))


def test_workers_that_have_yielded_wait_for_the_others() -> None:
    supervision = Supervision(GRACES, STARTED_S)
    supervision.step(seen(stop="join: c"), STARTED_S)
    yielded = seen(stop="join: c", have_yielded=True)
    assert supervision.step(yielded, STARTED_S + 1.0) == (TellYielded("join: c"),)
    assert supervision.step(yielded, STARTED_S + 2.0) == ()
    assert supervision.step(seen(yielded, all_stopped=True), STARTED_S + 3.0) == (EndWorkers("join: c", 0.0),)
    assert supervision.step(seen(yielded, have_exited=True), STARTED_S + 3.0) == (EndWorkers("join: c", 0.0),)


def test_a_drain_ends_in_time() -> None:
    supervision = Supervision(GRACES, STARTED_S)
    drained = seen(drain="SIGTERM", drain_until_s=STARTED_S + 20.0)
    assert supervision.step(drained, STARTED_S) == (AskWorkers("SIGTERM", drains=True),)
    assert supervision.step(drained, STARTED_S + 19.0) == ()
    reason = "SIGTERM: no step boundary was reached and saved in time"
    assert supervision.step(drained, STARTED_S + 20.0) == (EndWorkers(reason, 7.0),)


def test_a_drain_is_told_to_workers_that_were_asked_for_something_else() -> None:
    """Ranks that are asked for several reasons act on the highest: this node's must know that it goes."""
    supervision = Supervision(GRACES, STARTED_S)
    supervision.step(seen(stop="join: c"), STARTED_S)
    orders = supervision.step(seen(stop="join: c", drain="SIGTERM"), STARTED_S + 1.0)
    assert orders == (AskWorkers("SIGTERM", drains=True),)


def test_a_store_that_is_silent_again_and_again_asks_workers_once() -> None:
    """Those that never stop are watched for hangs again once the time to stop is over."""
    supervision, silent = Supervision(GRACES, STARTED_S), seen(store_silent=True)
    assert not supervision.are_awaited(STARTED_S)
    assert len(supervision.step(silent, STARTED_S)) == 1
    for after_s in (1.0, 299.0, 301.0, 1000.0):
        assert supervision.step(silent, STARTED_S + after_s) == (), "nothing times out while a lease runs out"
        assert supervision.are_awaited(STARTED_S + after_s) is (after_s < 300.0)


class Channels:
    """Those of workers that report progress and never stop."""

    def is_cooperative(self) -> bool:
        return True

    def request_stop(self, reason: StopReason) -> None:
        raise AssertionError("nobody wants them to")

    def progress(self) -> dict[int, Any]:
        return {}


class Supervised(ElasticAgent):
    """An agent whose workers have these exit codes, look after look."""

    def __init__(self, *looks: tuple[int | None, ...]) -> None:
        self._looks = list(looks)
        self._warm = None
        self._vitals = SimpleNamespace(look=lambda channels: None)  # type: ignore[assignment]
        self._member = SimpleNamespace(  # type: ignore[assignment]
            wait=lambda seconds: None,
            stop_requested=lambda generation: "",
            store_silent=lambda: False,
            broken=lambda generation: None,
            fenced=lambda: False,
            all_stop=lambda generation: False,
        )
        watchdog: Any = SimpleNamespace(look=lambda now_s, *, exited, paused: None)
        drain: Any = SimpleNamespace(current=None)
        self._workers = Channels()  # type: ignore[assignment]
        self._supervisor = Supervisor(self._member, drain, GRACES, lambda *_, **__: None, watchdog)
        self._supervisor.begin(self._workers, -math.inf)

    def _exited(self) -> set[int]:
        return set()

    def _worker_exits(self) -> Any:
        return [SimpleNamespace(exit_code=code) for code in self._looks.pop(0)]

    def check_group(self) -> Any:
        raise AssertionError("torch stops all workers in its own way once one has failed, and tells nobody")


def test_a_failure_is_told_before_torch_may_stop_the_other_workers() -> None:
    """Between one look and the next a worker may fail: nothing may find that out but the look."""
    assert Supervised((None, None), (0, None), (0, -9))._supervise(1) == EndWorkers("worker failed", 7.0)
