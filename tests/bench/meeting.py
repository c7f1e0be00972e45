"""`make bench-meeting`: nodes that meet without a server, in a folder and on an S3 server some way off.

* form, lost: handlers of N nodes, as in `tests.bench.rendezvous`, with leases of 4 s;
* recover: a job of three nodes of one worker each (an all-reduce and 20 ms of sleep a step), of which one is killed or
  frozen, the first or the last, or to which a third one comes; from the fault to the survivors' next step (of one that
  comes: the longest pause of the others);
* idle: what three nodes that train ask in a while, and what that costs on S3.

`s3` is moto behind a proxy that passes each request on `--latency-ms` later and counts; it answers one request after
the other, each at 1 ms of CPU time. `seaweedfs` is a real gateway behind that proxy. `far` is a folder that is asked as
S3 is, each request as much later, at no CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from tests.bench.delay_proxy import Counts, DelayProxy
from tests.bench.far_register import SCHEME
from tests.bench.recovery import Job, Launcher
from tests.bench.rendezvous import Measured, Place, live
from tests.cluster import until
from tests.s3 import S3Server, moto_server, seaweedfs_gateway

LATENCY_MS = 20.0
LEASE_TTL_S = 4.0
START_S, DEADLINE_S = 120.0, 60.0
PUT_DOLLARS, GET_DOLLARS = 5.0e-6, 0.4e-6
"""Of S3 Standard in us-east-1, in November 2026: PUT and LIST, GET; DELETE is free."""
MONTH_S = 30 * 24 * 3600.0


@dataclasses.dataclass(frozen=True)
class Meeting:
    """A place of one kind: a fresh endpoint for each job."""

    name: str
    endpoint: Callable[[], str]
    counts: Callable[[], Counts | None]

    def place(self) -> Place:
        """For one job's handlers."""

        endpoint = self.endpoint()

        def num_requests() -> float:
            if endpoint.startswith(SCHEME):
                counter = Path(endpoint.split(":", 2)[2] + ".requests")
                return float(counter.stat().st_size) if counter.exists() else 0.0
            counts = self.counts()
            return float(counts.num_requests) if counts else 0.0

        return Place(endpoint, num_requests)


@contextlib.contextmanager
def meetings(names: list[str], folder: Path, latency_s: float) -> Iterator[list[Meeting]]:
    """The places of these names, of which all but a folder are so far away."""
    with contextlib.ExitStack() as stack:
        made = []
        for name in names:
            if name == "folder":
                made.append(Meeting(name, lambda: str(folder / uuid.uuid4().hex), lambda: None))
                continue
            if name == "far":
                made.append(Meeting(name, lambda: f"{SCHEME}{latency_s}:{folder / uuid.uuid4().hex}", lambda: None))
                continue
            made_by = seaweedfs_gateway() if name == "seaweedfs" else moto_server(folder)
            server: S3Server = stack.enter_context(made_by)
            os.environ.update(server.environment)
            proxy = stack.enter_context(DelayProxy(server.endpoint_url, latency_s))
            far = dataclasses.replace(server, endpoint_url=proxy.endpoint_url)
            made.append(Meeting(name, lambda far=far: far.url(uuid.uuid4().hex), proxy.counts))  # type: ignore[misc]
        yield made


# --- a job of three


def launcher(meeting: Meeting, nnodes: str, last_call_s: float) -> Launcher:
    endpoint = meeting.endpoint()
    options = ("--nnodes", nnodes, "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", "bench")
    conf = ("--rdzv-endpoint", endpoint, "--rdzv-conf", f"last_call={last_call_s},join_cooldown=1")
    return Launcher(meeting.name, (sys.executable, "-m", "elastic_moe", "run", *options, *conf), endpoint)


@contextlib.contextmanager
def training(meeting: Meeting, num_nodes: int, nnodes: str, last_call_s: float = 60.0) -> Iterator[Job]:
    """A job that has done ten steps on all of its nodes; they are started in order."""
    with tempfile.TemporaryDirectory() as folder:
        job, log = Job(launcher(meeting, nnodes, last_call_s), Path(folder)), Path(folder, "node-0.log")
        try:
            for index in range(num_nodes):
                job.start_node()
                if index == 0:  # the oldest leads
                    until("the first node has joined", lambda: "node_joined" in log.read_text() or job.ended(), START_S)
            until("ten steps of all", lambda: job.steps(num_nodes)[10:] or job.ended(), START_S)
            assert not job.ended(), job.last_words()
            yield job
        finally:
            job.end()


def kill(job: Job, index: int) -> None:
    tree = job.tree(index)
    for act in (psutil.Process.suspend, psutil.Process.kill):
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                act(process)


def freeze(job: Job, index: int) -> None:
    for process in job.tree(index):
        process.suspend()


def recover(meeting: Meeting, num_nodes: int, fault: Callable[[Job, int], None], index: int) -> float:
    """Seconds from the fault to a step of the others."""
    with training(meeting, num_nodes, f"1:{num_nodes}") as job:
        began_s = time.time()
        fault(job, index)
        smaller = num_nodes - 1
        after = until("a step of those left", lambda: [s for s in job.steps(smaller) if s["ts"] > began_s], DEADLINE_S)
        return after[0]["ts"] - began_s


def join(meeting: Meeting) -> tuple[float, int]:
    """The longest pause of two nodes' steps when a third one comes, and the steps that are done again."""
    with training(meeting, 2, "2:3", 4.0) as job:
        job.start_node()
        until("a step of three", lambda: job.steps(3)[3:], DEADLINE_S)
        steps = job.steps()
        pauses = [later["ts"] - earlier["ts"] for earlier, later in itertools.pairwise(steps[10:])]
        numbers = [int(step["step"]) for step in steps]
        return max(pauses), len(numbers) - len(set(numbers))


def idle(meeting: Meeting, seconds: float) -> tuple[float, float]:
    """Requests per node and second that are charged as PUT and as GET, of three nodes that train."""
    with training(meeting, 3, "1:3"):
        time.sleep(10.0)  # what follows from the start is over
        before = meeting.counts()
        assert before is not None
        time.sleep(seconds)
        after = meeting.counts()
        assert after is not None
        num_by_method = after.since(before).num_by_method
        assert set(num_by_method) <= {"GET", "PUT", "DELETE"}, num_by_method
        return num_by_method.get("PUT", 0) / seconds / 3, num_by_method.get("GET", 0) / seconds / 3


def dollars(puts: float, gets: float, num_nodes: int) -> float:
    """What so many nodes' requests per second cost a month."""
    return (puts * PUT_DOLLARS + gets * GET_DOLLARS) * num_nodes * MONTH_S


# --- tables


def span(values: list[float]) -> str:
    return f"{statistics.median(values):8.2f} ({min(values):.2f}-{max(values):.2f})"


def print_forming(meeting: Meeting, sizes: list[int], repeats: int, num_processes: int) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for num_nodes in sizes:
        found = list[Measured]()
        for i in range(repeats):
            loss = ("frozen", "killed")[i % 2]
            found.append(live("elastic-moe", num_nodes, loss, num_processes, LEASE_TTL_S, meeting.place()))
            print(f"{meeting.name:8} {num_nodes:9} nodes {found[-1].form_s:8.2f} s, {loss}", flush=True)
        asked = statistics.median(m.form_requests or 0.0 for m in found)
        print(
            f"{meeting.name:8} form {num_nodes:4} nodes {span([m.form_s for m in found])} s, {asked:.0f} requests/node"
        )
        for loss in ("frozen", "killed"):
            if lost := [m.reform_s for m in found if m.loss == loss and m.reform_s is not None]:
                print(f"{meeting.name:8} {loss} of {num_nodes:3} nodes {span(lost)} s", flush=True)
        results += [dataclasses.asdict(m) for m in found]
    return results


def print_recovering(meeting: Meeting, repeats: int) -> dict[str, list[float]]:
    cases: dict[str, Callable[[], float]] = {
        "first of 3 killed": lambda: recover(meeting, 3, kill, 0),
        "last of 3 killed": lambda: recover(meeting, 3, kill, 2),
        "first of 2 killed": lambda: recover(meeting, 2, kill, 0),
        "last of 2 killed": lambda: recover(meeting, 2, kill, 1),
        "first of 3 frozen": lambda: recover(meeting, 3, freeze, 0),
        "last of 3 frozen": lambda: recover(meeting, 3, freeze, 2),
    }
    found: dict[str, list[float]] = {}
    for name, case in cases.items():
        found[name] = [case() for _ in range(repeats)]
        print(f"{meeting.name:8} {name:18} {span(found[name])} s", flush=True)
    joins = [join(meeting) for _ in range(repeats)]
    found["third joins"] = [pause_s for pause_s, _ in joins]
    again = max(num for _, num in joins)
    print(f"{meeting.name:8} third joins        {span(found['third joins'])} s, {again} steps done again", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", nargs="*", default=["folder", "s3"], choices=["folder", "far", "s3", "seaweedfs"])
    parser.add_argument("--parts", nargs="*", default=["form", "recover", "idle"], choices=["form", "recover", "idle"])
    parser.add_argument("--sizes", type=int, nargs="*", default=[8, 32, 64])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--idle-s", type=float, default=60.0)
    parser.add_argument(
        "--latency-ms", type=float, default=LATENCY_MS, help="of each request but a folder's; default %(default)g"
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench-meeting.json"))
    args = parser.parse_args()
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{machine}; {args.repeats} times each; s3, far: {args.latency_ms:g} ms a request", flush=True)
    results: dict[str, object] = {"machine": machine}
    with tempfile.TemporaryDirectory() as folder, meetings(args.places, Path(folder), args.latency_ms / 1000) as places:
        for meeting in places:
            if "form" in args.parts:
                results[f"form {meeting.name}"] = print_forming(meeting, args.sizes, args.repeats, args.processes)
            if "recover" in args.parts and meeting.name != "far":
                results[f"recover {meeting.name}"] = print_recovering(meeting, args.repeats)
            if "idle" in args.parts and meeting.name in ("s3", "seaweedfs"):
                puts, gets = idle(meeting, args.idle_s)
                print(f"{meeting.name:8} idle: {puts:.2f} PUT and {gets:.2f} GET per node and second", flush=True)
                costs = {num_nodes: dollars(puts, gets, num_nodes) for num_nodes in (8, 64, 256)}
                print(", ".join(f"{n} nodes: {cost:,.0f} dollars a month" for n, cost in costs.items()), flush=True)
                results["idle"] = {"puts": puts, "gets": gets, "dollars": costs}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
