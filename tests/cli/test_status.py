"""`elastic-moe status`: what it says of a job in each state, and of a real one."""

from __future__ import annotations

import dataclasses
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.cli import status
from elastic_moe.cli.status import as_json, as_lines
from elastic_moe.errors import UserError
from launcher import job_client
from launcher.coordination.vitals_publisher import interval_s, vitals_prefix
from launcher.errors import KVUnavailable
from launcher.job_client import JobClient
from launcher.kv import Prefixed, Snapshot
from launcher.kv.memory import MemoryKV
from launcher.node.board import run_prefix
from launcher.reports.goodput import account
from launcher.reports.job_status import JobStatus, job_status
from launcher.rounds.membership import View
from launcher.rounds.mesh import MeshPlan
from launcher.rounds.records import FailedWorker, Failure, Node, Participant, Round, Status, Verdict
from launcher.rounds.vitals import Vitals
from tests.cluster import Cluster, cluster, read_lines, until
from tests.template import template

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


def state_of(current: Round | None, *nodes: Node, vitals: dict[str, Vitals] | None = None) -> JobStatus:
    return job_status("job", View(nodes, current, 0, 0, 0, "", leader="a-1"), vitals)


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


NOW_TS = 1_800_000_000.0
VITALS = {
    "a-1": Vitals(3, 118, NOW_TS - 90, NOW_TS - 4000, "worker of rank 2 hung", 100, NOW_TS - 40),
    "b-2": Vitals(3, 120, NOW_TS - 2, checkpoint_step=80, checkpoint_ts=NOW_TS - 300),
    "gone": Vitals(2, 130, NOW_TS - 9999),
}


def failed(ts: float, code: int = -9, node_id: str = "b-2") -> FailedWorker:
    return FailedWorker(node_id, f"host-{node_id}", Failure(1, code, "", ts, step=117))


def at(ts: float) -> str:
    return datetime.datetime.fromtimestamp(ts).astimezone().isoformat(timespec="seconds")


def test_the_table() -> None:
    assert as_lines(state_of(ROUND, *NODES), NOW_TS) == [
        f"job job: running, at {at(NOW_TS)}",
        "generation 3: 3 ranks on 2 nodes, mesh replicate 1 x shard 3 x expert 1",
        "  formed because: node d-4 lost: its lease ended; restarts used: 1",
        "  spares: c-3",
        "NODE  HOST      ADDRESS   SLOTS  STATUS             GENERATION  RANKS  STEP  HEARTBEAT  REASON",
        "a-1   host-a-1  10.0.0.1  1      running            3           2      -     -",
        "b-2   host-b-2  10.0.0.1  2      running, draining  3           0-1    -     -          drains on SIGTERM",
        "c-3   host-c-3  10.0.0.1  2      ready              -           -      -     -",
    ]
    assert "  no longer there: b-2" in as_lines(state_of(ROUND, NODES[1]), NOW_TS)


def test_the_table_with_what_nodes_tell() -> None:
    current = dataclasses.replace(ROUND, formed_ts=NOW_TS - 7300, causes=(failed(NOW_TS - 7400),))
    assert as_lines(state_of(current, *NODES, vitals=VITALS), NOW_TS) == [
        f"job job: running, at {at(NOW_TS)}",
        "generation 3: 3 ranks on 2 nodes, mesh replicate 1 x shard 3 x expert 1",
        "  formed 2 h ago because: node d-4 lost: its lease ended; restarts used: 1",
        "  spares: c-3",
        "  step 120; last heartbeat 90 s ago; last checkpoint of step 100, 40 s ago",
        "  last failure 67 min ago: worker of rank 2 hung",
        "NODE  HOST      ADDRESS   SLOTS  STATUS             GENERATION  RANKS  STEP  HEARTBEAT  REASON",
        "a-1   host-a-1  10.0.0.1  1      running            3           2      118   90 s ago",
        "b-2   host-b-2  10.0.0.1  2      running, draining  3           0-1    120   2 s ago    drains on SIGTERM",
        "c-3   host-c-3  10.0.0.1  2      ready              -           -      -     -",
    ]


@pytest.mark.parametrize(
    ("ago_s", "text"),
    [(-5.0, "0 s"), (0.4, "0 s"), (119.0, "119 s"), (120.0, "2 min"), (7200.0, "2 h"), (172800.0, "2 d")],
)
def test_ages(ago_s: float, text: str) -> None:
    current = dataclasses.replace(ROUND, formed_ts=NOW_TS - ago_s)
    assert f"  formed {text} ago because: " in "\n".join(as_lines(state_of(current, *NODES), NOW_TS))


@pytest.mark.parametrize(
    ("vitals", "causes", "of_a_node", "text"),
    [
        ({}, (failed(NOW_TS - 60),), None, "60 s ago: worker of rank 1 was killed by SIGKILL (on b-2)"),
        (
            {},
            (failed(NOW_TS - 60, 1),),
            failed(NOW_TS - 5, 3).failure,
            "5 s ago: worker of rank 1 failed with exit code 3",
        ),
        (VITALS, (failed(NOW_TS - 9000),), None, "67 min ago: worker of rank 2 hung"),
        ({}, (), None, ""),
    ],
)
def test_the_last_failure_is_the_latest_that_anybody_knows(
    vitals: dict[str, Vitals], causes: tuple[FailedWorker, ...], of_a_node: Failure | None, text: str
) -> None:
    nodes = (node("a-1", 5, failure=of_a_node), NODES[2])
    lines = as_lines(state_of(dataclasses.replace(ROUND, causes=causes), *nodes, vitals=vitals), NOW_TS)
    (told,) = [line for line in lines if "last failure" in line] or [""]
    assert told.removeprefix("  last failure ").startswith(text)
    assert bool(told) == bool(text)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b'{"step": "9"}', b'{"beat_ts": NaN}', b'{"step": true}', b'{"failure": 3}', b"\xff"]
)
def test_what_is_no_word_of_a_node_is_left_out(data: bytes) -> None:
    kv = MemoryKV()
    kv.put(f"{vitals_prefix('job')}a-1", data)
    kv.put(f"{run_prefix('job')}nodes/a-1", NODES[1].to_json())
    states = JobClient(kv, "job").follow()
    found, _ = next(states)
    assert [(node.node_id, node.step) for node in found.nodes] == [("a-1", -1)]
    states.close()  # type: ignore[attr-defined]
    kv.close()


def test_a_word_of_a_later_version_is_read() -> None:
    assert Vitals.from_json(Vitals(step=3).to_json()[:-1] + b',"more":1}') == Vitals(step=3)


@pytest.mark.parametrize(("num_nodes", "seconds"), [(1, 5.0), (50, 5.0), (1000, 100.0)])
def test_nodes_tell_at_a_bounded_rate(num_nodes: int, seconds: float) -> None:
    assert interval_s(num_nodes) == seconds
    assert num_nodes / interval_s(num_nodes) <= 10.0


def test_as_json() -> None:
    current = dataclasses.replace(ROUND, formed_ts=NOW_TS - 10, causes=(failed(NOW_TS - 20),))
    told = json.loads(json.dumps(as_json(state_of(current, *NODES, vitals=VITALS), NOW_TS)))
    assert (told["ts"], told["step"], told["heartbeat_ts"]) == (NOW_TS, 120, NOW_TS - 90)
    assert told["failure"] == {"ts": NOW_TS - 20, "message": "worker of rank 1 was killed by SIGKILL (on b-2)"}
    assert told["checkpoint"] == {"ts": NOW_TS - 40, "step": 100}
    assert told["round"]["formed_ts"] == NOW_TS - 10
    assert [(n["step"], n["heartbeat_ts"]) for n in told["nodes"]] == [
        (118, NOW_TS - 90),
        (120, NOW_TS - 2),
        (-1, None),
    ]
    told = json.loads(json.dumps(as_json(state_of(ROUND, *NODES), NOW_TS)))
    assert (told["step"], told["heartbeat_ts"], told["failure"], told["checkpoint"]) == (-1, None, None, None)
    assert (told["leader"], told["round"]["world_size"], told["round"]["mesh"]["shard"]) == ("a-1", 3, 3)
    assert [(n["node_id"], n["ranks"], n["draining"]) for n in told["nodes"]] == [
        ("a-1", [2], False),
        ("b-2", [0, 1], True),
        ("c-3", [], False),
    ]
    assert as_json(state_of(None), NOW_TS)["round"] is None


class Clock:
    """Time that passes as states are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
        self._now_s, self._step_s = 0.0, step_s
        monkeypatch.setattr("elastic_moe.cli.status.time.monotonic", self.monotonic)

    def monotonic(self) -> float:
        self._now_s += self._step_s
        return self._now_s


OVER = {
    "succeeded": (Verdict.SUCCEEDED, 0),
    "failed: worker of rank 1 failed with exit code 1": (Verdict.FAILS_AGAIN, 70),
    "failed: too few nodes": (Verdict.NO_QUORUM, 75),
}


@pytest.mark.parametrize("outcome", OVER)
def test_a_watch_ends_as_the_job_does(outcome: str) -> None:
    verdict, exit_code = OVER[outcome]
    ended = state_of(dataclasses.replace(ROUND, outcome=outcome, verdict=verdict))
    shown: list[str] = []
    show = lambda found, trouble: shown.append(found.state)  # noqa: E731
    running = state_of(ROUND, *NODES)
    assert status._watch(iter([(running, ""), (running, "away"), (ended, "")]), show) == exit_code
    assert shown == ["running", "running", outcome]
    assert status._watch(iter([(ended, "")]), show) == exit_code


def test_a_watch_of_a_job_that_nobody_is_left_of_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Clock(monkeypatch, step_s=25.0)
    left, running = state_of(ROUND), state_of(ROUND, *NODES)
    states = iter([(left, ""), (left, ""), (running, ""), *[(left, "")] * 10])
    assert status._watch(states, lambda found, trouble: None) == 1
    assert list(states)
    assert capsys.readouterr().err == "no node of the job has been there for 60 s\n"


def test_a_watch_outlives_a_store_that_is_away_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, step_s=50.0)
    running = state_of(ROUND, *NODES)
    states = iter([(running, "away"), (running, "away"), (running, ""), *[(running, "away")] * 10])
    with pytest.raises(UserError, match=r"has not answered for 120 s.*away"):
        status._watch(states, lambda found, trouble: None)
    assert list(states)


def test_steps_and_ages_are_no_changes() -> None:
    changes = status._Changes()
    before = state_of(ROUND, *NODES, vitals=VITALS)
    assert changes.has(before, "")
    later = {name: dataclasses.replace(one, step=one.step + 9, beat_ts=one.beat_ts + 9) for name, one in VITALS.items()}
    assert not changes.has(state_of(ROUND, *NODES, vitals=later), "")
    assert changes.has(before, "away")
    assert changes.has(before, "")
    saved = {**VITALS, "a-1": dataclasses.replace(VITALS["a-1"], checkpoint_step=120, checkpoint_ts=NOW_TS)}
    assert changes.has(state_of(ROUND, *NODES, vitals=saved), "")


def test_changes_are_followed_and_other_jobs_left_out() -> None:
    kv = MemoryKV()
    kv.put(run_prefix("other") + "nodes/z-9", NODES[0].to_json())
    states = JobClient(kv, "job").follow()
    assert next(states)[0].state == "unknown: no node and no round"
    for member in NODES:
        kv.put(f"{run_prefix('job')}nodes/{member.node_id}", member.to_json())
    while (found := next(states)[0]).round is None and len(found.nodes) < len(NODES):
        pass
    assert found.state == "waiting for the first round"
    kv.put(run_prefix("job") + "job/round", ROUND.to_json())
    kv.put(f"{vitals_prefix('job')}a-1", Vitals(step=7).to_json())
    while (found := next(states)[0]).round is None:
        pass
    assert (found.state, len(found.nodes)) == ("running", 3)
    states.close()  # type: ignore[attr-defined]
    kv.close()


class Failing(Prefixed):
    """A store that does not answer while it is `away`."""

    away = False

    def list(self, prefix: str) -> Snapshot:
        if self.away:
            raise KVUnavailable("away")
        return super().list(prefix)


def test_a_store_that_is_away_is_waited_for_unless_it_never_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_client, "_WAIT_S", 0.01)
    monkeypatch.setattr(job_client, "_VITALS_S", 0.0)
    memory = MemoryKV()
    kv = Failing(memory, "")
    kv.away = True
    with pytest.raises(KVUnavailable):
        next(JobClient(kv, "job").follow())
    kv.away = False
    states = JobClient(kv, "job").follow()
    next(states)
    kv.away = True
    kv.put(f"{run_prefix('job')}nodes/a-1", NODES[1].to_json())
    found, trouble = next(states)
    assert (found.nodes, trouble) == ((), "away")
    kv.away = False
    found, trouble = next(states)
    assert ([node.node_id for node in found.nodes], trouble) == (["a-1"], ""), "what came meanwhile is not lost"
    states.close()  # type: ignore[attr-defined]
    memory.close()


def ask(nodes: Cluster, *options: str) -> subprocess.CompletedProcess[str]:
    command = ("status", "--rdzv-endpoint", nodes.endpoint, *options)
    return template().run("elastic-moe", *command, folder=nodes.folder, timeout_s=60)


@pytest.mark.slow
def test_a_real_job_from_its_start_to_its_end(tmp_path: Path) -> None:
    with cluster(tmp_path / "nodes") as nodes:
        first = nodes.start("first", SCRIPT, str(tmp_path), nnodes="1:1")
        nodes.wait_event("workers_started")
        watcher = watching(nodes)
        try:
            spare = nodes.start("second", SCRIPT, str(tmp_path), nnodes="1:1")
            told = until("the spare is seen", lambda: seen(nodes, num_nodes=2))
            assert told["state"] == "running"
            told = until("the workers' steps are told", lambda: telling(nodes))
            ages_s = [told["ts"] - ts for ts in (told["heartbeat_ts"], told["round"]["formed_ts"])]
            assert told["step"] >= 0 and all(-1.0 < age_s < 60.0 for age_s in ages_s), told
            assert [(n["node_id"].rpartition("-")[0], n["ranks"], n["leads"]) for n in told["nodes"]] == [
                ("first", [0], True),
                ("second", [], False),
            ]
            unknown = ask(nodes, "--rdzv-id", "another")
            assert (unknown.returncode, unknown.stderr) == (1, "")
            until("the job is watched", lambda: read_lines(nodes.folder / "watched"))
            (tmp_path / "finish").touch()
            assert (watcher.wait(60), (nodes.folder / "watched.err").read_text()) == (0, "")
        finally:
            watcher.kill()
            watcher.wait(60)
        assert (first.wait(), spare.wait()) == (0, 0)
    states = [line["state"] for line in read_lines(nodes.folder / "watched")]
    assert "running" in states
    assert states[-1] == "succeeded"
    gone = ask(nodes, "--rdzv-conf", "connect_timeout=0.2")
    assert gone.returncode == 2, "nobody answers any more"
    result = account(nodes.events())
    assert (result.outcome, result.interruptions) == ("succeeded", ())
    assert sum(result.seconds.values()) == pytest.approx(result.wall_s)


def watching(nodes: Cluster) -> subprocess.Popen[bytes]:
    """What it says is in the files `watched` and `watched.err`."""
    command = [sys.executable, "-m", "elastic_moe", "status", "--watch", "--json"]
    options = ["--rdzv-endpoint", nodes.endpoint, "--rdzv-id", "test"]
    with (nodes.folder / "watched").open("w") as out, (nodes.folder / "watched.err").open("w") as err:
        return subprocess.Popen([*command, *options], stdout=out, stderr=err)


def telling(nodes: Cluster) -> dict[str, Any] | None:
    told = seen(nodes, num_nodes=2)
    return told if told and told["step"] >= 0 else None


def seen(nodes: Cluster, num_nodes: int) -> dict[str, Any] | None:
    asked = ask(nodes, "--rdzv-id", "test", "--json")
    assert asked.returncode == 0, asked.stderr
    told: dict[str, Any] = json.loads(asked.stdout)
    return told if len(told["nodes"]) == num_nodes else None
