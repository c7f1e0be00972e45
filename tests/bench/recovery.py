"""`make bench-recovery`: from a fault to the survivors' next step, ours and stock torchrun in turn, in one run.

Two nodes of one worker each on this machine, the same script. The second node is the victim: the first hosts the
meeting place of either launcher. Prints a table as it goes and writes JSON beside it; a run of some faults replaces
only those in the file. What does not come back is given up after a time, and shown as more than that.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import torch

from tests.bench.family import ends_with_its_family
from tests.cluster import free_port, read_lines, until
from tests.etcd import etcd
from tests.template import child_environment

SCRIPT = str(Path(__file__).parent / "scripts" / "steps.py")
START_S = 120.0
DEADLINE_S = 60.0
OURS, PLUGGED, STOCK = "elastic-moe run", "torchrun, etcd3", "torchrun"


@dataclasses.dataclass(frozen=True)
class Launcher:
    """How a node is started: the command before the script, and where its nodes meet."""

    name: str
    command: tuple[str, ...]
    endpoint: str


def launchers(names: Sequence[str], last_call_s: int, etcd_endpoint: str) -> list[Launcher]:
    """Each with its defaults but for what a job must say, a restart each, and when the first round may begin."""
    own_endpoint = f"127.0.0.1:{free_port()}"
    job_id = f"bench-{own_endpoint.rpartition(':')[2]}"
    common = ("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", job_id)
    ours = ("-m", "elastic_moe", "run", *common, "--rdzv-endpoint", own_endpoint)
    stock = ("-m", "torch.distributed.run", *common)
    conf = ("--rdzv-conf", f"last_call={last_call_s}")
    commands = {
        OURS: (*ours, *conf),
        PLUGGED: (*stock, "--rdzv-endpoint", etcd_endpoint, "--rdzv-backend", "etcd3", *conf),
        STOCK: (*stock, "--rdzv-endpoint", own_endpoint, "--rdzv-backend", "c10d"),
    }
    endpoints = {OURS: own_endpoint, PLUGGED: etcd_endpoint, STOCK: own_endpoint}
    return [Launcher(name, (sys.executable, *commands[name]), endpoints[name]) for name in names]


def listens(endpoint: str) -> bool:
    """Whether somebody accepts connections there."""
    host, _, port = endpoint.rpartition(":")
    with contextlib.suppress(OSError):
        socket.create_connection((host, int(port)), timeout=1.0).close()
        return True
    return False


class Job:
    """Two nodes under one launcher, each a process tree of its own."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self._launcher = launcher
        self.folder = folder
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._environment = child_environment(OMP_NUM_THREADS="1")
        self.script: tuple[str, ...] = (SCRIPT, str(folder))

    def start_node(self) -> subprocess.Popen[bytes]:
        with (self.folder / f"node-{len(self.nodes)}.log").open("wb") as log:
            node = subprocess.Popen(
                [*self._launcher.command, *self.script],
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.nodes.append(node)
        return node

    def steps(self, world_size: int | None = None) -> list[dict[str, float]]:
        """The steps so far, those of one world size."""
        return [s for s in read_lines(self.folder / "steps.jsonl") if world_size in (None, s["world_size"])]

    def tree(self, index: int) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.nodes[index].pid)
            return [*agent.children(recursive=True), agent]
        return []

    def ended(self) -> bool:
        """Whether a node has, of itself."""
        return any(node.poll() is not None for node in self.nodes)

    def last_words(self) -> str:
        """The end of every node's log."""
        return "\n".join(log.read_text()[-2000:] for log in sorted(self.folder.glob("node-*.log")))

    def end(self) -> None:
        for index in range(len(self.nodes)):
            for process in self.tree(index):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.nodes[index].wait(10)


@contextlib.contextmanager
def running(launcher: Launcher, num_nodes: int) -> Iterator[Job]:
    """A job of so many nodes that has done ten steps on all of them."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(launcher, Path(folder))
        try:
            job.start_node()
            if num_nodes == 2:
                until("the first one hosts the meeting place", lambda: listens(launcher.endpoint), START_S)
                job.start_node()
            until(
                f"ten steps of {num_nodes} nodes, or an end",
                lambda: job.steps(num_nodes)[10:] or job.ended(),
                START_S,
            )
            if job.ended():
                raise AssertionError(f"{launcher.name} ended at its start:\n{job.last_words()}")
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


def start_node(job: Job) -> None:
    job.start_node()


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to a job of `num_nodes`, and which launchers are asked what they do then.

    `pause`: count from the last step before the change, not from the fault: what a joiner takes to start stops nobody.
    `given_up_s`: after so long torchrun is not waited for any more.
    """

    act: Callable[[Job], None]
    num_nodes: int = 2
    pause: bool = False
    given_up_s: float = DEADLINE_S
    launchers: tuple[str, ...] = (OURS, STOCK)


FAULTS = {
    "node killed": Fault(kill_node, launchers=(OURS, PLUGGED, STOCK)),
    # Without a time-out of the collective's own, 30 minutes, torchrun notices nothing.
    "node frozen": Fault(freeze_node, given_up_s=20.0, launchers=(OURS, PLUGGED, STOCK)),
    "worker killed": Fault(kill_worker),
    "node leaves (SIGTERM)": Fault(terminate_node),
    "node joins": Fault(start_node, num_nodes=1, pause=True, given_up_s=90.0),
}


@dataclasses.dataclass(frozen=True)
class Recovery:
    """What one fault did: seconds to the next step of another world (None: given up), and steps done again."""

    seconds: float | None
    steps_redone: int | None


def measure(launcher: Launcher, fault: Fault) -> Recovery:
    """One fault in one fresh job."""
    with running(launcher, fault.num_nodes) as job:
        before = job.steps()[-1]
        began_s = time.time()
        fault.act(job)

        def recovered() -> list[dict[str, float]]:
            news = [s for s in job.steps() if s["ts"] > began_s and s["pid"] != before["pid"]]
            return [s for s in news if not fault.pause or s["world_size"] > before["world_size"]]

        try:
            after = until("a step of another world", recovered, fault.given_up_s)[0]
        except AssertionError:
            return Recovery(None, None)
        last = max((s for s in job.steps() if s["ts"] < after["ts"] and s["pid"] == before["pid"]), key=_step)
        since_s = last["ts"] if fault.pause else began_s
        return Recovery(after["ts"] - since_s, int(last["step"] - after["step"] + 1))


def _step(line: dict[str, float]) -> float:
    return line["step"]


def row(name: str, fault: Fault, launcher: str, got: Sequence[Recovery], ours_s: float | None) -> str:
    """One line of the table; what was given up counts as longer than anything measured."""
    seconds = sorted(math.inf if r.seconds is None else r.seconds for r in got)
    shown = [f"{s:8.2f}" if s < math.inf else f"{'> ' + format(fault.given_up_s, '.0f'):>8}" for s in seconds]
    median_s = statistics.median_high(seconds)
    bound_s = min(median_s, fault.given_up_s)
    ratio = f"{'> ' if median_s == math.inf else ''}{bound_s / ours_s:.0f}x" if ours_s and launcher != OURS else ""
    redone = max((r.steps_redone for r in got if r.steps_redone is not None), default=None)
    told = "" if redone is None else str(redone)
    return f"{name:24}{launcher:18}{shown[len(shown) // 2]:>10}{shown[0]:>9}{shown[-1]:>9}{told:>14}{ratio:>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--out", type=Path, default=Path("out/bench-recovery.json"))
    args = parser.parse_args()
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{machine}; {args.repeats} times each")
    print(
        f"{'fault':24}{'launcher':18}{'median s':>10}{'min':>9}{'max':>9}{'steps redone':>14}{'ratio':>9}", flush=True
    )
    results = json.loads(args.out.read_text())["results"] if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as at, ends_with_its_family(Path(at)), etcd(Path(at)) as server:
        for name in args.faults:
            fault = FAULTS[name]
            got: dict[str, list[Recovery]] = {launcher: [] for launcher in fault.launchers}
            for _ in range(args.repeats):
                for launcher in launchers(fault.launchers, 60 if fault.num_nodes == 2 else 1, server.endpoint):
                    got[launcher.name].append(measure(launcher, fault))
            ours = [r.seconds for r in got[OURS]]
            ours_s = None if None in ours else statistics.median(s for s in ours if s is not None)
            for launcher_name, recoveries in got.items():
                print(row(name, fault, launcher_name, recoveries, ours_s), flush=True)
            results[name] = {launcher: [dataclasses.asdict(r) for r in rs] for launcher, rs in got.items()}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
