"""Losses, gradients and parameters that are not finite: steps are skipped, bad states marked, and the job ends."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from elastic_moe.config import JobConfig
from elastic_moe.errors import NotFinite
from elastic_moe.parallel import build_mesh, init_weights
from elastic_moe.trainer import batches, loop, step
from elastic_moe.trainer.health import first_not_finite, go_back_to
from elastic_moe.trainer.metrics import SaveCounts
from elastic_moe.trainer.setup import set_up
from elastic_moe.trainer.signals import StopSignals
from elastic_moe.trainer.state import DataProgress, DataState
from elastic_moe.trainer.step import Finish, StepResult
from launcher import WorkerContext, worker
from launcher.rounds.mesh import MeshPlan
from launcher.workers.channel import StopReason, WorkerPhase
from storage import inspection
from tests.moe.cases import fitted
from tests.moe.test_train import World, job, lines, unsaved
from tests.moe.test_training import job as step_job
from tests.ranks import Ranks

Fault = Callable[[int], float]
"""What the loss of a step (counted from 1) is multiplied with on this rank."""


def snapshot(stepper: step.Stepper) -> dict[str, Tensor]:
    """All that a step may change, this rank's part of it."""
    found = {name: tensor.to_local() if hasattr(tensor, "to_local") else tensor for name, tensor in buffers(stepper)}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def buffers(stepper: step.Stepper) -> Iterator[tuple[str, Any]]:
    yield from stepper.model.state_dict().items()
    for param, state in stepper.optimizer.state.items():
        yield from ((f"{id(param)}.{name}", value) for name, value in state.items())


def nan_loss(rank: int, num_rounds: int) -> None:
    """Of one round of one rank."""
    calls = 0

    def token_loss(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return original(*args) * (math.nan if dist.get_rank() == rank and calls == num_rounds else 1.0)

    original, batches.token_loss = batches.token_loss, token_loss  # type: ignore[attr-defined]


def inf_gradient() -> None:
    """With a loss that is finite."""

    def objective(*args: Any) -> Tensor:
        return original(*args) * (math.inf if dist.get_rank() == 0 else 1.0)

    original, step.objective = step.objective, objective


def nan_term(term: str) -> None:
    """Of the objective, that is no part of the loss: on the last rank."""

    def objective(out: Any, *args: Any) -> Tensor:
        factor = math.nan if dist.get_rank() == dist.get_world_size() - 1 else 1.0
        return original(out._replace(**{term: getattr(out, term) * factor}), *args)

    original, step.objective = step.objective, objective


def skip_one(what: JobConfig, plan: MeshPlan, spoil: Callable[[], None]) -> tuple[str, list[str], list[str]]:
    """Why a spoilt second step was skipped, what it has changed, and what the next one has."""
    kept = batches.token_loss, step.objective  # type: ignore[attr-defined]
    stepper, _ = set_up(what, build_mesh(plan, "cpu"), dist.get_rank(), torch.device("cpu"))
    init_weights(stepper.model, what.train.seed)
    assert stepper.step(0).skipped == ""
    before = snapshot(stepper)
    try:
        spoil()
        result = stepper.step(1)
    finally:
        batches.token_loss, step.objective = kept  # type: ignore[attr-defined]
    after = snapshot(stepper)
    assert all(param.grad is None for param in stepper.model.parameters()), "a gradient is left for the next step"
    assert stepper.step(2).skipped == ""
    last = snapshot(stepper)
    changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    return result.skipped, changed, [name for name, tensor in last.items() if not torch.equal(tensor, after[name])]


LOSS_NAN, NORM_NAN = "the loss is nan", "the gradient's norm is nan"


@pytest.mark.parametrize(
    ("train", "model", "degrees", "spoil", "reason"),
    [
        ({}, {}, {}, functools.partial(nan_loss, 0, 1), f"{LOSS_NAN} and {NORM_NAN}"),
        ({"max_micro_batch": 2}, {"balance": "bias"}, {"replicate": 2}, functools.partial(nan_loss, 1, 2), LOSS_NAN),
        ({"exact": True}, {"balance": "bias"}, {"expert": 2}, functools.partial(nan_loss, 1, 3), LOSS_NAN),
        ({}, {}, {"shard": 2}, inf_gradient, "the gradient's norm is "),
        ({"dtype": "bfloat16"}, {"balance": "bias"}, {"expert": 2}, inf_gradient, "the gradient's norm is "),
        ({}, {"balance": "sequence"}, {"replicate": 2}, functools.partial(nan_term, "balance"), NORM_NAN),
        ({"exact": True}, {"balance": "bias"}, {"expert": 2}, functools.partial(nan_term, "z"), NORM_NAN),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(
    ranks: Ranks,
    train: dict[str, Any],
    model: dict[str, Any],
    degrees: dict[str, int],
    spoil: Callable[[], None],
    reason: str,
) -> None:
    what = step_job(train, model)
    plan = fitted(what, **degrees)
    for skipped, changed, later in ranks.run(skip_one, what, plan, spoil, world_size=plan.world_size):
        assert skipped.startswith(reason), skipped
        assert not changed
        assert later
        assert any("expert_bias" in name for name in later) == (model.get("balance") == "bias")


class TestFirstNotFinite:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_a_single_element(self, bad: float, dtype: torch.dtype) -> None:
        state: dict[str, Any] = {
            "model": {"a": torch.ones(5, 7, dtype=dtype), "ids": torch.arange(3), "none": torch.empty(0)},
            "optim": {"exp_avg": {"w": torch.zeros(3, dtype=dtype)}},
            "data": DataProgress(DATA, horizon=20),
        }
        assert first_not_finite(state) == ""
        state["optim"]["exp_avg"]["w"][2] = bad
        assert first_not_finite(state) == "optim.exp_avg.w"
        state["model"]["a"].t()[4, 3] = bad
        assert first_not_finite(state) == "model.a"

    def test_the_largest_numbers_are_finite(self) -> None:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            largest = torch.finfo(dtype).max
            assert first_not_finite({"a": torch.tensor([largest, -largest], dtype=dtype)}) == ""


@pytest.mark.parametrize(
    ("healthy", "step", "in_row", "expected"),
    [
        ([10, 20], 27, 3, (20, 20)),
        ([10, 20], 23, 3, (20, 10)),  # nothing has changed since step 20
        ([20], 23, 3, (20, 20)),
        ([20], 20, 0, (20, 20)),
        ([], 5, 3, (-1, -1)),
    ],
)
def test_which_checkpoint_to_go_back_to(healthy: list[int], step: int, in_row: int, expected: tuple[int, int]) -> None:
    assert go_back_to(healthy, step, in_row) == expected


# --- the loop


DATA = DataState(seed=0, global_batch=6, seq_len=16, fingerprint="f")


class Saved(NamedTuple):
    step: int
    healthy: bool


class Script:
    """A trainer's loop around a stepper that does nothing but fail as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bad_steps: set[int], asked_at: int = 0) -> None:
        self.saved: list[Saved] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.progress = DataProgress(DATA, horizon=20)
        self.bad_steps, self.asked_at = bad_steps, asked_at
        self.poisoned_at = 0
        self.state: dict[str, Any] = {"model": {"w": torch.ones(2)}}
        self.yielded_at = 0
        self.gave_up = False
        self.saves = SaveCounts()
        self._asked = 0
        for name, replaced in {
            "heartbeat": lambda step, **_: None,
            "should_stop": lambda: "drain" if 0 < self.asked_at <= self.progress.step else None,
            "event": lambda name, **fields: self.events.append((name, fields)),
            "yielded": lambda step: setattr(self, "yielded_at", step),
            "gave_up": lambda: setattr(self, "gave_up", True),
        }.items():
            monkeypatch.setattr(worker, name, replaced)
        monkeypatch.setattr(loop, "from_rank_0", lambda numbers: numbers())
        monkeypatch.setattr(loop.Loop, "_report", lambda *_: None)
        monkeypatch.setattr(loop, "_healthy_steps", lambda url: [s.step for s in self.saved if s.healthy])

    def step(self, done: int, finish: Finish) -> StepResult:
        if done + 1 == self.poisoned_at:
            self.state["model"]["w"][1] = math.nan
        skipped = "the loss is nan" if done + 1 in self.bad_steps else ""
        result = StepResult(1.0, 1.0, 1e-3, torch.ones(1, 1), skipped, math.nan if skipped else 0.0)
        if not skipped:
            finish(result, lambda: None)
        return result

    def finish_step(self, step: int, state: Any, apply: Callable[[], object]) -> None:
        apply()

    def due(self, step: int) -> bool:
        before, self._asked = self._asked, step
        return step // 4 > before // 4

    def save(self, step: int, state: Any, wait: bool = False, healthy: bool | None = None) -> None:
        self.saved += [Saved(step, healthy)] if healthy is not None else []  # else it is only told of a step

    def wait(self, *, held: bool = False) -> bool:
        return True

    def announce_end(self) -> None: ...
    def close(self) -> None: ...

    def run(self, steps: int, **train: Any) -> None:
        what = JobConfig.model_validate({"train": {"steps": steps, **train}, "checkpoint": {"url": "somewhere"}})
        here = WorkerContext(0, 0, 1, 0, "", "", None)
        signals = StopSignals(under_agent=True)
        loop.Loop(what, here, self, self.progress, self.state, self, None, signals, self.saves).run()  # type: ignore[arg-type]


def test_a_save_that_is_due_waits_for_a_step_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, {4, 5, 9})
    script.run(10)
    assert script.saved == [(6, True), (8, True), (10, True)]
    assert (script.progress.step, script.progress.skipped, script.progress.updates) == (10, 3, 7)
    told = [(fields["step"], fields["in_row"]) for name, fields in script.events if name == "step_skipped"]
    assert told == [(4, 1), (5, 2), (9, 1)]
    assert [fields["step"] for name, fields in script.events if name == "loss_not_finite"] == [4, 5, 9]


def test_nobody_stops_after_a_skipped_step(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, {6, 7}, asked_at=6)
    script.run(20)
    assert (script.saved[-1], script.yielded_at) == ((8, True), 8)
    assert [f["step"] for name, f in script.events if name == "stop_postponed"] == [6, 7]


@pytest.mark.parametrize(("limit", "last"), [(1, 6), (2, 7), (3, 8), (100, 20)])
def test_so_many_in_a_row_end_the_job(monkeypatch: pytest.MonkeyPatch, limit: int, last: int) -> None:
    script = Script(monkeypatch, {2, *range(6, 21)} - ({2} if limit == 1 else set()))
    with pytest.raises(NotFinite) as caught:
        script.run(20, max_skipped=limit)
    assert script.progress.step == last
    text = str(caught.value)
    assert f"step {last}" in text and "since the loss is nan" in text and "\n" not in text
    assert "the newest healthy checkpoint in somewhere is of step 4" in text
    assert script.saved == ([(4, True)] if limit < 100 else [(4, True), (20, False)])


def test_the_row_goes_on_over_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, {6})
    script.progress.load_state_dict(
        {**DataProgress(DATA, horizon=20).state_dict(), "step": 5, "skipped": 3, "skipped_in_row": 2}
    )
    with pytest.raises(NotFinite, match="3 steps in a row were skipped up to step 6"):
        script.run(9)
    assert script.progress.updates == 2


def test_the_last_step_must_not_be_a_skipped_one(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, {9})
    with pytest.raises(
        NotFinite, match=r"step 9, the last, was skipped, .* the newest healthy checkpoint .* of step 8"
    ):
        script.run(9)
    assert script.saved == [(4, True), (8, True), (9, False)]


def test_a_state_that_is_not_finite_is_saved_as_such_and_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, set())
    script.poisoned_at = 7
    with pytest.raises(NotFinite, match=r"the state after step 8 is not finite \(model.w\); .* of step 4"):
        script.run(20)
    assert script.saved == [(4, True), (8, False)]
    assert ("state_not_finite", {"step": 8, "tensor": "model.w"}) in script.events


# --- whole jobs


def spoil_losses(fault: Fault) -> None:
    """Multiply what `fault` says into the losses of a worker process."""
    now = [0]
    original_step, original_loss = step.Stepper.step, batches.token_loss  # type: ignore[attr-defined]

    def counted(self: step.Stepper, done: int, finish: Finish | None = None) -> StepResult:
        now[0] = done + 1
        return original_step(self, done, finish)

    step.Stepper.step = counted  # type: ignore[method-assign]
    batches.token_loss = lambda *args: original_loss(*args) * fault(now[0])  # type: ignore[attr-defined]


def nan_at(steps: tuple[int, ...], rank: int, at: int) -> float:
    return math.nan if at in steps and dist.get_rank() == rank else 1.0


def poison(at: int, rank: int) -> None:
    """Let an update leave a NaN in an expert that one rank holds."""
    original = step.Stepper.step

    def poisoned(self: step.Stepper, done: int, finish: Finish | None = None) -> StepResult:
        result = original(self, done, finish)
        if done + 1 == at and dist.get_rank() == rank:
            param = next(p for n, p in self.model.named_parameters() if ".experts." in n)
            param.to_local().data.flatten()[0] = math.nan  # type: ignore[attr-defined, operator]
        return result

    step.Stepper.step = poisoned  # type: ignore[method-assign]


def states(folder: Path) -> list[tuple[int | None, str]]:
    return [(row.step, row.state) for row in inspection.summaries(inspection.locate(str(folder / "checkpoints")))]


def test_a_run_through_skipped_steps_and_a_kill_equals_an_unbroken_one(tmp_path: Path) -> None:
    """The moments have seen fewer steps than the job has done, and a restored one knows how many."""
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    broken.mkdir()
    unbroken.mkdir()
    faulty = functools.partial(spoil_losses, functools.partial(nan_at, (2, 3, 9), 0))
    what = job(broken, steps=4000)  # more than it comes to
    with World(broken, what, fitted(what, expert=2), generation=1, prepare=faulty) as first:
        first.reach(6)
        first.channels[1].request_stop(StopReason.MEMBERSHIP)
        assert first.exit_codes() == [0, 0]
    with World(broken, what, fitted(what), generation=2, prepare=faulty) as second:
        second.reach(first.channels[0].progress().step + 7)  # the last of which may not be told when all are killed
    alone = unsaved(what, unbroken)
    last_step = lines(broken / "metrics.jsonl")[-1]["step"]
    with World(unbroken, alone, fitted(alone), generation=1, prepare=faulty) as whole:
        whole.reach(last_step)
    expected = {line["step"]: line for line in lines(unbroken / "metrics.jsonl")}
    for line in lines(broken / "metrics.jsonl"):
        if line["step"] in expected:
            assert (line["skipped"] != "") == (line["step"] in (2, 3, 9)) == (line["loss"] is None)
            if line["loss"] is not None:
                assert line["loss"] == pytest.approx(expected[line["step"]]["loss"], rel=1e-14), line
    assert last_step >= 12
    skipped = [(e["step"], e["in_row"]) for e in lines(broken / "events.jsonl") if e["event"] == "step_skipped"]
    assert skipped[:2] == [(2, 1), (3, 2)]


def test_a_job_that_goes_wrong_for_good_stops_and_its_healthy_checkpoint_stays(tmp_path: Path) -> None:
    """A NaN of one rank only; all end alike, with one line that names the checkpoint to go back to."""
    what = job(tmp_path, steps=40)
    what = what.model_copy(update={"checkpoint": what.checkpoint.model_copy(update={"every": 2, "keep": 2})})
    bad = functools.partial(spoil_losses, functools.partial(nan_at, tuple(range(9, 41)), 1))
    with World(tmp_path, what, fitted(what, expert=2), generation=1, prepare=bad) as world:
        assert world.exit_codes() == [70, 70]
    assert {channel.progress().phase for channel in world.channels} == {WorkerPhase.GAVE_UP}
    for told in world.errors:
        assert told.read_text() == (
            "3 steps in a row were skipped up to step 11, since the loss is nan and the gradient's norm is nan;"
            f" the newest healthy checkpoint in {what.checkpoint.url} is of step 8, the very state that fails:"
            " to go on from that of step 6, remove it"
        )
    assert states(tmp_path) == [(8, "committed"), (6, "committed")]
    events = lines(tmp_path / "events.jsonl")
    assert {(e["rank"], e["step"]) for e in events if e["event"] == "loss_not_finite"} == {(1, 9), (1, 10), (1, 11)}
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["loss"] is None


def test_a_nan_in_one_ranks_parameters_is_saved_to_look_into_and_passed_over(tmp_path: Path) -> None:
    what = job(tmp_path, steps=9)
    with World(tmp_path, what, fitted(what, expert=2), generation=1, prepare=functools.partial(poison, 8, 1)) as world:
        assert world.exit_codes() == [70, 70]
    assert states(tmp_path) == [(8, "unhealthy"), (4, "committed")]
    assert "the state after step 8 is not finite (model.layers.0.moe.experts." in world.errors[1].read_text()
    assert world.errors[0].read_text().endswith("is of step 4")
    with World(tmp_path, what, fitted(what), generation=2) as again:
        assert again.exit_codes() == [0]
    assert states(tmp_path) == [(9, "committed"), (8, "committed"), (4, "committed")]
    events = lines(tmp_path / "events.jsonl")
    assert [e["passed_over"] for e in events if e["event"] == "checkpoint_passed_over"] == [[8]]
