"""The end of workers that are killed, and of their memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.workers import reaping
from tests.cluster import until

MIB = 1024 * 1024
_HOLDS = "import sys; memory = bytearray(b'x') * (64 << 20); print('ready', flush=True); sys.stdin.read()"


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[bytes]]:
    """A process with 64 MiB, which leads a group."""
    with subprocess.Popen(
        [sys.executable, "-Ic", _HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def num_descriptors() -> int:
    """Of processes; what else is in this one comes and goes."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += "pidfd" in os.readlink(link)
    return found


def test_a_group_that_is_killed_is_gone_and_leaves_no_descriptor(holder: subprocess.Popen[bytes]) -> None:
    before = num_descriptors()
    reaping.kill_group(holder.pid)
    assert holder.wait(60) == -signal.SIGKILL
    until("the helper's end", lambda: all(thread.name != "free-memory" for thread in threading.enumerate()))
    assert num_descriptors() == before
    with pytest.raises(ProcessLookupError):
        reaping.kill_group(holder.pid)
    assert num_descriptors() == before


@pytest.mark.parametrize("lacks", ["threads", "descriptors"])
def test_it_is_killed_all_the_same_where_nobody_can_help(
    holder: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    before = num_descriptors()

    def refuse(*_: object, **__: object) -> threading.Thread:
        raise RuntimeError("can't start new thread") if lacks == "threads" else OSError("no such call")

    monkeypatch.setattr(*{"threads": (threading, "Thread"), "descriptors": (os, "pidfd_open")}[lacks], refuse)
    reaping.kill_group(holder.pid)
    assert holder.wait(60) == -signal.SIGKILL
    assert num_descriptors() == before


def test_memory_is_freed_by_the_thread_that_kills_which_nobody_waits_for(
    holder: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int]] = []
    returned, kill, free = threading.Event(), os.killpg, reaping.free_memory

    def killpg(pid: int, signum: int) -> None:
        told.append(("kill", threading.get_ident()))
        kill(pid, signum)

    def free_memory(fd: int) -> bool:
        assert returned.wait(60)
        told.append(("free", threading.get_ident()))
        return free(fd)

    monkeypatch.setattr(os, "killpg", killpg)
    monkeypatch.setattr(reaping, "free_memory", free_memory)
    reaping.kill_group(holder.pid)
    returned.set()
    until("both", lambda: len(told) == 2)
    assert [what for what, _ in told] == ["kill", "free"]
    assert told[0][1] == told[1][1] != threading.get_ident()


def test_what_was_not_killed_keeps_its_memory(holder: subprocess.Popen[bytes]) -> None:
    assert not reaping.free_memory(os.pidfd_open(holder.pid))
    assert holder.poll() is None
    assert rss_bytes(holder.pid) > 64 * MIB


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE
