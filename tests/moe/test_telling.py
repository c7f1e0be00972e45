"""What rank 0 tells of its steps: lines of metrics, the progress on a terminal or a log, trackers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe.config import JobConfig
from elastic_moe.trainer import telling
from elastic_moe.trainer.metrics import MetricsFile, SaveCounts
from elastic_moe.trainer.routing import routing_stats
from elastic_moe.trainer.step import StepResult
from elastic_moe.trainer.telling import Teller, open_teller
from elastic_moe.trainer.throughput import flops_per_token
from elastic_moe.trainer.trackers import Careful
from launcher import MeshPlan, WorkerContext

PLAN = MeshPlan(replicate=1, shard=2, expert=2, idle=0, micro_batch=2, rounds=1)
LOAD_LE = torch.tensor([[6.0, 2.0], [4.0, 4.0]], dtype=torch.float64)


def here(rank: int = 0) -> WorkerContext:
    return WorkerContext(rank, rank, 4, 3, "", "job", PLAN)


def job(**train: Any) -> JobConfig:
    train = {"metrics": None, "steps": 20, "global_batch": 2, "seq_len": 2, "peak_flops": 1e9, **train}
    return JobConfig.model_validate({"model": {"num_experts": 2}, "train": train})


def result(loss: float = 2.5, entropy: float = 0.0) -> StepResult:
    entropy_L = torch.tensor([0.0, entropy], dtype=torch.float64)
    stats = routing_stats(LOAD_LE, entropy_L, num_tokens=4, top_k=2)
    return StepResult(loss, 0.5, 1e-3, LOAD_LE, routing=stats)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_step_has_a_line_and_every_tenth_the_loads(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open_teller(job(metrics=str(path)), here(), PLAN, torch.device("cpu"), 8) as teller:
        assert teller is not None
        for step in (9, 10, 11):
            teller.tell(step, result(), 0.5, 2.25 if step == 11 else None, SaveCounts())
    told = lines(path)
    assert [line["step"] for line in told] == [9, 10, 11]
    assert [line["load"] for line in told] == [None, [[6, 2], [4, 4]], [[6, 2], [4, 4]]]
    assert [line["val_loss"] for line in told] == [None, None, 2.25]
    first = told[0]
    assert (first["load_max"], first["load_min"], first["dropped"], first["redone"]) == (1.5, 0.5, 0, False)
    assert first["load_entropy"] == [pytest.approx(0.811, abs=1e-3), 1.0]
    assert first["router_entropy"] == [0.0, 0.0]
    assert first["tokens_per_s"] == 8.0
    assert first["mfu"] == pytest.approx(8.0 * flops_per_token(job().model, 2) / 4e9, abs=1e-5)


def test_a_step_of_routers_that_are_not_finite_has_a_line_as_well(tmp_path: Path) -> None:
    """It was skipped: the metrics tell it, and are no reason for the training to end."""
    path = tmp_path / "metrics.jsonl"
    with open_teller(job(metrics=str(path)), here(), PLAN, torch.device("cpu"), 0) as teller:
        assert teller is not None
        teller.tell(1, result(loss=math.nan, entropy=math.nan), 0.5, None, SaveCounts())
    (told,) = lines(path)
    assert (told["loss"], told["router_entropy"]) == (None, None)
    assert told["load_entropy"] == [pytest.approx(0.811, abs=1e-3), 1.0]


def test_steps_that_are_done_again_are_told_apart(tmp_path: Path) -> None:
    """Killed at step 5, gone on from 2, killed at 3, and gone on from 2 once more: 5 was the last one seen."""
    path = tmp_path / "metrics.jsonl"
    for steps in (range(1, 6), range(3, 4), range(3, 8)):
        with open_teller(job(metrics=str(path)), here(), PLAN, torch.device("cpu"), steps[0] - 1) as teller:
            assert teller is not None
            for step in steps:
                teller.tell(step, result(), 0.5, None, SaveCounts())
    told = [(line["step"], line["redone"]) for line in lines(path)]
    assert told[:5] == [(step, False) for step in range(1, 6)]
    assert told[5:] == [(3, True), (3, True), (4, True), (5, True), (6, False), (7, False)]


def test_a_line_that_a_crash_cut_off_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 7, "loss": 2.0}\n{"step": 8, "lo')
    with MetricsFile(path) as file:
        assert file.last_step == 8
        with open_teller(job(metrics=str(path)), here(), PLAN, torch.device("cpu"), 7) as teller:
            assert teller is not None
            teller.tell(8, result(), 0.5, None, SaveCounts())
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 8
    assert path.read_text().splitlines()[1] == '{"step": 8, "lo'


def test_other_ranks_tell_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open_teller(job(metrics=str(path)), here(rank=1), PLAN, torch.device("cpu"), 0) as teller:
        assert teller is None
    assert not path.exists()


def test_a_log_has_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), open_teller(job(), here(), PLAN, torch.device("cpu"), 0) as teller:
        assert teller is not None
        for step in range(1, 21):
            teller.tell(step, result(), 0.5, 2.25 if step == 5 else None, SaveCounts())
    told = [record.getMessage() for record in caplog.records if record.name == telling.__name__]
    assert [line.partition("  ")[0] for line in told] == ["step 5/20", "step 10/20", "step 20/20"]
    assert "validation 2.2500" in told[0]
    assert "mesh 1x2x2  generation 3" in told[1]
    assert "tokens/s  MFU " in told[1]
    assert told[1].endswith(" left")


def test_a_terminal_has_one_line_in_place_of_these(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        caplog.at_level(logging.INFO),
        open_teller(job(progress="line"), here(), PLAN, torch.device("cpu"), 0) as teller,
    ):
        assert teller is not None
        for step in range(1, 21):
            teller.tell(step, result(), 0.5, None, SaveCounts())
    assert not [record for record in caplog.records if record.name == telling.__name__]
    shown = capsys.readouterr().err
    assert shown.endswith("\n")
    assert shown.count("\n") == 1
    assert "step 20/20" in shown.rpartition("\x1b[2K")[2]


def test_trackers_get_the_numbers_that_there_are() -> None:
    told: list[tuple[int, dict[str, float]]] = []

    class Tracker:
        def log(self, step: int, numbers: Mapping[str, float]) -> None:
            told.append((step, dict(numbers)))

        def close(self) -> None: ...

    teller = Teller(job(), here(), PLAN, peak=None, trackers=[Careful("x", Tracker())])
    teller.tell(1, result(loss=math.nan), 0.5, None, SaveCounts())
    ((step, numbers),) = told
    assert step == 1
    assert "loss/train" not in numbers
    assert "speed/mfu" not in numbers
    assert numbers["experts/load_max"] == 1.5
    assert numbers["job/world_size"] == 4.0
    assert all(isinstance(number, float) for number in numbers.values())
