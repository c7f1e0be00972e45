"""Real workers that hang: their stacks are on disk before they are killed, and the job goes on."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.cluster import Cluster

HANGS = str(Path(__file__).parent / "scripts" / "hangs.py")
LIMIT = ("--hang-timeout", "3", "--max-restarts", "1")

pytestmark = pytest.mark.slow


def stacks(nodes: Cluster, rank: int) -> str:
    path = nodes.folder / "stacks" / "generation-1" / f"rank-{rank}.txt"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return path.read_text()


@pytest.mark.parametrize(
    ("how", "options"),
    [("stop", LIMIT), ("silent", ("--silence-timeout", "10", "--tee", "3", "--max-restarts", "1", "--cold-workers"))],
)
def test_a_hung_worker_is_found_told_and_restarted(
    nodes: Cluster, tmp_path: Path, how: str, options: tuple[str, ...]
) -> None:
    node = nodes.start("only", *options, HANGS, str(tmp_path), how, nnodes="1:1", nproc=2)
    assert node.wait() == 0, node.output
    (hang,) = nodes.events("hang_detected")
    assert (hang["kind"], hang["step"]) == (("silence", -1) if how == "silent" else ("step", 5))
    assert hang["suspects"] == [1], hang
    assert "in gets_stuck" in stacks(nodes, 1)
    assert "all_reduce" in stacks(nodes, 0)
    assert "worker of rank 1 hung: no " in (why := nodes.events("round_formed")[1]["reason"])
    assert ("rank 1 is stopped" if how == "stop" else "rank 1 is behind") in why
    assert (tmp_path / "done-0").exists() and (tmp_path / "done-1").exists()


def test_all_nodes_write_stacks_before_they_kill(nodes: Cluster, tmp_path: Path) -> None:
    work = (*LIMIT, HANGS, str(tmp_path), "spin")
    first = nodes.start("first", *work, conf="last_call=60")
    nodes.wait_event("node_joined")
    second = nodes.start("second", *work, conf="last_call=60")
    for node in (first, second):
        assert node.wait() == 0, node.output
    assert {rank for dumped in nodes.events("stacks_dumped") for rank in dumped["ranks"]} == {0, 1}
    assert "gets_stuck" in stacks(nodes, 1)
    assert "all_reduce" in stacks(nodes, 0)
    assert nodes.events("round_formed")[1]["reason"].startswith("worker of rank 1 hung"), "the victim comes after"
    for dumped in nodes.events("stacks_dumped"):
        (stopped,) = nodes.events("workers_stopped", node=dumped["node"], generation=1)
        assert dumped["ts"] <= stopped["ts"]
