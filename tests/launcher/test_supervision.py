"""The agent's loop over one generation, against scripted workers and a scripted membership."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from launcher.elastic.agent import ElasticAgent
from launcher.elastic.cooperative_stop import CooperativeStop, GracePeriods
from launcher.workers.channel import StopReason


class Channels:
    """Those of workers that report progress and never stop."""

    asked_s: float | None = None

    def is_cooperative(self) -> bool:
        return True

    def request_stop(self, reason: StopReason) -> None:
        self.asked_s = self.asked_s or 1000.0

    def progress(self) -> dict[int, Any]:
        return {}


class Supervised(ElasticAgent):
    """An agent whose workers have these exit codes, look after look."""

    def __init__(self, *looks: tuple[int | None, ...], silent: bool = False) -> None:
        self._looks = list(looks)
        self._warm = None
        self._vitals = SimpleNamespace(look=lambda channels: None)  # type: ignore[assignment]
        self._graces = GracePeriods(stop_s=1.0)
        self._member = SimpleNamespace(  # type: ignore[assignment]
            wait=lambda seconds: None,
            stop_requested=lambda generation: "",
            store_silent=lambda: silent,
            broken=lambda generation: None,
            all_stop=lambda generation: False,
        )
        self.paused: list[bool] = []
        self._watchdog = SimpleNamespace(look=self._look)  # type: ignore[assignment]
        self._drain = SimpleNamespace(current=None)  # type: ignore[assignment]
        self._workers = Channels()  # type: ignore[assignment]
        self.events: list[str] = []
        self._cooperative_stop = CooperativeStop(
            self._member,
            self._drain,
            self._graces,
            lambda event, /, **fields: self.events.append(event),
            self.events.append,
        )
        self._cooperative_stop.begin(self._workers, 0.0)
        self._cooperative_stop.look = lambda reason, exited: False  # type: ignore[method-assign]
        self.reported = False

    def _look(self, now_s: float, *, exited: set[int], paused: bool) -> None:
        self.paused.append(paused)

    def _exited(self) -> set[int]:
        return set()

    def _worker_exits(self) -> Any:
        return [SimpleNamespace(exit_code=code) for code in self._looks.pop(0)]

    def _report_failures(self) -> None:
        self.reported = True

    def check_group(self) -> Any:
        raise AssertionError("torch stops all workers in its own way once one has failed, and tells nobody")


def test_a_failure_is_told_before_torch_may_stop_the_other_workers() -> None:
    """Between one look and the next a worker may fail: nothing may find that out but the look."""
    agent = Supervised((None, None), (0, None), (0, -9))
    end = agent._supervise(1)
    assert agent.reported
    assert getattr(end, "reason", "") == "worker failed"


def test_a_store_that_is_silent_again_and_again_asks_workers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that never stop are watched for hangs again once the time to stop is over."""
    now_s = iter((999.0, 1000.0, 1299.0, 1301.0, 2000.0))
    agent = Supervised(*[(None,)] * 4, (1,), silent=True)
    agent._watchdog.look = lambda at_s, *, exited, paused: agent.paused.append(paused)  # type: ignore[method-assign]
    clock = {"now_s": 0.0}

    def wait(seconds: float) -> None:
        clock["now_s"] = next(now_s)

    agent._member.wait = wait  # type: ignore[method-assign]
    monkeypatch.setattr("launcher.elastic.cooperative_stop.time.monotonic", lambda: clock["now_s"])
    agent._supervise(1)
    assert agent.paused == [False, True, True, False]
    assert agent.events == [], "nothing timed out, and nobody waits for stacks while a lease runs out"
