"""`train --dry-run`: meshes and memory for every number of nodes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_moe.cli import main as cli

GIB = 1 << 30
MIXTRAL = """
[model]
preset = "mixtral-8x7b"
[train]
global_batch = 1024
seq_len = 4096
dtype = "bfloat16"
recompute = true
"""
MACHINES = ["--nodes", "1:16", "--slots-per-node", "8", "--memory-gib", "80"]


def call(*argv: str) -> int:
    """The exit code, argparse's own exits included."""
    try:
        return cli.main(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else -1


@pytest.fixture
def job(tmp_path: Path) -> str:
    path = tmp_path / "job.toml"
    path.write_text(MIXTRAL)
    return str(path)


def test_mixtral_on_one_to_sixteen_nodes(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--dry-run", job, *MACHINES) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("46.7 billion parameters, 12.9 billion of them active; 1024 sequences of 4096 tokens")
    terms = ["params", "optim", "grads", "activ", "logits", "gathered", "working", "total", "fits"]
    assert lines[2].split()[-len(terms) :] == terms
    rows = [line.split() for line in lines[3:19]]
    assert [(int(row[0]), int(row[1])) for row in rows] == [(nodes, 8 * nodes) for nodes in range(1, 17)]
    for row in rows:
        total, fits = float(row[-2]), row[-1]
        assert sum(map(float, row[-9:-2])) == pytest.approx(total, abs=0.05)
        assert fits == ("yes" if total <= 80 else "no")
    assert {row[-1] for row in rows} == {"yes", "no"}
    odd = ", ".join(map(str, range(3, 17, 2)))
    assert lines[19:] == [f"with mesh.max_idle 8 these would train too, on 8 ranks fewer: {odd} nodes"]
    assert call("plan", "--job", job, "--nodes", "3", "--memory-gib", "80") == 1
    assert capsys.readouterr().out.endswith("\nwith --max-idle 8 these would train too, on 8 ranks fewer: 3 nodes\n")
    assert call("plan", "--job", job, "--nodes", "3", "--memory-gib", "80", "--max-idle", "8") == 0


def test_as_json(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", job, "--dry-run", "--json", *MACHINES) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["spec"]["memory_cap_bytes"] == 80 * GIB
    assert [row["slots"] for row in answer["plans"]] == list(range(8, 129, 8))
    for row in answer["plans"]:
        found = row.get("leanest", row)
        mesh = found["mesh"]
        assert mesh["replicate"] * mesh["shard"] * mesh["expert"] + mesh["idle"] == row["slots"]
        assert sum(found["memory"].values()) == found["memory_bytes"]
        assert sum(found["step"].values()) == pytest.approx(found["step_s"])
        assert (found["memory_bytes"] <= 80 * GIB) == ("infeasible" not in row)
    assert [row["nodes"] for row in answer["plans"] if row.get("idle_to_fit") == 8] == list(range(3, 17, 2))


def test_memory_comes_from_the_flag_or_the_job_or_is_80(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    def cap(*argv: str) -> float:
        call("train", job, "--dry-run", "--json", "--nodes", "1", *argv)
        return json.loads(capsys.readouterr().out)["spec"]["memory_cap_bytes"] / GIB

    assert cap() == 80
    assert cap("--set", "mesh.memory_gib=40.5") == 40.5
    assert cap("--set", "mesh.memory_gib=40.5", "--memory-gib", "141") == 141
    assert cap("--memory-gib", "74.5") == 74.5


def test_what_replicas_of_experts_take_for_granted_is_told(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["train", "--dry-run", job], ["plan", "--job", job]):
        told = {}
        for replicas in (0, 2):
            call(*verb, "--nodes", "1", "--set", f"train.expert_replicas={replicas}")
            told[replicas] = "memory holds 2 more experts in each layer" in capsys.readouterr().out
        assert told == {0: False, 2: True}


def test_a_job_that_fits_nowhere(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", job, "--dry-run", "--nodes", "1", "--memory-gib", "2") == 1
    assert capsys.readouterr().out.rstrip().endswith("no")
    pinned = ["--set", "mesh.shard=3", "--set", "mesh.replicate=1", "--set", "mesh.expert=1"]
    assert call("train", job, "--dry-run", "--nodes", "1", *pinned) == 1
    assert "no 8 ranks can be laid out with" in capsys.readouterr().out


def test_a_calibration_lies_under_the_job(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = tmp_path / "machine.json"
    machine.write_text('{"flops_per_s": 1e9, "latency_s": 0.5, "cores_per_node": 4}')
    flags = ["--calibration", str(machine), "--set", "mesh.latency_s=0.25", "--nodes", "1", "--json"]
    call("train", job, "--dry-run", *flags)
    spec = json.loads(capsys.readouterr().out)["spec"]
    assert (spec["flops_per_s"], spec["latency_s"], spec["cores_per_node"]) == (1e9, 0.25, 4)
    call("plan", "--calibration", str(machine), "--nodes", "1", "--json")
    spec = json.loads(capsys.readouterr().out)["spec"]
    assert (spec["flops_per_s"], spec["latency_s"], spec["cores_per_node"]) == (1e9, 0.5, 4)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--dry-run", "{tmp}/none.toml"], "job file {tmp}/none.toml does not exist"),
        (["{job}", "--dry-run", "--nodes", "4:2"], "argument --nodes: '4:2' is no range of node counts"),
        (["{job}", "--dry-run", "--set", "model.preset=mixtral"], "--set model.preset: model.preset = 'mixtral'"),
        (["{job}", "--dry-run", "--calibration", "{tmp}/no.json"], "calibration {tmp}/no.json cannot be read"),
        (["{job}", "--dry-run", "--calibration", "{job}"], "calibration {job} is no JSON"),
        (["{job}", "--dry-run", "--calibration", "{tmp}/odd.json"], "{tmp}/odd.json: unknown field flops; known are"),
        (["{job}", "--dry-run", "--calibration", "{tmp}/less.json"], "hop_s = -1 must be a number above 0"),
        (["{job}", "--dry-run", "--nodes", "4:"], "argument --nodes: '4:' is neither N nor MIN:MAX"),
        (["{job}", "--dry-run", "--nodes", "9" * 30], "at most 100,000,000 slots"),
        (["{job}", "--dry-run", "--slots-per-node", "9" * 15], "with --slots-per-node 999999999999999: at most"),
        (["{job}", "--dry-run", "--slots-per-node", "9" * 30], "argument --slots-per-node: it is too large"),
        (["{job}", "--dry-run", "--memory-gib", "1e300"], "argument --memory-gib: '1e300' is not between"),
        (["{job}", "--dry-run", "--memory-gib", "0"], "argument --memory-gib: '0' is not a number > 0"),
        (["{job}", "--nodes", "2"], "--nodes is of the dry run: give --dry-run too, or leave it out"),
        (["{job}", "--memory-gib", "2"], "--memory-gib is of the dry run"),
        (["{job}", "--json"], "--json is of the dry run"),
    ],
)
def test_bad_input(argv: list[str], reason: str, job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd.json").write_text('{"flops": 1}')
    (tmp_path / "less.json").write_text('{"hop_s": -1}')
    places = {"tmp": tmp_path, "job": job}
    assert call("train", *(part.format(**places) for part in argv)) == 2
    error = capsys.readouterr().err
    assert reason.format(**places) in error
    assert error.count("\n") == 1


def test_torch_is_not_imported(job: str) -> None:
    script = (
        "import sys\nfrom elastic_moe.cli.main import main\n"
        f"main(['train', '--dry-run', {job!r}, '--nodes', '1:2'])\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
