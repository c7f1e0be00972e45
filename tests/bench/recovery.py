"""`make bench-recovery`: from a fault to the survivors' next step, ours and stock torchrun in turn, in one run.

Two nodes of one worker each on this machine, the same script. Prints a table and writes JSON beside it. The second
node is the victim: the first hosts the meeting place of either launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from tests.cluster import free_port, read_lines, until

SCRIPT = str(Path(__file__).with_name("steps.py"))
DEADLINE_S = 180.0


@dataclasses.dataclass(frozen=True)
class Launcher:
    """How a node is started: the command before the script."""

    name: str
    command: tuple[str, ...]


def launchers(port: int) -> tuple[Launcher, Launcher]:
    """Ours and stock torchrun, both with their defaults but for what a job must say, and a restart each."""
    common = ("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", "bench")
    endpoint = ("--rdzv-endpoint", f"127.0.0.1:{port}")
    ours = (sys.executable, "-m", "elastic_moe", "run", *common, *endpoint, "--rdzv-conf", "last_call=60")
    stock = (sys.executable, "-m", "torch.distributed.run", *common, *endpoint, "--rdzv-backend", "c10d")
    return Launcher("elastic-moe run", ours), Launcher("torchrun", stock)


class Job:
    """Two nodes under one launcher, each a process tree of its own."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self._launcher = launcher
        self.folder = folder
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def start_node(self) -> subprocess.Popen[bytes]:
        with (self.folder / f"node-{len(self.nodes)}.log").open("wb") as log:
            node = subprocess.Popen(
                [*self._launcher.command, SCRIPT, str(self.folder)],
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.nodes.append(node)
        return node

    def steps(self) -> list[dict[str, float]]:
        return read_lines(self.folder / "steps.jsonl")

    def tree(self, index: int) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.nodes[index].pid)
            return [*agent.children(recursive=True), agent]
        return []

    def end(self) -> None:
        for index in range(len(self.nodes)):
            for process in self.tree(index):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.nodes[index].wait(10)


@contextlib.contextmanager
def running(launcher: Launcher) -> Iterator[Job]:
    """A job of two nodes that has done ten steps on both."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(launcher, Path(folder))
        try:
            job.start_node()
            time.sleep(3.0)  # the first one hosts the meeting place
            job.start_node()
            until("ten steps of two nodes", lambda: [s for s in job.steps() if s["world_size"] == 2][10:], DEADLINE_S)
            yield job
        finally:
            job.end()


def kill_node(job: Job) -> None:
    for process in job.tree(1):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    for process in job.tree(1):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def freeze_node(job: Job) -> None:
    for process in job.tree(1):
        process.suspend()


def terminate_node(job: Job) -> None:
    job.nodes[1].send_signal(signal.SIGTERM)


def kill_worker(job: Job) -> None:
    """The worker that computes on the second node: the one with the script, at the end of its tree."""
    workers = [p for p in job.tree(1) if not p.children() and p.memory_info().rss > 100 << 20]
    max(workers, key=lambda p: (p.ppid() != job.nodes[1].pid, p.create_time())).kill()


FAULTS: dict[str, Callable[[Job], None]] = {
    "node killed": kill_node,
    "worker killed": kill_worker,
    "node frozen": freeze_node,
    "node leaves (SIGTERM)": terminate_node,
}
ENDLESS_FOR_STOCK = "node frozen"  # the collective's own time-out, 30 minutes


def measure(launcher: Launcher, fault: str) -> tuple[float | None, int]:
    """Seconds from the fault to the next step of another process (None: not within the deadline), and steps redone."""
    with running(launcher) as job:
        before = job.steps()[-1]
        began = time.time()
        FAULTS[fault](job)
        deadline_s = 20.0 if fault == ENDLESS_FOR_STOCK and launcher.name == "torchrun" else DEADLINE_S
        try:
            after = until(
                "a step after the fault",
                lambda: [s for s in job.steps() if s["ts"] > began and s["pid"] != before["pid"]],
                deadline_s,
            )[0]
        except AssertionError:
            return None, 0
        done = max(s["step"] for s in job.steps() if s["pid"] == before["pid"])
        return after["ts"] - began, int(done - after["step"] + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--out", type=Path, default=Path("out/bench-recovery.json"))
    args = parser.parse_args()
    results: list[dict[str, object]] = []
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{'fault':24}{'launcher':18}{'median s':>10}{'min':>8}{'max':>8}{'steps redone':>14}")
    for fault in args.faults:
        times: dict[str, list[float | None]] = {}
        redone: dict[str, list[int]] = {}
        for _ in range(args.repeats):
            for launcher in launchers(free_port()):
                taken_s, steps = measure(launcher, fault)
                times.setdefault(launcher.name, []).append(taken_s)
                redone.setdefault(launcher.name, []).append(steps)
        for name, taken in times.items():
            known = [t for t in taken if t is not None]
            results.append({"fault": fault, "launcher": name, "seconds": taken, "steps_redone": redone[name]})
            if len(known) < len(taken):
                print(f"{fault:24}{name:18}{'never':>10}{'':16}({len(taken) - len(known)} of {len(taken)})", flush=True)
            else:
                median = f"{statistics.median(known):10.2f}{min(known):8.2f}{max(known):8.2f}"
                print(f"{fault:24}{name:18}{median}{statistics.median(redone[name]):14g}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"cores": os.cpu_count(), "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
