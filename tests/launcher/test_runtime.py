"""The agent's private folder: gone with it, or with the next agent if it was killed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.workers.runtime import remove_abandoned, runtime_dir
from tests.cluster import until
from tests.template import child_environment

HOLDER = """
import pathlib, subprocess, sys, tempfile
from launcher.workers.runtime import runtime_dir
tempfile.tempdir = sys.argv[1]
with runtime_dir() as path:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)  # inherits no lock
    (path / "worker-1-0").touch()
    print(path, flush=True)
    sys.stdin.read()
    child.kill()
    child.wait()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    environment = child_environment()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    yield process
    process.kill()
    process.communicate()


def test_it_is_private_and_gone_afterwards(folder: Path) -> None:
    with runtime_dir() as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert path.parent == folder
    assert not path.exists()


def test_what_a_killed_agent_left_is_removed_by_the_next_and_not_before(
    holder: subprocess.Popen[str], folder: Path
) -> None:
    assert holder.stdout is not None
    left = Path(holder.stdout.readline().strip())
    with runtime_dir() as path:
        assert left.is_dir(), "its agent lives"
        for child in psutil.Process(holder.pid).children():
            child.kill()  # which would have removed it
        holder.kill()
        holder.wait()
        assert remove_abandoned(folder) == [left]
        assert not left.exists()
        assert path.is_dir(), "this agent's own stays"


def test_what_a_killed_agent_had_is_gone_at_once(holder: subprocess.Popen[str], folder: Path) -> None:
    assert holder.stdout is not None
    left = Path(holder.stdout.readline().strip())
    family = psutil.Process(holder.pid).children()
    holder.kill()
    holder.wait()
    until("the folder to be gone", lambda: not left.exists())
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


def test_without_a_process_beside_it_a_folder_is_made_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", str(folder / "nowhere"))
    with runtime_dir() as path:
        assert path.is_dir()
    assert not path.exists()
    assert "stays until the next agent starts, should this one be killed" in caplog.text


def test_what_is_not_surely_an_agents_stays(folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "agent.lock").touch()
    (folder / "elastic-moe-link").symlink_to(elsewhere)
    (folder / "elastic-moe-without-lock").mkdir()
    (folder / "elastic-moe-file").touch()
    (folder / "elastic-moe-link-in").mkdir()
    (folder / "elastic-moe-link-in" / "agent.lock").symlink_to(elsewhere / "agent.lock")
    assert remove_abandoned(folder) == []
    assert len(list(folder.iterdir())) == 5


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_another_users_stays(folder: Path) -> None:
    other = folder / "elastic-moe-other"
    other.mkdir()
    (other / "agent.lock").touch()
    os.chown(other, 12345, 12345)
    assert remove_abandoned(folder) == []
    os.chown(other, 0, 0)
    assert remove_abandoned(folder) == [other]
