"""Run a module on several ranks in fresh processes, as torchrun would, for what must not share a process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def run_ranks(module: str, *args: str, world_size: int, timeout_s: float) -> list[str]:
    """What each rank has printed, by rank; every process has ended.

    Raises:
        RuntimeError: a rank failed, with what it said.
        subprocess.TimeoutExpired: one did not end in time.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *args],
            env={**os.environ, **world, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        said = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    if failed:
        raise RuntimeError(f"rank {failed[0]} of {world_size} failed: {said[failed[0]][1][-2000:]}")
    return [out for out, _ in said]
