"""Nodes that are told to leave, with real processes: by whom ever, and within the grace, whatever else happens."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.cluster import Cluster, Node, alive, read_lines, until
from tests.template import template

SCRIPTS = Path(__file__).parent / "scripts"
COOPERATIVE, STUBBORN = str(SCRIPTS / "cooperative.py"), str(SCRIPTS / "stubborn.py")
TERMINATED = 128 + signal.SIGTERM
DRAINED = 75

pytestmark = pytest.mark.slow


def steps_of(folder: Path) -> list[int]:
    return [s["step"] for s in read_lines(folder / "steps.jsonl")]


def two_that_train(nodes: Cluster, folder: Path, conf: str = "", grace_s: int = 60) -> tuple[Node, Node]:
    work = ("--drain-grace", str(grace_s), COOPERATIVE, str(folder))
    first = nodes.start("first", *work, conf=f"last_call=60,is_host=true{conf}")
    second = nodes.start("second", *work, conf=f"last_call=60,is_host=false,connect_timeout=60{conf}")
    until("steps", lambda: steps_of(folder)[3:])
    return first, second


def test_a_worker_that_ignores_sigterm_does_not_make_the_agent_overstay(nodes: Cluster, tmp_path: Path) -> None:
    """Every other limit is far above the time that this test waits."""
    options = ("--shutdown-timeout", "600", "--drain-grace", "10", STUBBORN, str(tmp_path))
    node = nodes.start("only", *options, nnodes="1:1", conf="yield_timeout=600")
    until("a worker", lambda: read_lines(tmp_path / "started.jsonl"))
    worker = psutil.Process(read_lines(tmp_path / "started.jsonl")[0]["pid"])
    node.signal(signal.SIGTERM)
    assert node.wait() == TERMINATED
    assert not alive(worker)
    (started,) = nodes.events("drain_started")
    assert (started["source"], started["detail"], started["seconds"]) == ("signal", "SIGTERM", 10)
    (cut,) = nodes.events("drain_cut_short")
    assert cut["step"] == 3
    assert "no step boundary" in cut["reason"]
    assert nodes.events("workers_stopped"), "it has left properly, and not been ended by the backstop"
    assert not nodes.events("drain_overran")


def test_a_store_that_does_not_answer_does_not_make_the_agent_overstay(nodes: Cluster, tmp_path: Path) -> None:
    first, second = two_that_train(nodes, tmp_path, ",lease_ttl=600,timeout=600", grace_s=8)
    os.kill(first.process.pid, signal.SIGSTOP)  # its agent hosts the store; its worker trains on
    try:
        second.signal(signal.SIGTERM)
        assert second.wait() == TERMINATED
        nodes.wait_event("workers_yielded", step=int((tmp_path / "saved").read_text()))
        assert not nodes.events("drain_cut_short"), "ranks agree on a step boundary without the store"
    finally:
        os.kill(first.process.pid, signal.SIGCONT)


def test_nodes_that_are_all_told_to_leave_save_once_and_form_no_round_for_nothing(
    nodes: Cluster, tmp_path: Path
) -> None:
    first, second = two_that_train(nodes, tmp_path, ",drain_settle=600")
    second.signal(signal.SIGTERM)
    nodes.wait_event("node_left")
    assert second.wait() == TERMINATED
    first.signal(signal.SIGTERM)
    assert first.wait() == TERMINATED
    assert len(nodes.events("round_formed")) == 1
    done = steps_of(tmp_path)
    assert done == list(range(1, len(done) + 1))
    assert int((tmp_path / "saved").read_text()) == done[-1], "the job can be resumed where it stopped"


def drain(nodes: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ("drain", *arguments, "--rdzv-endpoint", nodes.endpoint, "--rdzv-id", "test")
    return template().run("elastic-moe", *command, folder=nodes.folder)


def test_nodes_leave_on_command_one_and_then_all(nodes: Cluster, tmp_path: Path) -> None:
    first, second = two_that_train(nodes, tmp_path)
    unknown = drain(nodes, "third")
    assert unknown.returncode == 2
    assert re.fullmatch(r"elastic-moe: error: node 'third': not in this job; there are .*\n", unknown.stderr)
    one = drain(nodes, "second")
    assert one.returncode == 0, one.stderr
    assert re.search(r" second-\w+: left\n", one.stdout)
    assert second.wait() == DRAINED
    nodes.wait_event("round_formed", generation=2, world_size=1)
    so_far = len(steps_of(tmp_path))
    until(
        "the first one trains on: before that there is no boundary to stop at", lambda: len(steps_of(tmp_path)) > so_far
    )
    rest = drain(nodes, "--all")
    assert rest.returncode == 0, rest.stderr
    assert first.wait() == DRAINED
    assert [(e["source"], e["detail"].split(" by ")[0]) for e in nodes.events("drain_started")] == [
        ("command", "elastic-moe drain")
    ] * 2
    assert not nodes.events("drain_cut_short")
    done = steps_of(tmp_path)
    assert done == list(range(1, len(done) + 1)), "no step lost, none done twice"
    assert int((tmp_path / "saved").read_text()) == done[-1]


def test_a_node_that_waits_for_a_round_leaves_on_a_notice(nodes: Cluster, tmp_path: Path) -> None:
    notice = tmp_path / "notice"
    options = ("--preemption-notice", f"file:{notice}", "--cold-workers")
    node = nodes.start("only", *options, STUBBORN, str(tmp_path), nnodes="2:2")
    nodes.wait_event("node_joined")
    (tmp_path / "written").write_text("20")
    (tmp_path / "written").rename(notice)
    assert node.wait() == DRAINED, node.output
    (started,) = nodes.events("drain_started")
    assert (started["source"], started["detail"], started["seconds"]) == ("notice", f"the file {notice}", 20)


SLOW_SMI = """#!/bin/sh
case "$*" in
  *index*) echo "0, 4";;
  *) touch "{folder}/asked"; while [ ! -e "{folder}/go" ]; do sleep 0.02; done;;
esac
"""


def test_a_signal_between_two_rounds_is_followed_before_the_next(nodes: Cluster, tmp_path: Path) -> None:
    """While an agent waits for device memory it has no workers that it could ask to stop."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SLOW_SMI.format(folder=tmp_path))
    tool.chmod(0o755)
    nodes.environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0"}
    node = nodes.start("only", "--cold-workers", STUBBORN, str(tmp_path), nnodes="1:1")
    started = nodes.wait_event("workers_started")
    try:
        os.kill(started["pids"][0], signal.SIGKILL)
        until("the agent waits for device memory", (tmp_path / "asked").exists)
        node.process.send_signal(signal.SIGTERM)
    finally:
        (tmp_path / "go").touch()
    assert node.wait() == TERMINATED, node.output
    assert len(nodes.events("workers_started")) == 1
    assert len(nodes.events("drain_started")) == 1
