"""What workers have started ends with them, whatever ends them, and nothing else does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.environment import Environment
from launcher.workers import guardian, process_tree
from tests.cluster import Cluster, alive, read_lines, until

LEAVES = str(Path(__file__).parent / "scripts" / "leaves.py")
KINDS = {"shell", "setsid", "no environment", "multiprocessing", "double fork"}


@pytest.fixture
def unrelated() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def started(folder: Path, generation: int) -> dict[str, psutil.Process]:
    told = [line for line in read_lines(folder / "pids.jsonl") if line["generation"] == generation]
    return {line["kind"]: psutil.Process(line["pid"]) for line in told if psutil.pid_exists(line["pid"])}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "end"), [((), "kill"), ((), "terminate"), (("--cold-workers",), "kill")], ids=["warm", "term", "cold"]
)
def test_nothing_that_a_worker_started_outlives_it(
    nodes: Cluster, tmp_path: Path, unrelated: subprocess.Popen[bytes], start: tuple[str, ...], end: str
) -> None:
    node = nodes.start("only", *start, LEAVES, str(tmp_path), nnodes="1:1")
    until("the second generation", (tmp_path / "ready").exists)
    seen = read_lines(tmp_path / "seen.jsonl")
    assert seen == [{"generation": 1, "there": []}, {"generation": 2, "there": []}], "gone before others start"
    ended = nodes.events("children_ended", generation=1)
    assert "(pid " in ended[0]["processes"], "it is told"
    assert not [event for event in ended if event["left"]]
    left = started(tmp_path, 2)
    assert left.keys() >= KINDS
    if end == "kill":
        os.killpg(node.process.pid, signal.SIGKILL)  # all of its process group, as a shell does
    else:
        node.terminate()
    until("all of it is gone", lambda: not [kind for kind, process in left.items() if alive(process)])
    assert unrelated.poll() is None


@pytest.mark.slow
def test_children_are_kept_on_request(nodes: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "leaves_one.py"
    script.write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True, stdout=subprocess.DEVNULL)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
    )
    node = nodes.start("only", "--keep-children", "--cold-workers", str(script), nnodes="1:1")
    assert node.wait() == 0, node.output
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    try:
        assert alive(child)
    finally:
        child.kill()
    assert not nodes.events("children_ended")


def guard(*program: str, **environment: str) -> subprocess.Popen[str]:
    """A program below a guardian."""
    command = [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid()), *program]
    env = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", -15), ("kill -9 $$", -9)])
def test_a_guardian_ends_as_its_program_and_ends_what_that_leaves(script: str, code: int) -> None:
    with guard("sh", "-c", f"setsid sleep 600 >/dev/null 2>&1 & echo $!; {script}") as process:
        assert process.wait(60) == code
        assert process.stdout is not None
        assert process.stderr is not None
        child = int(process.stdout.readline())
        assert f"(pid {child})" in process.stderr.read()
        assert process_tree.look_up(child) is None


def test_what_ignores_sigterm_is_killed_and_with_it_what_it_starts_meanwhile(tmp_path: Path) -> None:
    breeds = f"trap '' TERM; while :; do sleep 600 & sleep 0.01; echo >>{tmp_path}/bred; done"
    until_bred = f"until [ -e {tmp_path}/bred ] && [ $(wc -l <{tmp_path}/bred) -gt 3 ]; do sleep 0.01; done"
    with guard("sh", "-c", f'setsid sh -c "{breeds}" >/dev/null 2>&1 & echo $!; {until_bred}; exit 1') as process:
        assert process.wait(60) == 1
        assert process.stderr is not None
        told = process.stderr.read()
    pids = [int(part.rstrip("),\n")) for part in told.split() if part.rstrip("),\n").isdigit()]
    assert len(pids) > 3
    assert not [
        pid for pid in pids if (process_now := process_tree.look_up(pid)) and process_now.name in ("sh", "sleep")
    ]


def test_a_guardian_keeps_what_it_is_told_to_keep() -> None:
    with guard(
        "sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo $!", **Environment(keep_children=True).to_env()
    ) as process:
        assert process.wait(60) == 0
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert process_tree.look_up(child) is not None
        os.kill(child, signal.SIGKILL)


def test_a_signal_goes_to_the_process_that_was_seen_and_to_no_other() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        seen = process_tree.look_up(process.pid)
        assert seen is not None
        process_tree.Process(seen.pid, seen.name, seen.started_ticks + 1).send(
            signal.SIGKILL
        )  # the pid is another's by now
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        seen.send(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        seen.send(signal.SIGKILL)


@pytest.mark.parametrize("told", [True, False], ids=["by the kernel", "by a look at all processes"])
def test_descendants_are_found_whoever_tells_them(monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    if not told:
        exists = os.path.exists
        monkeypatch.setattr(os.path, "exists", lambda path: not str(path).endswith("/children") and exists(path))
    command = ["sh", "-c", "sleep 600 & sh -c 'sleep 600; :' & wait"]
    with subprocess.Popen(command) as process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)  # also where a look finds something else: the block waits for it

        def names() -> list[str]:  # a shell that was forked has yet to become a sleep
            return sorted(found.name for found in process_tree.descendants([process.pid]).values())

        until("a shell and two sleeps below it", lambda: names() == ["sh", "sleep", "sleep"])
        (inner,) = [pid for pid, found in process_tree.descendants([process.pid]).items() if found.name == "sh"]
        assert sorted(p.name for p in process_tree.descendants([process.pid], without=[inner]).values()) == ["sleep"]
        begun_s = time.monotonic()
        ended, left = process_tree.end(lambda: process_tree.descendants([process.pid]), 60.0)
        assert time.monotonic() - begun_s < 30, "who ends on SIGTERM is not waited for longer"
        assert (len(ended), left) == (3, [])
        process.kill()


def test_what_cannot_be_ended_is_told_in_bounded_time() -> None:
    stuck = process_tree.Process(2**22 + 1, "stuck", 1)  # above any pid: no signal reaches it
    assert process_tree.end(lambda: {stuck.pid: stuck}, 0.0, 0.05) == ([stuck], [stuck])
