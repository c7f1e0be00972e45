"""Mistakes that only a real job brings to light: one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import free_port
from tests.template import child_environment, template

JOB = """
[model]
dim = 32
num_layers = 1
num_heads = 1
num_kv_heads = 1
num_experts = 2
expert_dim = 32
[train]
steps = 1
global_batch = 2
seq_len = 16
device = "cpu"
metrics = "metrics.jsonl"
[checkpoint]
url = "checkpoints"
"""


def elastic_moe(folder: Path, *arguments: str, **environ: str) -> tuple[int, str]:
    """Exit code and stderr of the command run in `folder`."""
    environment = child_environment(OMP_NUM_THREADS="1", **environ)
    done = template().run("elastic-moe", *arguments, folder=folder, cwd=folder, env=environment)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job and the checkpoint that it left."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "job.toml").write_text(JOB)
    code, stderr = elastic_moe(folder, "train", "job.toml")
    assert code == 0, stderr
    return folder


@pytest.mark.parametrize(
    ("sets", "line"),
    [
        (["model.expert_dim=64", "train.steps=2"], "model.expert_dim is 64 but the checkpoint was trained"),
        (["data.url=none.txt", "checkpoint.url=other"], "data.url 'none.txt'"),
        (["checkpoint.url=job.toml"], "job.toml is a file; a checkpoint URL names a folder"),
        (["checkpoint.url=nowhere://bucket/run"], "no store for nowhere://"),
    ],
)
def test_training(trained: Path, sets: list[str], line: str) -> None:
    flags = [word for each in sets for word in ("--set", each)]
    code, stderr = elastic_moe(trained, "train", "job.toml", *flags)
    errors = [each for each in stderr.splitlines() if each.startswith("elastic-moe: error: ")]
    assert code == 2, stderr
    assert len(errors) == 1
    assert line in errors[0]
    assert "Traceback" not in stderr


def test_an_endpoint_that_nobody_listens_at(tmp_path: Path) -> None:
    """192.0.2.0/24 is kept free of hosts (RFC 5737), so this node cannot be the endpoint's host either."""
    (tmp_path / "job.toml").write_text(JOB)
    port = free_port()
    run = ["run", "--nnodes", "1:2", "--rdzv-endpoint", f"192.0.2.1:{port}", "--rdzv-conf", "connect_timeout=1"]
    train = ["-m", "elastic_moe", "train", "job.toml"]
    code, stderr = elastic_moe(tmp_path, *run, *train, ELASTIC_MOE_TOKEN="secret")
    assert code == 2, stderr
    assert stderr.splitlines()[-1].startswith(f"elastic-moe: error: --rdzv-endpoint 192.0.2.1:{port} cannot be reached")
    assert "Traceback" not in stderr


def test_a_mistake_under_run(tmp_path: Path) -> None:
    """The workers' mistake ends the job at once with their exit code; it is not tried again."""
    (tmp_path / "job.toml").write_text(JOB)
    run = ["run", "--nproc-per-node", "2", "--max-restarts", "3", "--log-dir", "logs"]
    code, stderr = elastic_moe(tmp_path, *run, "-m", "elastic_moe", "train", "job.toml", "--set", "model.dimm=64")
    assert code == 2, stderr
    assert "--set model.dimm: unknown key model.dimm; did you mean dim?" in stderr
    assert "Traceback" not in stderr
    assert (tmp_path / "logs" / "events.jsonl").read_text().count('"round_formed"') == 1


def test_a_fault_keeps_its_traceback_and_exit_code(trained: Path) -> None:
    """`train` ends without the interpreter's own clean-up; nothing that was to be printed may be lost by that."""
    fault = "import elastic_moe.trainer.run as room; room.train = lambda job: int('many')"
    command = (
        "import sys; sys.argv = ['elastic-moe', 'train', 'job.toml']; from elastic_moe.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{fault}\n{command}"],
        cwd=trained,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    stderr = done.stderr
    assert done.returncode == 1
    assert stderr.count("Traceback (most recent call last)") == 1
    assert stderr.splitlines()[-1] == "ValueError: invalid literal for int() with base 10: 'many'"
