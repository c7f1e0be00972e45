"""`elastic-moe status`: what it says of a job in each state, and of a real one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.cli.status import as_json, as_lines, follow
from launcher.coordination.roster import run_prefix
from launcher.kv.memory import MemoryKV
from launcher.reports.goodput import account
from launcher.reports.snapshot import Snapshot, snapshot
from launcher.rounds.membership import View
from launcher.rounds.mesh import MeshPlan
from launcher.rounds.records import Node, Participant, Round, Status
from tests.cluster import Cluster, cluster, until

SCRIPT = str(Path(__file__).parents[1] / "launcher" / "scripts" / "cooperative.py")
ROUND = Round(
    generation=3,
    lineage="x",
    participants=(Participant("b-2", 2), Participant("a-1", 1)),
    mesh=MeshPlan(1, 3, 1, 0, 1, 1),
    spares=("c-3",),
    reason="node d-4 lost: its lease ended",
    restarts=1,
)


def node(name: str, seniority: int, **fields: Any) -> Node:
    given = {"slots": 2, "generation": 3, "status": Status.RUNNING, **fields}
    return Node(name, f"host-{name}", "10.0.0.1", 1, seniority=seniority, **given)


NODES = (
    node("c-3", 9, status=Status.READY, generation=0),
    node("a-1", 5, slots=1),
    node("b-2", 7, draining=True, reason="drains on SIGTERM"),
)


def state_of(current: Round | None, *nodes: Node) -> Snapshot:
    return snapshot("job", View(nodes, current, 0, 0, 0, "", leader="a-1"))


@pytest.mark.parametrize(
    ("current", "nodes", "state"),
    [
        (None, (), "unknown: no node and no round"),
        (None, NODES, "waiting for the first round"),
        (ROUND, NODES, "running"),
        (ROUND, (node("a-1", 5, generation=2, status=Status.READY), NODES[2]), "starting"),
        (ROUND, NODES[:2], "forming a round: node b-2 lost"),
        (ROUND, (), "no live node"),
        (dataclasses.replace(ROUND, stop="join: c-3"), NODES, "stopping at a step boundary: join: c-3"),
        (dataclasses.replace(ROUND, outcome="succeeded"), (), "succeeded"),
    ],
)
def test_the_state_in_a_few_words(current: Round | None, nodes: tuple[Node, ...], state: str) -> None:
    assert state_of(current, *nodes).state == state


def test_the_table() -> None:
    assert as_lines(state_of(ROUND, *NODES)) == [
        "job job: running",
        "generation 3: 3 ranks on 2 nodes, mesh replicate 1 x shard 3 x expert 1",
        "  formed because: node d-4 lost: its lease ended; restarts used: 1",
        "  spares: c-3",
        "NODE  HOST      ADDRESS   SLOTS  STATUS             GENERATION  RANKS  REASON",
        "a-1   host-a-1  10.0.0.1  1      running            3           2",
        "b-2   host-b-2  10.0.0.1  2      running, draining  3           0-1    drains on SIGTERM",
        "c-3   host-c-3  10.0.0.1  2      ready              -           -",
    ]
    assert "  no longer there: b-2" in as_lines(state_of(ROUND, NODES[1]))


def test_as_json() -> None:
    told = json.loads(json.dumps(as_json(state_of(ROUND, *NODES))))
    assert (told["leader"], told["round"]["world_size"], told["round"]["mesh"]["shard"]) == ("a-1", 3, 3)
    assert [(n["node_id"], n["ranks"], n["draining"]) for n in told["nodes"]] == [
        ("a-1", [2], False),
        ("b-2", [0, 1], True),
        ("c-3", [], False),
    ]
    assert as_json(state_of(None))["round"] is None


def test_changes_are_followed_and_other_jobs_left_out() -> None:
    kv = MemoryKV()
    kv.put(run_prefix("other") + "nodes/z-9", NODES[0].to_json())
    states = follow(kv, "job")
    assert next(states)[0].state == "unknown: no node and no round"
    for member in NODES:
        kv.put(f"{run_prefix('job')}nodes/{member.node_id}", member.to_json())
    assert next(states)[0].state == "waiting for the first round"
    kv.put(run_prefix("job") + "job/round", ROUND.to_json())
    while (found := next(states)[0]).round is None:
        pass
    assert (found.state, len(found.seats)) == ("running", 3)
    states.close()
    kv.close()


def ask(endpoint: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elastic_moe", "status", "--rdzv-endpoint", endpoint, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_a_real_job_from_its_start_to_its_end(tmp_path: Path) -> None:
    with cluster(tmp_path / "nodes") as nodes:
        first = nodes.start("first", SCRIPT, str(tmp_path), nnodes="1:1")
        nodes.wait_event("workers_started")
        watcher = watching(nodes)
        try:
            spare = nodes.start("second", SCRIPT, str(tmp_path), nnodes="1:1")
            told = until("the spare is seen", lambda: seen(nodes.endpoint, num_nodes=2))
            assert told["state"] == "running"
            assert [(n["node_id"].rpartition("-")[0], n["ranks"], n["leads"]) for n in told["nodes"]] == [
                ("first", [0], True),
                ("second", [], False),
            ]
            unknown = ask(nodes.endpoint, "--rdzv-id", "another")
            assert (unknown.returncode, unknown.stderr) == (1, "")
            (tmp_path / "finish").touch()
            output, errors = watcher.communicate(timeout=60)
            assert (watcher.returncode, errors) == (0, "")
        finally:
            watcher.kill()
            watcher.wait(10)
        assert (first.wait(), spare.wait()) == (0, 0)
    states = [json.loads(line)["state"] for line in output.splitlines()]
    assert "running" in states
    assert states[-1] == "succeeded"
    assert ask(nodes.endpoint).returncode == 2, "nobody answers any more"
    result = account(nodes.events())
    assert (result.outcome, result.interruptions) == ("succeeded", ())
    assert sum(result.seconds.values()) == pytest.approx(result.wall_s)


def watching(nodes: Cluster) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "elastic_moe", "status", "--watch", "--json"]
    options = ["--rdzv-endpoint", nodes.endpoint, "--rdzv-id", "test"]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def seen(endpoint: str, num_nodes: int) -> dict[str, Any] | None:
    told: dict[str, Any] = json.loads(ask(endpoint, "--rdzv-id", "test", "--json").stdout)
    return told if len(told["nodes"]) == num_nodes else None
