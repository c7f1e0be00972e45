"""The demo's children: killed whole, stopped in any case, and free of their parent's job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_moe.demo.driver import _prepare
from elastic_moe.demo.job import job_toml
from elastic_moe.demo.processes import Processes, child_environ
from elastic_moe.errors import UserError
from tests.cluster import is_running, until

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(sleep, start_new_session=True).pid, flush=True)
time.sleep(600)
"""
# Whoever starts the tests in the background lets them, and so their children, ignore SIGINT.
OBEDIENT = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(3))
print("ready", flush=True)
time.sleep(600)
"""


def test_a_node_is_killed_whole(tmp_path: Path) -> None:
    with Processes() as processes:
        node = processes.start("node", ["-c", STUBBORN], log_path=tmp_path / "node.log")
        until("it says its first line", lambda: node.tail(1) != [])
        worker = int(node.tail(1)[0])
        assert is_running(worker)
        assert node.poll() is None
        node.kill()
        assert node.poll() == -signal.SIGKILL
        until("the worker is gone", lambda: not is_running(worker))


def test_leaving_stops_what_still_runs(tmp_path: Path) -> None:
    with Processes() as processes:
        node = processes.start("node", ["-c", OBEDIENT], log_path=tmp_path / "node.log")
        until("it says its first line", lambda: node.tail(1) != [])
    assert node.poll() == 3, "it was asked, and not killed"


def test_leaving_kills_what_ignores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_moe.demo.processes._STOP_GRACE_S", 0.2)
    with Processes() as processes:
        node = processes.start("node", ["-c", STUBBORN], log_path=tmp_path / "node.log")
        until("it says its first line", lambda: node.tail(1) != [])
        worker = int(node.tail(1)[0])
    assert node.poll() == -signal.SIGKILL
    until("the worker is gone", lambda: not is_running(worker))


def test_children_die_with_a_killed_demo(tmp_path: Path) -> None:
    """kill -9 of the demo leaves nothing behind: the kernel ends its children."""
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid()) + '\\n'); time.sleep(600)"
    demo = f"""
import time
from pathlib import Path
from elastic_moe.demo.processes import Processes
Processes().start("node", ["-c", {child!r}], log_path=Path({str(tmp_path / "log")!r}))
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", demo]) as parent:
        try:
            until("its child has started", lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
            pid = int(pid_file.read_text())
            assert is_running(pid)
        finally:
            parent.kill()
    until("its child is gone", lambda: not is_running(pid))


def test_the_environment_of_children() -> None:
    environ = {"PATH": "/bin", "RANK": "3", "ELASTIC_MOE__TRAIN__STEPS": "3", "TORCHELASTIC_RUN_ID": "x"}
    assert child_environ(environ) == {"PATH": "/bin", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def test_only_an_earlier_demo_is_overwritten(tmp_path: Path) -> None:
    fresh = tmp_path / "new" / "out"
    _prepare(fresh)
    assert list(fresh.iterdir()) == []
    job = job_toml(steps=60, seed=0, metrics=fresh / "metrics.jsonl", checkpoints=fresh / "checkpoints", sharded=True)
    (fresh / "job.toml").write_text(job)
    (fresh / "metrics.jsonl").write_text("old\n")
    _prepare(fresh)
    assert list(fresh.iterdir()) == []

    (fresh / "job.toml").write_text(job)
    (fresh / "thesis.tex").write_text("mine")
    _prepare(fresh)
    assert [path.name for path in fresh.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="not empty, and not of an earlier demo"):
        _prepare(fresh)
    assert (fresh / "thesis.tex").read_text() == "mine"
    with pytest.raises(UserError, match="not a directory"):
        _prepare(fresh / "thesis.tex")


def test_the_job_is_valid_and_its_paths_survive_quoting(tmp_path: Path) -> None:
    from elastic_moe.config import load

    odd = tmp_path / 'a "quoted" \\ folder'
    path = tmp_path / "job.toml"
    path.write_text(job_toml(steps=70, seed=3, metrics=odd / "m", checkpoints=odd / "c", sharded=False))
    job = load(path, environ={})
    assert (job.train.steps, job.train.seed) == (70, 3)
    assert (job.train.metrics, job.checkpoint.url) == (str(odd / "m"), str(odd / "c"))
    assert os.fspath(odd / "m") == job.train.metrics
