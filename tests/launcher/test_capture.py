"""When the state of workers is kept before they are ended, and what cuts that short."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.elastic.agent import ElasticAgent
from launcher.elastic.sidecar import Capture, Sidecar, Tell
from launcher.launch import _get_ready
from launcher.node.supervision import EndWorkers, GracePeriods, Supervision, WorkersSeen
from launcher.reports import sentence
from launcher.rounds.records import Breakage

GRACES = GracePeriods(stop_s=7.0, yield_s=300.0, attach_s=15.0, capture_s=10.0)
PEER_GONE = Breakage("node b lost", graceful=False)


@pytest.mark.parametrize(
    ("look", "end"),
    [
        (WorkersSeen(have_failed=True), EndWorkers("worker failed", 7.0, 10.0)),
        (WorkersSeen(broken=PEER_GONE), EndWorkers("node b lost", 7.0, 10.0)),
        (WorkersSeen(stop="join: c"), EndWorkers("join: c", 7.0, 10.0)),
        (WorkersSeen(broken=PEER_GONE, fenced=True), EndWorkers("node b lost", 0.0)),
        (
            WorkersSeen(have_yielded=True, all_stopped=True, are_cooperative=True),
            EndWorkers("workers of another node were asked to stop", 0.0),
        ),
    ],
    ids=["failed", "peer lost", "cannot be asked", "fenced", "yielded"],
)
def test_which_ends_keep_the_state(look: WorkersSeen, end: EndWorkers) -> None:
    assert Supervision(GRACES, 0.0).step(look, 20.0)[-1] == end


def test_workers_that_have_yielded_have_saved_their_state() -> None:
    supervision = Supervision(GRACES, 0.0)
    supervision.step(WorkersSeen(have_yielded=True, are_cooperative=True), 1.0)
    ended = supervision.step(WorkersSeen(have_yielded=True, are_cooperative=True, broken=PEER_GONE), 2.0)
    assert ended == (EndWorkers("node b lost", 7.0, 0.0),)


class Keeper(Sidecar, Capture):
    """Has kept the state after so many looks."""

    def __init__(self, num_looks: float) -> None:
        self.num_looks = num_looks
        self.asked_s: list[float] = []
        self.num_expected = 0

    address = ""

    def start(self, folder: Path, tell: Tell) -> None:
        raise NotImplementedError

    def expect(self) -> None:
        self.num_expected += 1

    def drain(self, grace_s: float) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def capture(self, timeout_s: float) -> Capture:
        self.asked_s.append(timeout_s)
        return self

    def done(self) -> bool:
        self.num_looks -= 1
        return self.num_looks < 0

    def told(self) -> Mapping[str, Any]:
        return {"steps": {0: 7, 1: 7} if self.num_looks < 0 else {}, "missed": {}}


class Ending(ElasticAgent):
    """An agent of which only the way to keep a state is there."""

    def __init__(self, keeper: Keeper | None, *, fenced_after: float = math.inf, kill_by_s: float = math.inf) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.looks = 0.0
        self._sidecar = keeper
        self._fenced_after = fenced_after
        self._drain = SimpleNamespace(kill_by=lambda ends_s: min(ends_s, kill_by_s))  # type: ignore[assignment]
        self._member = SimpleNamespace(fenced=self._is_fenced)  # type: ignore[assignment]

    def _is_fenced(self) -> bool:
        self.looks += 1
        return self.looks > self._fenced_after

    def _emit(self, event: Any, /, **fields: Any) -> None:
        self.events.append((str(event), fields))


def test_the_agent_waits_until_the_state_is_kept() -> None:
    keeper = Keeper(3)
    agent = Ending(keeper)
    agent._capture(60.0)
    assert keeper.asked_s == [60.0]
    ((event, fields),) = agent.events
    assert event == "live_state_captured"
    assert fields["steps"] == {0: 7, 1: 7}
    assert sentence({"event": event, "node": "a", **fields}).endswith("cannot go on: the state after step 7 is kept")


def test_the_sidecar_is_told_of_a_restore_before_workers_start_that_are_not_the_first() -> None:
    keeper = Keeper(0)
    agent = Ending(keeper)
    for generation in (1, 2):
        agent._expect(SimpleNamespace(generation=generation))  # type: ignore[arg-type]
    assert keeper.num_expected == 1
    Ending(None)._expect(SimpleNamespace(generation=2))  # type: ignore[arg-type]


def test_a_fenced_node_and_one_that_drains_have_no_time_for_it() -> None:
    for agent in (Ending(Keeper(math.inf), fenced_after=2), Ending(Keeper(math.inf), kill_by_s=0.0)):
        agent._capture(3600.0)
        ((event, fields),) = agent.events
        assert sentence({"event": event, "node": "a", **fields}).endswith("cannot go on: no state is kept")


def test_nothing_is_kept_where_nobody_keeps_it() -> None:
    keeper = Keeper(0)
    for agent in (Ending(None), Ending(keeper)):
        agent._capture(60.0 if agent._sidecar is None else 0.0)
        assert agent.events == []
    assert keeper.asked_s == []


def test_the_sentence_tells_what_is_missing() -> None:
    event = {"event": "live_state_captured", "node": "a", "steps": {0: 7, 1: 8}, "missed": {2: "no step was noted yet"}}
    told = "the workers of a cannot go on: the state after step 7 and 8 is kept; rank 2: no step was noted yet"
    assert sentence(event) == told


def test_a_node_that_joins_has_its_sidecar_ready_before_others_stop_for_it() -> None:
    keeper, seen = Keeper(0), list[int]()
    _get_ready(None, keeper)
    assert keeper.num_expected == 1
    warm = SimpleNamespace(wait_ready=lambda timeout_s: seen.append(keeper.num_expected))
    _get_ready(warm, keeper)  # type: ignore[arg-type]
    assert (seen, keeper.num_expected) == ([2], 3), "beside the imports, and again after them, had it been too early"
    _get_ready(warm, None)  # type: ignore[arg-type]
    assert seen == [2, 3]
