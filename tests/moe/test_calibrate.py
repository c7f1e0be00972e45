"""The probe that tells the mesh planner how fast a machine is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe import calibrate
from elastic_moe.config import JobConfig, load, mesh_spec
from elastic_moe.machine import MachineSpeed, read_calibration, write_calibration
from launcher import MeshPlan, step_time
from tests.moe.cases import SMALL
from tests.ranks import Ranks

JOB = {"model": SMALL.model_dump(), "train": {"seq_len": 16, "device": "cpu"}}


def measured(fields: dict[str, Any]) -> dict[str, float]:
    return calibrate.measure(JobConfig.model_validate(fields), torch.device("cpu"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_rank_finds_the_same_speeds(ranks: Ranks, world_size: int, tmp_path: Path) -> None:
    found = ranks.run(measured, JOB, world_size=world_size)
    assert all(speeds == found[0] for speeds in found)
    links = {"intra_node_bytes_per_s", "replica_bytes_per_s", "latency_s", "hop_s"} if world_size > 1 else set()
    assert set(found[0]) == {"memory_bytes_per_s", "flops_per_s", "layer_launch_s", "cores_per_node"} | links
    assert all(0 < value < math.inf for value in found[0].values())
    write_calibration(tmp_path / "new" / "machine.json", found[0])
    assert read_calibration(tmp_path / "new" / "machine.json") == found[0]
    (tmp_path / "job.toml").write_text(f"[mesh]\ncalibration = '{tmp_path}/new/machine.json'\nlatency_s = 9.0\n")
    mesh = load(tmp_path / "job.toml", environ={}).mesh
    assert {name: getattr(mesh, name) for name in MachineSpeed.model_fields if name in found[0]} == {
        **found[0],
        **({"latency_s": 9.0} if world_size > 1 else {}),
    }


@pytest.mark.parametrize("recompute", [False, True])
def test_what_a_pass_took_is_what_a_plan_says_of_it(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    """Also where layers are computed anew, which is a part of what was measured."""
    job = JobConfig.model_validate({"model": JOB["model"], "train": {"seq_len": 16, "recompute": recompute}})
    for name in ("_model", "build_mesh"):
        monkeypatch.setattr(calibrate, name, lambda *args: None)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr(calibrate, "_pass_s", lambda model, sequences, positions, device: 3.0 + 0.5 * sequences)
    spec = mesh_spec(job)
    found = calibrate._layers(job, torch.device("cpu"), spec)
    for sequences in (1, 4):
        told = step_time(MeshPlan(1, 1, 1, 0, sequences, 1), spec.replace(**found), ranks_per_node=1)
        assert told.compute + told.launch + told.weights == pytest.approx(3.0 + 0.5 * sequences)


def test_layers_are_measured_as_the_job_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled where it compiles them, for one size of a micro-batch at a time; in float64 where it is exact."""
    done: list[str] = []
    monkeypatch.setattr(calibrate, "build_mesh", lambda *args: None)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr(calibrate, "parallelize", lambda model, meshes, precision: done.append(f"{precision.exact}"))
    for name in ("materialize", "init_weights"):
        monkeypatch.setattr(calibrate, name, lambda *args: None)
    monkeypatch.setattr(calibrate, "compile_layers", lambda model, device: done.append("compile"))
    monkeypatch.setattr("torch.compiler.reset", lambda: done.append("reset"))

    def passed(model: object, sequences: float, *_: object) -> float:
        done.append("pass")
        return sequences

    monkeypatch.setattr(calibrate, "_pass_s", passed)
    found = []
    for train in ({}, {"compile": True}, {"exact": True}):
        job = JobConfig.model_validate({**JOB, "train": {**JOB["train"], **train}})
        calibrate._layers(job, torch.device("cpu"), mesh_spec(job))
        found.append(" ".join(done))
        done.clear()
    assert found == ["False pass pass", "False compile reset pass reset pass", "True pass pass"]


def test_what_another_program_has_disturbed_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = JobConfig.model_validate(JOB)
    for times_s, expected, num_told in (([3, 2, 1, 4], [1, 2], 0), ([3, 2, 4, 3, 2, 2], [2, 2], 1)):
        left = iter(times_s)
        monkeypatch.setattr(calibrate, "_pass_s", lambda *_, left=left: next(left))
        assert calibrate._times_s(job, None, torch.device("cpu")) == expected  # type: ignore[arg-type]
        assert len(caplog.records) == num_told
    assert "flops_per_s is no measurement" in caplog.text


def test_a_missing_job_is_told_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert calibrate.main([str(tmp_path / "none.toml")]) == 2
    assert capsys.readouterr().err == f"calibrate: job file {tmp_path}/none.toml does not exist\n"
    assert calibrate.main(["none.toml", "--out", "s3://bucket/x"]) == 2
    assert capsys.readouterr().err == "calibrate: --out 's3://bucket/x' is a URL, and must be a path on this machine\n"
