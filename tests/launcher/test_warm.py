"""A forked worker is what a started one would be, as far as its script can tell."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.environment import Environment
from launcher.workers import boot
from launcher.workers.channel import Channel
from launcher.workers.warm import COLD, WarmStart
from tests.cluster import alive, until

MIRROR = """
import json, os, sys, threading
print(json.dumps({
    "argv": sys.argv, "name": __name__, "file": __file__, "path": sys.path[0], "cwd": os.getcwd(),
    "env": {k: v for k, v in os.environ.items() if k.startswith("MIRROR")}, "stdin": sys.stdin.read(),
    "package": __package__ or "", "main": sys.modules["__main__"].__dict__ is globals(),
    "threads": [t.name for t in threading.enumerate() if t is threading.main_thread()],
    "leader": os.getsid(0) == os.getpid() or os.environ.get("COLD") == "1",
}))
print("to stderr", file=sys.stderr)
sys.exit(int(os.environ.get("MIRROR_EXIT", "0")))
"""
WAITS = """
import os, sys, time
print(os.getpid(), type(sys.meta_path[0]).__name__ == 'Stash', flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmStart]:
    started = WarmStart(tmp_path_factory.mktemp("zygote"), lambda *_, **__: None)
    yield started
    started.close()


def test_it_says_when_it_is_ready(warm: WarmStart) -> None:
    warm.socket_path()
    assert warm.wait_ready(60)


def boot_command(zygote: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", boot.__file__, str(os.getpid()), zygote, sys.executable, "-u", *arguments]


def outcome(zygote: str, *arguments: str, cwd: Path, **env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        boot_command(zygote, *arguments),
        cwd=cwd,
        env={**os.environ, "MIRROR_A": "1", **env},
        input="typed",
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def stacks_of(folder: Path) -> dict[str, str]:
    """What makes a cold worker one that can write its stacks."""
    (folder / "stacks").touch()
    return Environment(stacks=folder / "stacks").to_env()


@pytest.mark.parametrize("exit_code", ["0", "7"])
@pytest.mark.parametrize("arguments", [("mirror.py", "--flag", "x"), ("-m", "package.mirror", "--flag", "x")])
def test_a_script_cannot_tell(warm: WarmStart, tmp_path: Path, arguments: tuple[str, ...], exit_code: str) -> None:
    (tmp_path / "mirror.py").write_text(MIRROR)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "mirror.py").write_text(MIRROR)
    cold = outcome(COLD, *arguments, cwd=tmp_path, MIRROR_EXIT=exit_code, COLD="1")
    forked = outcome(warm.socket_path(), *arguments, cwd=tmp_path, MIRROR_EXIT=exit_code, COLD="0")
    watched = outcome(COLD, *arguments, cwd=tmp_path, MIRROR_EXIT=exit_code, COLD="1", **stacks_of(tmp_path))
    for same in (forked, watched):
        assert same[0] == cold[0] == int(exit_code)
        assert json.loads(same[1]) == json.loads(cold[1])
        assert same[2] == cold[2] == "to stderr\n"


def test_an_error_is_told_as_by_python(warm: WarmStart, tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text("def f():\n    raise ValueError('no such thing')\nf()\n")
    cold = outcome(COLD, "raises.py", cwd=tmp_path)
    assert cold[0] == 1
    assert outcome(warm.socket_path(), "raises.py", cwd=tmp_path) == cold
    assert outcome(COLD, "raises.py", cwd=tmp_path, **stacks_of(tmp_path)) == cold


@contextlib.contextmanager
def started_worker(zygote: str, folder: Path, **env: str) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A worker that waits: the process that stands for it, and itself."""
    (folder / "waits.py").write_text(WAITS)
    command, env = boot_command(zygote, "waits.py"), {**os.environ, **env}
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            pid, has_stash = process.stdout.readline().split()
            assert has_stash == "True", "it was forked, not started"
            yield process, psutil.Process(int(pid))
        finally:
            process.kill()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_worker_and_its_end_is_boots_end(
    warm: WarmStart, tmp_path: Path, signum: signal.Signals
) -> None:
    if signal.getsignal(signum) is signal.SIG_IGN:
        pytest.skip("whoever started the tests ignores this signal, and a Python that inherits that does too")
    with started_worker(warm.socket_path(), tmp_path) as (process, worker):
        process.send_signal(signum)
        assert process.wait(60) == -signum  # SIGINT too: Python dies of it after its KeyboardInterrupt
        assert not alive(worker)


def test_a_killed_worker_shows_as_killed(warm: WarmStart, tmp_path: Path) -> None:
    with started_worker(warm.socket_path(), tmp_path) as (process, worker):
        worker.kill()
        assert process.wait(60) == -signal.SIGKILL


def test_a_worker_does_not_outlive_its_boot(warm: WarmStart, tmp_path: Path) -> None:
    with started_worker(warm.socket_path(), tmp_path) as (process, worker):
        process.kill()
        until("the worker is gone", lambda: not alive(worker))


def test_a_signal_waits_for_no_zygote_that_is_busy(warm: WarmStart, tmp_path: Path) -> None:
    with started_worker(warm.socket_path(), tmp_path) as (process, worker):
        os.kill(warm_pid(warm), signal.SIGSTOP)
        try:
            process.send_signal(signal.SIGTERM)
            until("the worker is gone", lambda: not alive(worker))
        finally:
            os.kill(warm_pid(warm), signal.SIGCONT)
        assert process.wait(60) == -signal.SIGTERM


def test_the_agent_can_find_and_end_a_worker_whose_boot_is_gone(warm: WarmStart, tmp_path: Path) -> None:
    channel = Channel.create(tmp_path / "channel")
    try:
        with started_worker(warm.socket_path(), tmp_path, ELASTIC_MOE_CHANNEL=str(channel.path)) as (boot, worker):
            os.kill(warm_pid(warm), signal.SIGSTOP)  # a zygote that is busy
            boot.kill()
            boot.wait(60)
            assert alive(worker), "nobody has told the worker yet"
            assert channel.forked_pid() == worker.pid
            os.kill(worker.pid, signal.SIGKILL)
            until("gone, though nobody has reaped it", lambda: channel.forked_pid() is None)
    finally:
        os.kill(warm_pid(warm), signal.SIGCONT)
    channel.close()


def warm_pid(warm: WarmStart) -> int:
    warm.socket_path()
    warm.wait_ready(60)
    pid = warm.zygote_pid()
    assert pid
    return pid


def test_a_zygote_that_died_is_replaced_and_the_loss_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    warm = WarmStart(tmp_path, lambda event, /, **_: told.append(event))
    try:
        with started_worker(warm.socket_path(), tmp_path) as (process, worker):
            assert warm._process is not None
            warm._process.kill()
            warm._process.wait(60)  # type: ignore[call-arg]
            assert process.wait(60) == -signal.SIGKILL
            until("the worker is gone with its zygote", lambda: not alive(worker))
        with started_worker(warm.socket_path(), tmp_path):
            assert told == ["warm_start_lost"]
    finally:
        warm.close()


def test_a_zygote_that_may_not_fork_leaves_it_to_a_cold_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    site.mkdir()
    # An import that leaves a thread behind: forking such a process is not safe.
    (site / "sitecustomize.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *sys.path]))
    (tmp_path / "prints.py").write_text("print('ran')\n")
    warm = WarmStart(tmp_path, lambda *_, **__: None)
    try:
        zygote = warm.socket_path()
        monkeypatch.undo()
        exit_code, stdout, stderr = outcome(zygote, "prints.py", cwd=tmp_path)
    finally:
        warm.close()
    assert (exit_code, stdout) == (0, "ran\n")
    assert stderr == "started cold: 1 thread(s) were started by an import\n"
