"""The agent with real processes: what happens to a job when its nodes and workers come and go."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.cluster import Cluster, alive, read_lines, until

SCRIPTS = Path(__file__).parent / "scripts"
NAMES = ("cooperative.py", "stock.py", "fails.py", "stubborn.py")
COOPERATIVE, STOCK, FAILS, STUBBORN = (str(SCRIPTS / name) for name in NAMES)

BOTH = "last_call=60"  # the first round waits for max nodes: it is the test's first round that has both

pytestmark = pytest.mark.slow


def steps_of(folder: Path, **fields: int) -> list[int]:
    """The steps done, in the order they were done, of one generation or world size."""
    done = read_lines(folder / "steps.jsonl")
    return [s["step"] for s in done if all(s[k] == v for k, v in fields.items())]


def test_a_killed_node_is_replaced_and_taken_in_without_losing_a_step(nodes: Cluster, tmp_path: Path) -> None:
    work = (COOPERATIVE, str(tmp_path))
    conf = "join_cooldown=1,last_call=60"
    first = nodes.start("first", *work, conf=conf)
    nodes.wait_event("node_joined")
    second = nodes.start("second", *work, conf=conf)
    until("ten steps on two nodes", lambda: steps_of(tmp_path, generation=1)[10:])
    second.kill()
    until("steps on one node", lambda: steps_of(tmp_path, generation=2))
    again = nodes.start("second", *work, conf=conf)
    until("steps with the node back", lambda: steps_of(tmp_path, generation=3))
    (tmp_path / "finish").touch()
    assert first.wait() == 0, first.output
    assert again.wait() == 0, again.output

    alone, back = steps_of(tmp_path, generation=2), steps_of(tmp_path, generation=3)
    assert alone[0] % 10 == 1, "resumes behind the last saved step"
    assert back[0] == alone[-1] + 1, "a node that joins costs no step"
    assert [(r["generation"], r["world_size"]) for r in nodes.events("round_formed")] == [(1, 2), (2, 1), (3, 2)]
    assert nodes.events("node_lost"), "the loss is told"


def test_a_torch_that_is_built_for_an_accelerator_needs_none(nodes: Cluster, tmp_path: Path) -> None:
    script = str(SCRIPTS / "accelerator_absent.py")
    node = nodes.start("only", script, str(tmp_path / "checkpoints"), nnodes="1:1", nproc=2)
    assert node.wait() == 0, node.output
    assert "rank 0: step 3" in node.output
    assert "rank 1: step 3" in node.output


@pytest.mark.parametrize("start", [(), ("--cold-workers",)], ids=["warm", "cold"])
def test_workers_die_with_their_agent(nodes: Cluster, tmp_path: Path, start: tuple[str, ...]) -> None:
    node = nodes.start("only", *start, STOCK, str(tmp_path), nnodes="1:1", nproc=2)
    until("both workers", lambda: len(read_lines(tmp_path / "started.jsonl")) == 2)
    started = {s["pid"] for s in read_lines(tmp_path / "started.jsonl")}
    processes = node.tree()
    assert started <= {p.pid for p in processes}
    node.kill_agent()
    until("nothing of the node left", lambda: not any(alive(p) for p in processes))


def test_a_stock_script_goes_on_after_a_lost_node_with_its_rank(nodes: Cluster, tmp_path: Path) -> None:
    first = nodes.start("first", STOCK, str(tmp_path), nproc=2, conf=BOTH)
    nodes.wait_event("node_joined")
    second = nodes.start("second", STOCK, str(tmp_path), nproc=1, conf=BOTH)
    started = tmp_path / "started.jsonl"
    until("three workers of different nodes", lambda: len(read_lines(started)) == 3)
    assert sorted((s["RANK"], s["LOCAL_RANK"], s["LOCAL_WORLD_SIZE"]) for s in read_lines(started)) == [
        (0, 0, 2),
        (1, 1, 2),
        (2, 0, 1),
    ]
    second.kill()
    until("two workers again", lambda: len(read_lines(started)) == 5)
    again = read_lines(started)[3:]
    assert sorted((s["RANK"], s["WORLD_SIZE"], s["TORCHELASTIC_RESTART_COUNT"]) for s in again) == [
        (0, 2, 1),
        (1, 2, 1),
    ]
    (tmp_path / "finish").touch()
    assert first.wait() == 0


def test_a_failed_worker_restarts_all_within_the_budget(nodes: Cluster, tmp_path: Path) -> None:
    node = nodes.start("only", "--max-restarts", "1", STOCK, str(tmp_path), nnodes="1:1", nproc=2)
    started = tmp_path / "started.jsonl"
    for generation in (1, 2):
        until("both workers", lambda g=generation: len(read_lines(started)) == 2 * g)
        next(w for w in node.tree() if w.pid == read_lines(started)[-1]["pid"]).kill()
        nodes.wait_event("worker_failed", generation=generation, exit_code=-signal.SIGKILL)
    assert node.wait() == 1
    (finished,) = nodes.events("finished")
    assert finished["outcome"].startswith("failed: worker of rank")
    assert "1 of 1" in finished["outcome"]


def test_a_program_that_refuses_its_arguments_is_not_restarted(nodes: Cluster) -> None:
    node = nodes.start("only", "--max-restarts", "5", FAILS, "2", nnodes="1:1")
    assert node.wait() == 2
    assert len(nodes.events("round_formed")) == 1
    assert "cannot work like this" in node.output


def test_a_node_that_drains_stops_at_a_step_boundary_and_the_others_go_on(nodes: Cluster, tmp_path: Path) -> None:
    work = (COOPERATIVE, str(tmp_path))
    first = nodes.start("first", *work, conf=BOTH)
    nodes.wait_event("node_joined")
    second = nodes.start("second", *work, conf=BOTH)
    until("five steps on two nodes", lambda: steps_of(tmp_path, world_size=2)[5:])
    second.signal(signal.SIGTERM)
    assert second.wait() == 128 + signal.SIGTERM, second.output
    until("steps on one node", lambda: steps_of(tmp_path, world_size=1))
    (tmp_path / "finish").touch()
    assert first.wait() == 0, first.output
    done = steps_of(tmp_path)
    assert done == list(range(1, len(done) + 1)), "no step lost, none done twice"
    assert not nodes.events("node_lost")


def test_a_node_beyond_max_waits_as_a_spare_and_fills_in(nodes: Cluster, tmp_path: Path) -> None:
    work = (COOPERATIVE, str(tmp_path))
    first = nodes.start("first", *work, nnodes="1:1")
    until("steps", lambda: steps_of(tmp_path, generation=1))
    spare = nodes.start("spare", *work, nnodes="1:1")
    until("the spare has joined", lambda: len(nodes.events("node_joined")) == 2)
    first.signal(signal.SIGTERM)
    until("steps on the spare", lambda: steps_of(tmp_path, generation=2))
    assert first.process.poll() is None, "it hosts the store that the other one uses"
    (tmp_path / "finish").touch()
    assert spare.wait() == 0, spare.output
    assert first.wait() == 128 + signal.SIGTERM
    done = steps_of(tmp_path)
    assert done == list(range(1, len(done) + 1)), "no step lost, none done twice"


def test_a_node_that_is_cut_off_while_it_stops_its_workers_kills_them(nodes: Cluster, tmp_path: Path) -> None:
    """Others may start in their place when its lease ends, whatever grace they were given before."""
    work = ("--shutdown-timeout", "600", STUBBORN, str(tmp_path))
    conf = "last_call=60,stop_timeout=600"
    host = nodes.start("host", *work, conf=f"{conf},is_host=true")
    nodes.wait_event("node_joined")
    second = nodes.start("second", *work, nproc=2, conf=f"{conf},is_host=false,connect_timeout=60,lease_ttl=5")
    until("three workers", lambda: len(read_lines(tmp_path / "started.jsonl")) == 3)
    pids = {s["pid"] for s in read_lines(tmp_path / "started.jsonl")}
    fails, stubborn = [p for p in second.tree() if p.pid in pids]
    fails.kill()
    nodes.wait_event("worker_failed")
    assert alive(stubborn)
    host.signal(signal.SIGSTOP)
    try:
        until("it is killed", lambda: not alive(stubborn))
    finally:
        host.signal(signal.SIGCONT)
