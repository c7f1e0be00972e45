"""A node that is not fit stays out of rounds and says why; GPUs are played by a script on PATH."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.health.devices import DeviceMemory, held, visible
from launcher.health.preflight import (
    Check,
    CheckResult,
    Command,
    FreeSpace,
    Gpus,
    Preflight,
    PreflightRules,
    end_commands,
    examine,
    standard_checks,
)
from launcher.launch import _end_at_once
from tests.cluster import Cluster, alive, is_running, read_lines, until

COOPERATIVE = str(Path(__file__).parent / "scripts" / "cooperative.py")


class Scripted:
    """A check that answers as it is told, once each."""

    name = "scripted"

    def __init__(self, *answers: str, timeout_s: float = 0.0, error: Exception | None = None) -> None:
        self.answers = list(answers)
        self.timeout_s = timeout_s
        self.error = error

    def run(self) -> str:
        if self.error:
            raise self.error
        return self.answers.pop(0)


def test_free_space(tmp_path: Path) -> None:
    assert FreeSpace(tmp_path, 0.001).run() == ""
    assert "MiB free, and 1e+12 MiB are asked for" in FreeSpace(tmp_path, 1e12).run()
    assert "No such file" in FreeSpace(tmp_path / "none", 1).run()


def test_a_command_fails_with_its_last_line(tmp_path: Path) -> None:
    assert Command("true", 20).run() == ""
    assert (
        Command("echo first; echo 'disk is odd' >&2; exit 3", 20).run().endswith("ended with exit code 3: disk is odd")
    )


def test_a_command_that_does_not_end_is_ended_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    for timeout_s in (1, 10, 60):  # a busy machine may not even have begun when that is over
        told = Command(f"sleep 600 & echo $! > {pids}; wait", timeout_s).run()
        assert f"did not end within {timeout_s} s" in told
        if read(pids):
            break
    until("its child is gone", lambda: not is_running(int(read(pids))))


def test_findings_name_the_check_and_errors_of_checks_are_findings() -> None:
    checks: list[Check] = [
        Scripted(""),
        Scripted("full"),
        Scripted("late", timeout_s=9),
        Scripted(error=OSError("odd")),
    ]
    assert examine(checks) == (
        CheckResult("scripted", "full"),
        CheckResult("scripted", "OSError: odd"),
        CheckResult("scripted", "late"),
    )


def test_a_check_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = threading.Event()

    class Hangs(Scripted):
        def run(self) -> str:
            given_up.wait(60)
            return ""

    monkeypatch.setattr("launcher.health.preflight._OVERTIME_S", 0.0)
    try:
        assert examine([Hangs(timeout_s=0.1)]) == (CheckResult("scripted", "scripted did not end within 0.1 s"),)
    finally:
        given_up.set()


def test_what_is_asked_for_is_checked() -> None:
    names = [c.name for c in standard_checks(PreflightRules(commands=("my-test",)), [Path("/tmp")])]
    assert names == ["free space in /dev/shm", "free space in /tmp", "gpu", "my-test"]
    off = PreflightRules(min_shm_mib=0, min_disk_mib=0)
    assert [c.name for c in standard_checks(off, [Path("/tmp")])] == ["gpu"]


class Told:
    """Records what a preflight says."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.records: list[str] = []

    def emit(self, event: str, /, **fields: Any) -> None:
        self.events.append((event, fields.get("retry_s") or fields.get("attempt")))

    def hold_back(self, unfit: str) -> None:
        self.records.append(unfit)


def test_a_node_that_fails_stays_out_with_growing_pauses_until_it_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.health.preflight._PAUSE_S", 0.01)
    told = Told()
    preflight = Preflight([Scripted("full", "full", "full still", "")], told.emit)
    assert preflight.pass_or_wait(told.hold_back, time.sleep, lambda: False, 3)
    assert told.records == ["preflight: full", "preflight: full", "preflight: full still", ""]
    assert told.events == [
        ("preflight_failed", 0.01),
        ("preflight_failed", 0.02),
        ("preflight_failed", 0.04),
        ("preflight_passed", 4),
    ]


def test_a_node_that_never_passes_gives_up_with_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    assert not Preflight([Scripted("full")], told.emit).pass_or_wait(told.hold_back, time.sleep, lambda: True, 3)


def test_others_do_not_wait_for_checks_that_take_long() -> None:
    told = Told()

    class Slow(Scripted):
        def run(self) -> str:
            until("the node stays out", lambda: told.records)
            return ""

    preflight = Preflight([Slow(timeout_s=30.0)], told.emit)
    assert preflight.pass_or_wait(told.hold_back, time.sleep, lambda: False, 3, patience_s=0.1)
    assert told.records == ["preflight runs", ""]
    assert [event for event, _ in told.events] == ["preflight_slow", "preflight_passed"]


def test_what_passed_before_the_node_joined_is_not_run_again_for_its_first_round() -> None:
    told = Told()
    preflight = Preflight([Scripted("", "full")], told.emit)
    assert preflight.first() == ""
    assert preflight.pass_or_wait(told.hold_back, time.sleep, lambda: True, 0)
    assert not preflight.pass_or_wait(told.hold_back, time.sleep, lambda: True, 1)


SMI = """#!/bin/sh
[ -e "{folder}/broken" ] && {{ echo "Unable to determine the device handle: GPU is lost" >&2; exit 15; }}
[ -e "{folder}/stuck" ] && exec sleep 600
case "$*" in
  *--query-gpu=index,uuid*) cat "{folder}/gpus";;
  *--query-gpu=index,memory.used*) cat "{folder}/used";;
  *--query-compute-apps=pid*) cat "{folder}/pids"; rm -f "{folder}/pids"; touch "{folder}/pids";;
  *) exit 9;;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder from which a fake `nvidia-smi` answers: two GPUs; each pid is listed once."""
    folder = tmp_path / "smi"
    folder.mkdir()
    tool = folder / "nvidia-smi"
    tool.write_text(SMI.format(folder=folder))
    tool.chmod(0o755)
    (folder / "gpus").write_text("0, GPU-a\n1, GPU-b\n")
    (folder / "used").write_text("0, 4\n1, 4\n")
    (folder / "pids").touch()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def test_a_gpu_that_is_lost_or_does_not_answer_is_told(smi: Path) -> None:
    gpus = Gpus(timeout_s=20)
    assert gpus.run() == ""
    (smi / "gpus").write_text("0, GPU-a\n")
    assert gpus.run() == "1 GPUs answer, 2 did before"
    (smi / "broken").touch()
    assert gpus.run() == "nvidia-smi ended with exit code 15: Unable to determine the device handle: GPU is lost"
    (smi / "broken").unlink()
    (smi / "stuck").touch()
    quick = Gpus(timeout_s=0.2)
    assert quick.run() == "nvidia-smi did not answer within 0.2 s"


def test_a_node_without_gpus_costs_nothing(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (smi / "broken").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Gpus(timeout_s=20).run() == ""
    assert DeviceMemory().wait_free([1], 0.0) == ""


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (None, None),
        ("", ""),
        ("-1", ""),
        ("NoDevFiles", ""),
        ("0,2", "0,2"),
        ("GPU-5a3b, 1,-1,2", "GPU-5a3b,1"),
        ("MIG-1c2d", None),
    ],
)
def test_the_gpus_of_a_job_are_those_that_cuda_would_use(given: str | None, named: str | None) -> None:
    assert visible(given) == named


def test_a_node_without_gpus_costs_nothing_under_slurm(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (smi / "broken").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "NoDevFiles")
    assert Gpus(timeout_s=20).run() == ""


def test_words_instead_of_figures_are_an_answer_that_says_nothing(smi: Path) -> None:
    memory = DeviceMemory()
    memory.take_baseline()
    for name in ("gpus", "used"):
        (smi / name).write_text("No devices were found\n")
    assert Gpus(timeout_s=20).run() == "nvidia-smi said 'No devices were found'"
    assert memory.wait_free([4711], 0.2) == "nvidia-smi said 'No devices were found'"


def test_device_memory_of_dead_workers_is_waited_for_in_bounded_time(smi: Path) -> None:
    memory = DeviceMemory()
    memory.take_baseline()
    (smi / "pids").write_text("4711\n")
    assert memory.wait_free([4711], 20) == "", "listed once, then gone"
    (smi / "used").write_text("0, 4\n1, 9000\n")
    assert memory.wait_free([4711], 0.2) == "GPU 1: 8996 MiB above the start"
    (smi / "broken").touch()
    assert "GPU is lost" in memory.wait_free([4711], 0.2)


def test_what_is_held() -> None:
    assert not held([1, 2], {"0": 500}, [3], {"0": 4})
    assert held([1, 2], {"0": 600}, [2, 3], {"0": 4}).pids == (2,)
    assert held([1, 2], {"0": 600}, [], {"0": 4}).excess_mib == {"0": 596}
    assert not held([1], {"1": 9000}, [], {"0": 4}), "a GPU that was not there before says nothing"


@pytest.mark.slow
def test_a_node_that_is_not_fit_stays_out_of_the_job_and_comes_in_when_it_is(nodes: Cluster, tmp_path: Path) -> None:
    work, bad = (COOPERATIVE, str(tmp_path)), tmp_path / "bad"
    bad.write_text("the disk is odd\n")
    conf = "join_cooldown=0.5,last_call=0.5"
    unfit = nodes.start("unfit", "--preflight", f"test ! -e {bad} || {{ cat {bad}; exit 4; }}", *work, conf=conf)
    nodes.wait_event("node_joined")
    fit = nodes.start("fit", *work, conf=conf)
    until("steps without the unfit node", lambda: read_lines(tmp_path / "steps.jsonl"))
    (formed,) = nodes.events("round_formed")
    assert formed["world_size"] == 1
    assert nodes.wait_event("preflight_failed")["reason"].endswith("ended with exit code 4: the disk is odd")
    bad.unlink()
    nodes.wait_event("preflight_passed")
    until("steps of both", lambda: [s for s in read_lines(tmp_path / "steps.jsonl") if s["world_size"] == 2])
    (tmp_path / "finish").touch()
    assert (fit.wait(), unfit.wait()) == (0, 0)


def test_a_node_that_is_told_to_leave_waits_for_no_command_and_leaves_none_behind(tmp_path: Path) -> None:
    marker = tmp_path / "running"
    told = Told()
    preflight = Preflight([Command(f"echo $$ > {marker}; sleep 600", timeout_s=600)], told.emit)
    assert not preflight.pass_or_wait(told.hold_back, time.sleep, lambda: bool(read(marker)), 3)
    until("the command is gone", lambda: not psutil.pid_exists(int(read(marker))))
    assert not told.events and not told.records, "it did not fail"


@pytest.mark.slow
def test_a_signal_before_the_node_joined_leaves_no_command_behind(nodes: Cluster, tmp_path: Path) -> None:
    marker = tmp_path / "running"
    node = nodes.start("only", "--preflight", f"echo $$ > {marker}; sleep 600", COOPERATIVE, str(tmp_path), nnodes="1")
    runs = psutil.Process(int(until("the command runs", lambda: read(marker))))
    try:
        node.signal(signal.SIGTERM)
        assert node.wait() == 128 + signal.SIGTERM
        until("the command is gone", lambda: not alive(runs))
    finally:
        if alive(runs):
            os.killpg(runs.pid, signal.SIGKILL)


def test_an_agent_that_is_ended_at_once_takes_its_commands_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "running"
    exit_codes: list[int] = []
    monkeypatch.setattr("launcher.launch.os._exit", exit_codes.append)
    runs = threading.Thread(target=Command(f"echo $$ > {marker}; sleep 600", timeout_s=60).run)
    runs.start()
    until("the command runs", lambda: read(marker))
    _end_at_once(75)
    runs.join(60)
    assert exit_codes == [75]
    assert not runs.is_alive()


def test_a_command_that_is_just_being_started_is_ended_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    popen, started, released = subprocess.Popen, threading.Event(), threading.Event()

    def slow(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = popen(*args, **options)
        started.set()
        assert released.wait(60)
        return process

    monkeypatch.setattr("launcher.health.preflight.subprocess.Popen", slow)
    runs = threading.Thread(target=Command("sleep 600", timeout_s=60).run)
    runs.start()
    assert started.wait(60)
    ends = threading.Thread(target=end_commands)
    ends.start()
    ends.join(0.2)  # it has to wait for the start, and so it does
    released.set()
    ends.join(60)
    runs.join(60)
    assert not runs.is_alive()


def read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""
