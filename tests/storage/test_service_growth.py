"""Many saves: nothing grows in worker, keeper and service, and nothing is left in /dev/shm."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from storage import Checkpointer
from storage.agent import AgentEnvironment
from tests.cluster import until
from tests.storage.service_cases import process

NUM_SAVES = int(os.environ.get("SERVICE_SAVES", "10"))
NUM_BEFORE = 8
"""Until all that is made once has been made: slots, connections, threads."""
NUM_FLOATS = 2_000_000
SLACK_BYTES, SLACK = 48 << 20, 4
"""Allocators give back when they like, and a thread begins when there is work for it; ten states that are not let go,
or one thread or descriptor more with each of ten saves, are more than that.
"""


@dataclass(frozen=True)
class Sizes:
    """What a process has: of memory what is its own; slots, which are shared, count as memories."""

    own_bytes: int
    num_fds: int
    num_threads: int
    num_memories: int

    @classmethod
    def of(cls, pid: int) -> Sizes:
        found = psutil.Process(pid)
        targets = [_target(pid, name) for name in os.listdir(f"/proc/{pid}/fd")]
        memories = sum(target.startswith(("/memfd:", "/dev/shm/")) for target in targets)
        memory = found.memory_info()
        return cls(memory.rss - memory.shared, found.num_fds(), found.num_threads(), memories)

    def within(self, before: Sizes) -> bool:
        """Whether it is no more than it was."""
        counts = ("num_fds", "num_threads", "num_memories")
        return self.own_bytes <= before.own_bytes + SLACK_BYTES and all(
            getattr(self, name) <= getattr(before, name) + SLACK for name in counts
        )


def _target(pid: int, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{name}")
    except OSError:
        return ""


def test_many_saves_leave_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, shm = tmp_path / "node" / "service.sock", Path("/dev/shm")
    for name, text in {"service": str(path), "node": "a", "lineage": "l"}.items():
        monkeypatch.setenv(AgentEnvironment.variable(name), text)
    weights = torch.zeros(NUM_FLOATS)
    with process(path) as service, Checkpointer(tmp_path / "run", keep=1) as ckpt:

        def save(first: int, num: int) -> None:
            for step in range(first, first + num):
                ckpt.save(step, {"w": weights, "n": step})
            assert ckpt.wait()
            until("the service to be done", lambda: (found := service.status()) and not found.num_unfinished)
            gc.collect()

        save(1, NUM_BEFORE)
        pids = {"worker": os.getpid(), "keeper": service.keeper.pid, "service": service.pid()}
        before, files = {name: Sizes.of(pid) for name, pid in pids.items()}, sorted(shm.iterdir())
        save(1 + NUM_BEFORE, NUM_SAVES)
        for name, pid in pids.items():
            until(
                f"the {name} to have what it had: {before[name]}", lambda n=name, p=pid: Sizes.of(p).within(before[n])
            )  # type: ignore[misc]
            print(f"{name}: {before[name]} -> {Sizes.of(pid)}")
        assert not [file for file in shm.iterdir() if file not in files and "elastic-moe" in file.name]
        until("no note to be left", lambda: not list(path.with_suffix(".kept").glob("*")))
