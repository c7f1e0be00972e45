"""Output that nobody takes any more ends no job."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.workers import pump
from tests.cluster import read_lines, until
from tests.template import child_environment

TALKS = str(Path(__file__).parent / "scripts" / "talks.py")


@pytest.mark.slow
def test_a_job_goes_on_without_its_console(tmp_path: Path) -> None:
    go, log_dir = tmp_path / "go", tmp_path / "log"
    options = ["--nproc-per-node", "2", "--cold-workers", "--log-dir", str(log_dir), "--tee", "0:3"]  # rank 1: direct
    command = [sys.executable, "-m", "elastic_moe", "run", *options, TALKS, str(go)]
    environment = child_environment()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
        try:
            assert job.stdout is not None
            heard = b""
            while heard.count(b"first") < 2:
                heard += job.stdout.readline()
            job.stdout.close()
            go.touch()
            assert job.wait(60) == 0
        finally:
            job.kill()
    assert go.read_text() == "done"
    events = read_lines(log_dir / "events.jsonl")
    assert [e["generation"] for e in events if e["event"] == "workers_started"] == [1], "nothing was restarted"
    (lost,) = [e for e in events if e["event"] == "console_lost"]
    assert (lost["stream"], lost["reason"]) == ("stdout and stderr", "Broken pipe")
    (tee,) = log_dir.glob("*/attempt_0/0/stdout.log")
    assert len(tee.read_text().splitlines()) == 3002, "log files have it all"


class Pumped:
    """A pump between `write` and `target`."""

    def __init__(self, target: int) -> None:
        read, self.write = os.pipe()
        self._notices, notice = os.pipe()
        command = [sys.executable, "-I", "-S", pump.__file__, str(notice), f"{read}:{target}:stdout"]
        self.process = subprocess.Popen(command, pass_fds=[notice, read, target])
        os.close(read)
        os.close(notice)

    def end(self) -> str:
        """What it told."""
        os.close(self.write)
        assert self.process.wait(60) == 0
        with os.fdopen(self._notices) as notices:
            return notices.read()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def test_all_that_was_written_arrives_in_order_whatever_the_target_takes_at_once(pipe: tuple[int, int]) -> None:
    read, target = pipe
    os.set_blocking(target, False)  # as a terminal is that another program has left so
    pumped = Pumped(target)
    os.close(target)
    text = b"".join(b"%d\n" % number for number in range(50_000))
    with subprocess.Popen([sys.executable, "-c", WRITES], stdout=pumped.write) as writer:
        got = b""
        while len(got) < len(text):
            got += os.read(read, 1 << 14)
        assert writer.wait(60) == 0
    assert got == text
    assert pumped.end() == ""


WRITES = "for number in range(50_000):\n    print(number)"


def test_a_reader_that_is_gone_is_told_once_and_the_rest_is_dropped(pipe: tuple[int, int]) -> None:
    read, target = pipe
    pumped = Pumped(target)
    os.close(read)
    for _ in range(3):
        os.write(pumped.write, b"x" * 70_000)
    assert pumped.end() == "stdout: Broken pipe\n"


def test_a_full_disk_is_told_once() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    pumped = Pumped(full)
    os.close(full)
    for _ in range(3):
        os.write(pumped.write, b"x" * 70_000)
    assert pumped.end() == "stdout: No space left on device\n"


def test_the_pump_outlives_who_started_it_until_all_is_through(tmp_path: Path) -> None:
    """`kill -9` of an agent loses no line that a worker has written before."""
    out = tmp_path / "out"
    script = (
        "import os, sys, time\n"
        "from launcher.workers.console import Console\n"
        "with Console():\n"
        "    os.write(1, b'line\\n' * 10_000)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    environment = child_environment()
    with out.open("w") as file:
        done = subprocess.run([sys.executable, "-c", script], env=environment, stdout=file, timeout=60)
    assert done.returncode == -signal.SIGKILL
    until("all of it", lambda: out.read_text().count("line\n") == 10_000)
