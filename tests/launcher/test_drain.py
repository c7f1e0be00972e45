"""Nodes that are told to leave, with real processes: within the grace, whatever the workers and the store do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster import Cluster, Node, alive, cluster, read_lines, until

SCRIPTS = Path(__file__).parent / "scripts"
COOPERATIVE, STUBBORN = str(SCRIPTS / "cooperative.py"), str(SCRIPTS / "stubborn.py")
TERMINATED = 128 + signal.SIGTERM

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path / "nodes") as made:
        yield made


def steps_of(folder: Path) -> list[int]:
    return [s["step"] for s in read_lines(folder / "steps.jsonl")]


def two_that_train(nodes: Cluster, folder: Path, conf: str = "") -> tuple[Node, Node]:
    work = ("--drain-grace", "5", COOPERATIVE, str(folder))
    first = nodes.start("first", *work, conf=f"last_call=60,is_host=true{conf}")
    second = nodes.start("second", *work, conf=f"last_call=60,is_host=false,connect_timeout=60{conf}")
    until("steps", lambda: steps_of(folder)[3:])
    return first, second


def test_a_worker_that_ignores_sigterm_does_not_make_the_agent_overstay(nodes: Cluster, tmp_path: Path) -> None:
    """Every other limit is far above the time that this test waits."""
    options = ("--shutdown-timeout", "600", "--drain-grace", "3", STUBBORN, str(tmp_path))
    node = nodes.start("only", *options, nnodes="1:1", conf="yield_timeout=600")
    until("a worker", lambda: read_lines(tmp_path / "started.jsonl"))
    worker = psutil.Process(read_lines(tmp_path / "started.jsonl")[0]["pid"])
    node.signal(signal.SIGTERM)
    assert node.wait() == TERMINATED
    assert not alive(worker)
    (started,) = nodes.events("drain_started")
    assert (started["source"], started["detail"], started["seconds"]) == ("signal", "SIGTERM", 3)
    (cut,) = nodes.events("drain_cut_short")
    assert cut["step"] == 3
    assert "no step boundary" in cut["reason"]
    assert nodes.events("workers_stopped"), "it has left properly, and not been ended by the backstop"
    assert not nodes.events("drain_overran")


def test_a_store_that_does_not_answer_does_not_make_the_agent_overstay(nodes: Cluster, tmp_path: Path) -> None:
    first, second = two_that_train(nodes, tmp_path, ",lease_ttl=600,timeout=600")
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
