"""Stacks of processes that hang in different ways, and of those that cannot tell theirs."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.environment import Environment
from launcher.health.stacks import StackTarget, collect, innermost, write
from launcher.workers import boot, process_tree, program
from launcher.workers.program import STACKS_SIGNAL
from tests.cluster import until

SLEEPS = "import time\ndef sleeps():\n    print('here', flush=True)\n    time.sleep(600)\nsleeps()\n"
HOLDS_THE_GIL = (
    "import re\ndef holds():\n    print('here', flush=True)\n    re.match('(a+)+$', 64 * 'a' + 'b')\nholds()\n"
)
USES_THE_SIGNAL = (
    "import signal, time\n"
    f"signal.signal({int(STACKS_SIGNAL)}, lambda *_: print('mine', flush=True))\n"
    "print('here', flush=True)\n"
    "while True:\n    time.sleep(0.05)\n"
)


@contextlib.contextmanager
def running(folder: Path, script: str, *, watched: bool = True) -> Iterator[tuple[subprocess.Popen[str], StackTarget]]:
    """What stands over a cold worker that has printed `here`, and the worker."""
    (folder / "script.py").write_text(script)
    stacks = folder / "stacks"
    stacks.touch(0o600)
    command = [sys.executable, "-I", "-S", boot.__file__, str(os.getpid()), "-", sys.executable, "-u", "script.py"]
    env = {**os.environ, **(Environment(stacks=stacks).to_env() if watched else {})}
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
            (worker,) = psutil.Process(process.pid).children()
            yield process, StackTarget(3, worker.pid, stacks, 7)
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("script", "function"), [(SLEEPS, "sleeps"), (HOLDS_THE_GIL, "holds")], ids=["sleeps", "holds the GIL"]
)
def test_a_process_that_sleeps_or_holds_the_gil_tells_where(tmp_path: Path, script: str, function: str) -> None:
    with running(tmp_path, script) as (process, worker):
        found = collect({0: worker}, wait_s=60.0)[0]
        assert process.poll() is None, "it goes on"
    assert f"in {function}\n" in found.text
    assert found.text.startswith(f"rank 3, pid {worker.pid}, step 7")
    assert "thread" in found.text and "state " in found.text
    folder = write({0: found}, tmp_path / "log" / "generation-1")
    written = folder / "rank-3.txt"
    assert written.read_text() == found.text
    assert stat.S_IMODE(written.stat().st_mode) == 0o600


def test_a_stopped_process_is_told_as_stopped_and_made_to_tell_where(tmp_path: Path) -> None:
    with running(tmp_path, SLEEPS) as (_, worker):
        os.kill(worker.pid, signal.SIGSTOP)
        until("it is stopped", lambda: psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED)
        found = collect({0: worker}, wait_s=60.0)[0]
    assert found.evidence.stopped
    assert "stopped by a signal" in found.text
    assert "in sleeps" in found.text


@pytest.mark.parametrize("watched", [False, True], ids=["not ours", "gone"])
def test_a_process_that_cannot_write_stacks_is_not_signalled(tmp_path: Path, watched: bool) -> None:
    with running(tmp_path, SLEEPS, watched=watched) as (process, worker):
        if watched:
            process.kill()
            until("it is gone", lambda: process_tree.look_up(worker.pid) is None)
        found = collect({0: worker})[0]
        assert watched or process.poll() is None, "the signal would have ended it"
    assert found.evidence.frame == ""
    assert "cannot write Python stacks" in found.text


def test_a_script_that_uses_the_signal_keeps_it_and_costs_bounded_time(tmp_path: Path) -> None:
    with running(tmp_path, USES_THE_SIGNAL) as (process, worker):
        found = collect({0: worker}, wait_s=0.3)[0]
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        assert process.poll() is None
    assert "did not write its Python stacks in time" in found.text


def test_the_main_thread_is_the_last_and_wrappers_say_nothing() -> None:
    text = (
        "Thread 0x00007f0000000001 (most recent call first):\n"
        '  File "/lib/threading.py", line 1 in wait\n\n'
        "Current thread 0x00007f0000000002 (most recent call first):\n"
        '  File "/site-packages/torch/_ops.py", line 9 in __call__\n'
        '  File "/site-packages/torch/distributed/_functional_collectives.py", line 5 in wait\n'
        '  File "/job/train.py", line 4 in <module>\n'
    )
    assert innermost(text) == ("/site-packages/torch/distributed/_functional_collectives.py:5 in wait", True)
    assert innermost(text.replace("torch/distributed/_func", "torch/nn/func"))[1] is False
    for ours in ("storage/ranks/nearby.py", "elastic_moe/parallel/barrier.py"):
        assert innermost(text.replace("torch/distributed/_functional_collectives.py", ours))[1] is True
    assert innermost("") == ("", False)
    assert innermost(text.partition("\n\n")[0]) == ("/lib/threading.py:1 in wait", False)


def test_nothing_of_ours_is_imported_by_a_cold_worker() -> None:
    """Its own folder is first on the path while it starts: whatever it imports must be the interpreter's."""
    source = Path(program.__file__).read_text()
    assert "from launcher" not in source and "import launcher" not in source
