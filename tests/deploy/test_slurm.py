"""The batch script on a real Slurm: a job runs to its end, and through the end of its time limit."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import read_lines
from tests.cluster import until as wait_until
from tests.deploy.tools import need, parse_run
from tests.slurm import TOOLS, Slurm, slurm

ROOT = Path(__file__).parents[2]
SBATCH = str(ROOT / "deploy" / "slurm" / "elastic-moe.sbatch")
SCRIPTS = ROOT / "tests" / "launcher" / "scripts"
SMALL = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=10")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    need(*TOOLS, package="slurmctld slurmd slurm-client")
    with slurm() as made:
        yield made


until = functools.partial(wait_until, within_s=120)  # Slurm adds its own pace to that of the agents


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_lines(folder / "steps.jsonl")]


def is_now(job: dict[str, str], state: str, reason: str) -> bool:
    return (job.get("JobState"), job.get("Reason")) == (state, reason)


def events(folder: Path, job_id: str, name: str) -> list[dict[str, object]]:
    logs = folder / f"elastic-moe-{job_id}"
    return [e for node in Slurm.nodes for e in read_lines(logs / node / "events.jsonl") if e["event"] == name]


def test_a_job_drains_before_its_time_limit_and_goes_on_from_the_queue(cluster: Slurm, tmp_path: Path) -> None:
    """Slurm looks at time limits every half minute only: its warning is sent here by hand, to the same shell."""
    script = (str(SCRIPTS / "cooperative.py"), str(tmp_path))
    job_id = cluster.submit(
        *SMALL, SBATCH, *script, cwd=tmp_path, NPROC_PER_NODE="1", RDZV_CONF="last_call=60,join_cooldown=0"
    )
    try:
        until("steps on both nodes", lambda: steps(tmp_path)[5:])
        assert [e["world_size"] for e in events(tmp_path, job_id, "round_formed")] == [2]
        cluster.call("scancel", "--batch", "--signal=USR1", job_id)
        until("the job is queued again", lambda: is_now(cluster.job(job_id), "PENDING", "BeginTime"))
        assert len(events(tmp_path, job_id, "drain_started")) == 2
        before = steps(tmp_path)
        assert int((tmp_path / "saved").read_text()) == before[-1]

        # Slurm would hold it for two minutes; in the very second of its end it has revoked what a start needs.
        cluster.call("scontrol", "update", f"JobId={job_id}", "StartTime=now+3seconds")
        until("the job runs again", lambda: cluster.job(job_id).get("JobState") == "RUNNING")
        until("more steps", lambda: len(steps(tmp_path)) > len(before) + 5)
        (tmp_path / "finish").touch()
        until("the job is done", lambda: cluster.job(job_id).get("JobState") == "COMPLETED")
        assert cluster.job(job_id)["Restarts"] == "1"
        done = steps(tmp_path)
        assert done == list(range(1, len(done) + 1)), "no step lost, none done twice"
        assert (tmp_path / f"elastic-moe-{job_id}" / "token").stat().st_mode & 0o077 == 0
    except BaseException:
        print(cluster.job(job_id), *(log.read_text() for log in tmp_path.glob("*.out")), sep="\n")
        raise


@pytest.mark.parametrize(("code", "state", "reason"), [(3, "FAILED", "NonZeroExitCode"), (75, "PENDING", "BeginTime")])
def test_the_agents_exit_code_decides(cluster: Slurm, tmp_path: Path, code: int, state: str, reason: str) -> None:
    """Something that ends at once stands for them."""
    stand_in = tmp_path / "bin" / "elastic-moe"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >arguments-$SLURM_PROCID\nexit {code}\n')
    stand_in.chmod(0o755)
    path = os.pathsep.join([str(stand_in.parent), cluster.environment["PATH"]])
    etcd = {"ETCD_ENDPOINTS": "etcd-1:2379,etcd-2:2379", "MIN_NODES": "1", "NPROC_PER_NODE": "2"}
    job_id = cluster.submit(*SMALL, SBATCH, "-m", "trainer", "--steps", "3", cwd=tmp_path, PATH=path, **etcd)
    until(f"the job is {state}", lambda: is_now(cluster.job(job_id), state, reason))
    assert cluster.job(job_id)["Restarts"] == ("1" if state == "PENDING" else "0")
    for index, node in enumerate(Slurm.nodes):
        given = parse_run((tmp_path / f"arguments-{index}").read_text().splitlines())
        assert (given.nnodes, given.nproc_per_node, given.node_name) == ("1:2", "2", node)
        assert (given.rdzv_backend, given.rdzv_endpoint) == ("etcd3", etcd["ETCD_ENDPOINTS"])
        assert given.rdzv_id == job_id
        assert (given.training_script, given.training_script_args) == ("trainer", ["--steps", "3"])


def test_the_script_is_sound() -> None:
    need("shellcheck", package="shellcheck")
    done = subprocess.run(["shellcheck", "--severity=warning", SBATCH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
