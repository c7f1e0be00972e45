"""`make bench-rendezvous`: how fast N nodes form a round, and form it again without a lost one; beside torch's c10d.

The handlers are those of N agents, on one real etcd (torch's: on one TCPStore), one thread each, spread evenly over
`--processes` processes on this machine. No worker is started.

* form: from the moment that all are told to start, with their connection to the store open, to the last one's return
  from `next_rendezvous`, which includes the worker store of the round, hosted by one and connected to by all;
* lost: one node's process, which holds nothing else, is frozen (it keeps its connections, and its lease ends) or
  killed (its kernel refuses new connections). To the last survivor's return from `next_rendezvous`. Not measured for
  torch's handlers: nothing tells them of a lost node (its agents learn it from a collective that fails).

Requests are what etcd counts as messages received (`grpc_server_msg_received_total`), without lease renewals, which
come with time and not with rounds. CPU is that of the N handlers together, user and system, divided by N.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.bench.far_register import SCHEME, far_kv
from tests.cluster import free_port
from tests.etcd import Server, client, etcd

SIZES = (8, 16, 32, 64, 128, 256, 512)
PEER_SIZES = (8, 16, 32, 64)
LEASE_TTL_S = 2.0
LARGE_LEASE_TTL_S = 5.0
LARGE = 512
"""From so many nodes on, those five seconds: renewals, four per lease and node, take their share of this machine."""
DEADLINE_S = 120.0

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed.elastic.rendezvous.registry", "launcher.elastic.rendezvous"])


# --- a process with some of the handlers


class Handlers:
    """The handlers of some nodes, each in a thread of its own, as on a node of its own."""

    def __init__(
        self, kind: str, endpoint: str, run_id: str, names: list[str], num_nodes: int, lease_ttl_s: float
    ) -> None:
        make = _ours if kind == "elastic-moe" else _torchs
        self._made = [make(endpoint, run_id, name, num_nodes, lease_ttl_s) for name in names]
        self._lock = threading.Lock()
        self._returned: list[float] = []
        self._again: list[float] = []
        self._errors: list[str] = []

    def start(self) -> None:
        for join, ended in self._made:
            threading.Thread(target=self._live, args=(join, ended), daemon=True).start()

    def _live(self, join: Callable[[], object], ended: Callable[[], bool]) -> None:
        try:
            join()
            self._note(self._returned)
            while not ended():
                pass
            join()
            self._note(self._again)
        except BaseException as error:
            with self._lock:
                self._errors.append(f"{type(error).__name__}: {error}")

    def _note(self, times: list[float]) -> None:
        with self._lock:
            times.append(time.monotonic())

    def told(self) -> dict[str, Any]:
        usage = os.times()
        with self._lock:
            return {
                "returned": list(self._returned),
                "again": list(self._again),
                "errors": list(self._errors),
                "cpu_s": usage.user + usage.system,
            }


def default_lease_ttl_s(num_nodes: int) -> float:
    """The TTL of the nodes' leases, where none is given."""
    return LARGE_LEASE_TTL_S if num_nodes >= LARGE else LEASE_TTL_S


def _ours(
    endpoint: str, run_id: str, name: str, num_nodes: int, lease_ttl_s: float
) -> tuple[Callable[[], object], Callable[[], bool]]:
    from launcher.coordination.member import Member
    from launcher.elastic.rendezvous import MemberRendezvous
    from launcher.health.liveness import LivenessListener
    from launcher.kv.connect import connect, looks_like_bucket
    from launcher.rounds.membership import Rules
    from launcher.rounds.records import Node, Status

    backend = "bucket" if looks_like_bucket(endpoint) else "etcd3"
    kv = far_kv(endpoint) if endpoint.startswith(SCHEME) else connect(backend, endpoint, timeout_s=60.0).kv
    kv.get("")
    bell = LivenessListener("127.0.0.1")
    bell.start()
    node = Node(name, name, "127.0.0.1", bell.port, slots=8)
    rules = Rules(min_nodes=num_nodes - 1, max_nodes=num_nodes, last_call_s=60.0)
    member = Member(kv, run_id, node, rules, lambda slots, mesh: None, lambda *a, **k: None, lease_ttl_s=lease_ttl_s)
    handler = MemberRendezvous(member, backend=backend, run_id=run_id, address="127.0.0.1", timeout_s=DEADLINE_S)
    started = threading.Event()

    def join() -> object:
        if not started.is_set():
            started.set()
            member.start()
        return handler.next_rendezvous()

    def ended() -> bool:
        if not handler.num_nodes_waiting():
            member.wait(1.0)
            return False
        member.announce(Status.STOPPING, reason="stops")  # as the agent does
        return True

    return join, ended


def _torchs(
    endpoint: str, run_id: str, name: str, num_nodes: int, _: float
) -> tuple[Callable[[], object], Callable[[], bool]]:
    import torch.distributed.elastic.rendezvous.registry as registry
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    is_host = name == "node-0"
    parameters = RendezvousParameters(
        "c10d", endpoint, run_id, num_nodes, num_nodes, local_addr="127.0.0.1", is_host=is_host, timeout=600
    )
    handler = registry.get_rendezvous_handler(parameters)
    return handler.next_rendezvous, lambda: bool(time.sleep(1.0))  # type: ignore[func-returns-value]


def serve(pipe: Connection) -> None:
    """A process with handlers: answers one command after another."""
    made: Handlers | None = None
    gc.freeze()  # as `elastic-moe run` does
    sys.setswitchinterval(0.1)  # hundreds of threads wait for the lock of one interpreter, and look for it that often
    while True:
        what, given = pipe.recv()
        if what == "make":
            made = Handlers(*given)
        assert made is not None
        if what == "start":
            made.start()
        pipe.send(made.told())


# --- the one who measures


class Process:
    """A process that `serve`s, forked from one that has imported torch."""

    def __init__(self) -> None:
        self._pipe, other = FORKS.Pipe()
        self.process = FORKS.Process(target=serve, args=(other,), daemon=True)
        self.process.start()

    def send(self, what: str, *given: Any) -> None:
        self._pipe.send((what, given))

    def hear(self) -> dict[str, Any]:
        answer: dict[str, Any] = self._pipe.recv()
        return answer

    def ask(self, what: str, *given: Any) -> dict[str, Any]:
        self.send(what, *given)
        return self.hear()

    def signal(self, signum: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)

    def end(self) -> None:
        self.process.kill()
        self.process.join(10)


@dataclasses.dataclass
class Measured:
    """Seconds; requests and CPU seconds per agent."""

    kind: str
    num_nodes: int
    loss: str
    lease_ttl_s: float
    form_s: float
    form_requests: float | None
    form_cpu_s: float
    reform_s: float | None = None
    reform_requests: float | None = None
    reform_cpu_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where nodes meet, and how many requests it has had, renewals apart where they can be told apart."""

    endpoint: str
    num_requests: Callable[[], float]


@contextlib.contextmanager
def spread(
    kind: str, endpoint: str, num_nodes: int, num_processes: int, lease_ttl_s: float
) -> Iterator[tuple[list[Process], Process]]:
    """Handlers of `num_nodes`, ready to start: those that stay, and the one that will be lost."""
    names = [f"node-{i}" for i in range(num_nodes)]
    processes = [Process() for _ in range(min(num_processes, num_nodes - 1) + 1)]
    try:
        run_id = uuid.uuid4().hex
        stay = processes[:-1]
        shares = [names[i : num_nodes - 1 : len(stay)] for i in range(len(stay))] + [names[-1:]]
        for process, share in zip(processes, shares, strict=True):  # in turn: torch's host must be there first
            process.ask("make", kind, endpoint, run_id, share, num_nodes, lease_ttl_s)
        yield stay, processes[-1]
    finally:
        for process in processes:
            process.end()


def gather(processes: list[Process], field: str, num: int) -> tuple[float, float]:
    """Wait until `num` handlers have noted a time; the last one, and the CPU seconds of these processes so far."""
    ends_s = time.monotonic() + DEADLINE_S
    while True:
        for process in processes:
            process.send("tell")
        told = [process.hear() for process in processes]
        if errors := [error for one in told for error in one["errors"]]:
            raise AssertionError(f"{len(errors)} handlers failed: {errors[0]}")
        times = [at for one in told for at in one[field]]
        if len(times) == num:
            return max(times), sum(one["cpu_s"] for one in told)
        if time.monotonic() > ends_s:
            raise AssertionError(f"{len(times)} of {num} handlers after {DEADLINE_S:g} s")
        time.sleep(0.25)


def requests_of(server: Server) -> float:
    """Messages that etcd has received but for renewals."""
    with urllib.request.urlopen(f"http://{server.endpoint}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    rows = re.findall(r"^grpc_server_msg_received_total\{(.*)\} (\S+)$", text, re.MULTILINE)
    return sum(float(value) for labels, value in rows if "LeaseKeepAlive" not in labels)


@contextlib.contextmanager
def on_etcd() -> Iterator[Place]:
    """A real one."""
    with tempfile.TemporaryDirectory() as folder, etcd(Path(folder)) as server:
        client(server.endpoint).close()
        yield Place(server.endpoint, lambda: requests_of(server))


def measure(kind: str, num_nodes: int, loss: str, num_processes: int, lease_ttl_s: float) -> Measured:
    """One life of a job, where its kind meets."""
    if kind != "elastic-moe":
        return live(kind, num_nodes, loss, num_processes, lease_ttl_s)
    with on_etcd() as place:
        return live(kind, num_nodes, loss, num_processes, lease_ttl_s, place)


def live(
    kind: str, num_nodes: int, loss: str, num_processes: int, lease_ttl_s: float, place: Place | None = None
) -> Measured:
    """One life of a job: it forms, loses a node, and forms again."""
    with contextlib.ExitStack() as stack:
        endpoint = place.endpoint if place else f"127.0.0.1:{free_port()}"
        stay, victim = stack.enter_context(spread(kind, endpoint, num_nodes, num_processes, lease_ttl_s))
        everyone = [*stay, victim]
        cpu_s = sum(process.ask("tell")["cpu_s"] for process in everyone)
        requests = place.num_requests() if place else 0.0
        began_s = time.monotonic()
        for process in everyone:
            process.send("start")
        for process in everyone:
            process.hear()
        formed_s, formed_cpu_s = gather(everyone, "returned", num_nodes)
        found = Measured(
            kind,
            num_nodes,
            loss,
            lease_ttl_s,
            formed_s - began_s,
            None,
            (formed_cpu_s - cpu_s) / num_nodes,
        )
        if place is None:
            return found
        now = place.num_requests()
        found.form_requests, requests = (now - requests) / num_nodes, now
        cpu_s = sum(process.ask("tell")["cpu_s"] for process in stay)
        victim.signal(signal.SIGSTOP if loss == "frozen" else signal.SIGKILL)
        lost_s = time.monotonic()
        again_s, again_cpu_s = gather(stay, "again", num_nodes - 1)
        found.reform_s = again_s - lost_s
        found.reform_requests = (place.num_requests() - requests) / (num_nodes - 1)
        found.reform_cpu_s = (again_cpu_s - cpu_s) / (num_nodes - 1)
        return found


def row(name: str, found: list[Measured]) -> str:
    def middle(values: list[float | None]) -> str:
        known = [v for v in values if v is not None]
        return f"{statistics.median(known):.2f}" if known else "-"

    def span(values: list[float]) -> str:
        return f"{min(values):.2f}-{max(values):.2f}"

    form = [m.form_s for m in found]
    cells = [
        middle(list(form)),
        span(form),
        middle([m.form_requests for m in found]),
        middle([m.form_cpu_s * 1000 for m in found]),
        middle([m.reform_s for m in found if m.loss == "frozen"]),
        middle([m.reform_s for m in found if m.loss == "killed"]),
        middle([m.reform_requests for m in found]),
    ]
    return f"{found[0].num_nodes:6}  {name:14}" + "".join(cell.rjust(12) for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--peer-sizes", type=int, nargs="*", default=list(PEER_SIZES))
    parser.add_argument("--repeats", type=int, default=4, help="odd ones lose a node by freezing, even ones by killing")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument(
        "--lease-ttl", type=float, help=f"seconds; default {LEASE_TTL_S:g}, from {LARGE} nodes on {LARGE_LEASE_TTL_S:g}"
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench-rendezvous.json"))
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, {args.processes} processes, torch {torch.__version__}; ", end="")
    print(f"lease {args.lease_ttl or f'{LEASE_TTL_S:g} s, from {LARGE} nodes on {LARGE_LEASE_TTL_S:g}'} s")
    print(" " * 24 + "form s".rjust(10) + "min-max".rjust(12) + "requests".rjust(12) + "cpu ms".rjust(12), end="")
    print("frozen s".rjust(12) + "killed s".rjust(12) + "requests".rjust(12), flush=True)
    results: list[Measured] = []
    for num_nodes in args.sizes:
        ttl_s = args.lease_ttl or default_lease_ttl_s(num_nodes)
        kinds = ["elastic-moe", *(["torch c10d"] if num_nodes in args.peer_sizes else [])]
        found: dict[str, list[Measured]] = {kind: [] for kind in kinds}
        for repeat in range(args.repeats):
            for kind in kinds:
                found[kind].append(measure(kind, num_nodes, ("frozen", "killed")[repeat % 2], args.processes, ttl_s))
        for kind, measured in found.items():
            print(row(kind, measured), flush=True)
            results += measured
        if len(kinds) == 2:
            ours, peers = (statistics.median(m.form_s for m in found[kind]) for kind in kinds)
            print(f"{'':24}torch c10d takes {peers / ours:.1f} x as long", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    args.out.write_text(json.dumps({**machine, "results": [dataclasses.asdict(m) for m in results]}, indent=1))


if __name__ == "__main__":
    main()
