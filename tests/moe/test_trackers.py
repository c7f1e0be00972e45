"""Trackers by stand-ins for their packages: what they are told, what happens where they fail or are not installed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from elastic_moe.errors import UserError
from elastic_moe.trainer import trackers
from elastic_moe.trainer.trackers import Careful, check_installed, open_trackers


class FakeWandb(ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.asked: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.axes: list[tuple[str, str]] = []
        self.finished = 0

    def init(self, **asked: Any) -> FakeWandb:
        self.asked = asked
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, numbers: dict[str, Any]) -> None:
        self.logged.append(numbers)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "x")  # put back as it was afterwards
        monkeypatch.delenv(name)
    return fake


def test_wandb_stays_on_this_machine_unless_asked(wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    (tracker,) = open_trackers(None, "moe", completed=5, run_id="job-1", settings={"train": {"steps": 9}})
    assert wandb.asked == {
        "project": "moe",
        "id": "job-1",
        "resume": "allow",
        "config": {"train": {"steps": 9}},
        "mode": "offline",
    }
    tracker.log(6, {"loss/train": 2.5})
    tracker.log(6, {"loss/train": 2.4})  # done again
    tracker.close()
    assert wandb.axes == [("*", "step")]
    assert wandb.logged == [{"step": 6, "loss/train": 2.5}, {"step": 6, "loss/train": 2.4}]
    assert wandb.finished == 1
    monkeypatch.setenv("WANDB_MODE", "online")
    open_trackers(None, "moe", completed=0, run_id="", settings={})
    assert (wandb.asked["mode"], wandb.asked["id"]) == ("online", None)


def test_wandb_that_will_not_begin_is_one_line(wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("no such entity")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"train\.wandb 'moe': RuntimeError: no such entity"):
        open_trackers(None, "moe", completed=0, run_id="", settings={})


def test_tensorboard_hides_the_steps_that_are_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []
    opened: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            opened.append((folder, purge_step))

        def add_scalar(self, name: str, number: float, step: int) -> None:
            written.append((name, number, step))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    (tracker,) = open_trackers("board", None, completed=5, run_id="", settings={})
    tracker.log(6, {"loss/train": 2.5})
    tracker.close()
    assert opened == [("board", 6)]
    assert written == [("loss/train", 2.5, 6), ("closed", 0.0, 0)]


def test_what_is_not_installed_is_told_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed(None, None)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.tensorboard needs tensorboard: pip install tensorboard, or install"):
        check_installed("board", None)
    with pytest.raises(UserError, match=r"train\.wandb needs wandb: pip install wandb, or install elastic-moe with"):
        check_installed(None, "moe")


class Failing:
    def __init__(self) -> None:
        self.asked = 0

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.asked += 1
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise AssertionError("asked again")


def test_a_tracker_that_fails_is_told_once_and_the_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(trackers, "worker", SimpleNamespace(event=lambda name, **told: events.append((name, told))))
    failing = Failing()
    careful = Careful("TensorBoard", failing)
    for step in (1, 2):
        careful.log(step, {})
    careful.close()
    assert failing.asked == 1
    why = "OSError: [Errno 28] No space left on device"
    assert events == [("tracker_failed", {"tracker": "TensorBoard", "step": 1, "reason": why})]
    assert [record.getMessage() for record in caplog.records] == [f"TensorBoard is told no more, from step 1 on: {why}"]
