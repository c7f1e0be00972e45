"""Jobs that fail, with real processes: what is tried again, what every node says in the end, where logs go."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests import sample
from tests.cluster import Cluster, read_lines, until

GIVES_UP = str(Path(__file__).parent / "scripts" / "gives_up.py")
BREAKS = str(Path(__file__).parent / "scripts" / "breaks.py")

pytestmark = pytest.mark.slow


def starts(folder: Path, rank: int = 0) -> list[int]:
    """The pids of a rank, one for each start."""
    return [s["pid"] for s in read_lines(folder / "started.jsonl") if s["RANK"] == rank]


def test_an_error_at_import_stops_at_once(nodes: Cluster, tmp_path: Path) -> None:
    node = nodes.start("only", BREAKS, str(tmp_path), "import", "0", nnodes="1:1", nproc=2)
    assert node.wait() == 70, node.output
    assert len(starts(tmp_path)) == 1
    (finished,) = nodes.events("finished")
    assert (finished["verdict"], finished["exit_code"]) == ("fails_again", 70)
    (failed,) = nodes.events("worker_failed", rank=0)
    assert failed["failure_class"] == "start_up"
    last = node.output[node.output.index("root cause:") :]
    assert "root cause: rank 0 on only-" in last
    assert 'breaks.py", line' in last
    assert "ModuleNotFoundError: No module named 'there_is_no_such_module'" in last


def test_a_script_that_gives_up_is_not_restarted(nodes: Cluster, tmp_path: Path) -> None:
    node = nodes.start("only", GIVES_UP, str(tmp_path), nnodes="1:1", nproc=2)
    assert node.wait() == 70, node.output
    # one rank may have given up before the other has begun
    assert 1 <= len(read_lines(tmp_path / "started.jsonl")) <= 2, "at most a start of each rank"
    (cause,) = nodes.events("root_cause")
    assert (cause["failure_class"], cause["step"]) == ("gave_up", 3)
    last = node.output[node.output.rindex("root cause:") :]
    assert "the program gave up after step 3 (exit code 1" in last
    assert "ValueError: the loss is nan" in last


def test_a_script_that_fails_at_the_same_step_is_tried_twice_and_told_on_every_node(
    nodes: Cluster, tmp_path: Path
) -> None:
    """Two nodes, a script that fails on the second at the same step always: two tries, and one story."""
    work = ("--tee", "3", BREAKS, str(tmp_path), "step", "1")
    files = {name: tmp_path / f"{name}.json" for name in ("first", "second")}
    nodes.environment["TORCHELASTIC_ERROR_FILE"] = str(files["first"])
    first = nodes.start("first", *work, conf="last_call=60")
    nodes.wait_event("node_joined")
    nodes.environment["TORCHELASTIC_ERROR_FILE"] = str(files["second"])
    second = nodes.start("second", *work, conf="last_call=60")
    assert (first.wait(), second.wait()) == (70, 70), first.output + second.output
    for file in files.values():  # for whoever started the launcher, in torch's form
        told = json.loads(file.read_text())["message"]
        assert (told["message"], told["errorCode"]) == ("ValueError: no batch for step 4", 1)
        assert 'breaks.py", line' in told["extraInfo"]["py_callstack"]
    assert len(starts(tmp_path, 1)) == 2, "tried twice"
    causes = nodes.events("root_cause")
    assert [(c["rank"], c["failure_class"], c["step"]) for c in causes] == [(1, "program", 3)] * 2
    assert causes[0]["node_failed"].startswith("second-")
    for node in (first, second):
        last = node.output[node.output.rindex("root cause:") :]
        assert last.startswith("root cause: rank 1 on second-"), last
        assert "a program error after step 3 (exit code 1, ValueError at " in last
        assert "ValueError: no batch for step 4" in last
        for victim in nodes.events("worker_failed", rank=0, generation=2):
            assert victim["failure_class"] == "lost_peer"
            assert "victim: rank 0 on first-" in last
            assert "because rank 1 failed" in last
    assert "[default0]:rank 0 says hello" in first.output
    assert "[default1]:rank 1 says hello" in second.output, "the rank of the job, not of the node"


@pytest.mark.parametrize("start", [pytest.param((), id="warm"), sample.rest(("--cold-workers",), id="cold")])
def test_a_killed_worker_is_restarted_without_asking(nodes: Cluster, tmp_path: Path, start: tuple[str, ...]) -> None:
    """Without --max-restarts; and what workers say reaches files and the console whichever way they start."""
    logs = ("--redirects", "3", "--tee", "3")
    node = nodes.start("only", *start, *logs, BREAKS, str(tmp_path), "wait", "0", nnodes="1:1", nproc=2)
    until("both workers", lambda: len(read_lines(tmp_path / "started.jsonl")) == 2)
    pid = starts(tmp_path, 1)[-1]
    next(w for w in node.tree() if w.pid == pid).kill()
    killed = nodes.wait_event("worker_failed", generation=1, rank=1)
    assert (killed["exit_code"], killed["failure_class"]) == (-signal.SIGKILL, "signal")
    until("both again", lambda: len(read_lines(tmp_path / "started.jsonl")) == 4)
    (tmp_path / "finish").touch()
    assert node.wait() == 0, node.output
    assert [c["rank"] for c in nodes.events("root_cause")] == [1]
    for rank in (0, 1):
        for stream, said in (("stdout", f"rank {rank} says hello"), ("stderr", f"rank {rank} warns")):
            written = sorted(nodes.folder.glob(f"*/attempt_*/{rank}/{stream}.log"))
            assert len(written) == 2, "a file for each generation"
            assert all(said in path.read_text() for path in written)
            assert f"[default{rank}]:{said}" in node.output
