"""`make bench-restore`: a state out of its node's memory, out of another node's, and out of S3, in one run.

Two ranks stand for two nodes of this machine, each with a checkpoint service of its own, and have saved a state of
`--mib` in all, in rows, to an S3 gateway. Each node's memory then holds its own part and its buddy's. The ranks restore
it `--repeats` times each way, in one order and in the opposite one by turns:

own memory      each from its node's
a join          the second rank's node has just come, and has nothing: all that it needs is in the first one's memory
S3              without a service

`link` is what one connection of the loopback interface carries from one process to another, of the same number of
bytes as the rank that joins needs; `allowed` is twice that and 0.5 s. Of the slower rank it is told where the time
went, see the event `restored`, and the rank's seconds of processor (`cpu`). It ends with what it has started, on
Ctrl-C and SIGTERM too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from storage import Checkpointer, JobIdentity, open_store
from storage.agent import AgentEnvironment
from storage.service import starting
from storage.service.held_messages import AskCard
from storage.service.local_memory import ServiceMemory
from storage.service.ways import ServiceAt
from tests.cluster import until
from tests.ranks import Ranks
from tests.s3 import juicefs_gateway

MIB = 1024 * 1024
NUM_TENSORS = 16
WORLD_SIZE = 2
TIMEOUT_S = 600.0
OWN, JOIN, S3 = "own memory", "a join", "S3"
WAYS = (OWN, S3, JOIN)
PHASES = ("ask", "choose", "fit", "read", "load", "cpu")
TIMES_S3, OVER_LINK, OVER_S = 5.0, 2.0, 0.5
QUICK = 3
"""Repeats that take two minutes."""


def local_of(mib: int, number: int, tensor: int) -> torch.Tensor:
    """This rank's rows of tensor number `tensor` of state `number`."""
    rows = mib * MIB // NUM_TENSORS // 4096 // WORLD_SIZE
    first = float(10 * (number + tensor) + torch.distributed.get_rank())
    return torch.arange(rows * 1024, dtype=torch.float32).view(rows, 1024).add_(first)


def state_of(mib: int, number: int) -> dict[str, Any]:
    """`NUM_TENSORS` tensors in rows over the ranks."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    return {f"w{k}": DTensor.from_local(local_of(mib, number, k), mesh, [Shard(0)]) for k in range(NUM_TENSORS)}


def at(nodes: Sequence[Path], environment: dict[str, str]) -> None:
    """Be on the node of this rank's number."""
    rank = torch.distributed.get_rank()
    os.environ.update(environment)
    os.environ[AgentEnvironment.variable("service")] = str(nodes[rank])
    os.environ[AgentEnvironment.variable("node")] = nodes[rank].parent.name


def save(url: str, nodes: Sequence[Path], environment: dict[str, str], mib: int) -> None:
    """Save, and wait until each node holds a copy of the other's part."""
    at(nodes, environment)
    with Checkpointer(url, job=JobIdentity(lineage="bench", generation=1)) as checkpointer:
        checkpointer.save(1, state_of(mib, 1), wait=True)
    told = AgentEnvironment.from_env(os.environ)
    with open_store(url) as store:
        run = store.url
    with contextlib.closing(ServiceMemory(ServiceAt(Path(told.service)), AskCard(node=told.node))) as memory:
        until("the copy", lambda: len(memory.labels(run)) == WORLD_SIZE)
    torch.distributed.barrier()


def restore(
    url: str, nodes: Sequence[Path], environment: dict[str, str], mib: int, generation: int, uses_memory: bool
) -> tuple[float, dict[str, Any], bool]:
    """Seconds of the call, what was told of it, and whether it is the state that was saved."""
    at(nodes, environment)
    told: dict[str, Any] = {}
    state = state_of(mib, 2)
    job = JobIdentity(lineage="bench", generation=generation)
    service = None if uses_memory else False
    with Checkpointer(
        url, job=job, service=service, on_event=lambda event, fields: told.update({str(event): fields})
    ) as c:
        torch.distributed.barrier()
        began_s, cpu_s = time.perf_counter(), time.process_time()
        c.restore(state)
        seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    same = all(torch.equal(state[f"w{k}"].to_local(), local_of(mib, 1, k)) for k in range(NUM_TENSORS))
    told["restored"]["phases"]["cpu"] = round(cpu_s, 3)
    return seconds, told["restored"], same


def link_s(num_bytes: int) -> float:
    """Seconds for so many bytes over one connection of the loopback interface, from one process to another."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = os.fork()
        if child == 0:
            connection = socket.create_connection(listener.getsockname())
            data = memoryview(bytearray(4 * MIB))
            for _ in range(num_bytes // data.nbytes):
                connection.sendall(data)
            os._exit(0)
        connection, _ = listener.accept()
        with connection:
            began_s, buffer, left = (
                time.perf_counter(),
                memoryview(bytearray(4 * MIB)),
                num_bytes // (4 * MIB) * 4 * MIB,
            )
            while left:
                left -= connection.recv_into(buffer[: min(left, buffer.nbytes)])
            seconds = time.perf_counter() - began_s
        os.waitpid(child, 0)
    return seconds


@contextlib.contextmanager
def service(path: Path) -> Iterator[None]:
    """A node's service, as its agent starts it; it ends with this process, too."""
    command = ["setpriv", "--pdeathsig", "KILL", *starting.command_line(path), "--linger", str(TIMEOUT_S)]
    keeper = subprocess.Popen(command, env=starting.environment(os.environ))
    try:
        yield
    finally:
        keeper.kill()
        keeper.wait(60)


class Bench:
    """What was found: by way the seconds of each repeat, of the slower rank, and its phases."""

    def __init__(self, mib: int) -> None:
        self.mib = mib
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS} | {"link": []}
        self.phases: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}

    def run(self, repeats: int, folder: Path) -> None:
        """Save, and restore in all ways."""
        ranks, generation = Ranks(), 1
        with contextlib.ExitStack() as stack:
            stack.callback(ranks.close)
            server = stack.enter_context(juicefs_gateway(folder))
            os.environ.update(server.environment)
            url, environment = server.url("restore"), dict(server.environment)
            nodes = [folder / f"n{number}" / "service.sock" for number in range(WORLD_SIZE)]
            for node in nodes:
                stack.enter_context(service(node))
            ranks.run(save, url, nodes, environment, self.mib, world_size=WORLD_SIZE, timeout_s=TIMEOUT_S)
            for repeat in range(repeats):
                for way in WAYS if repeat % 2 == 0 else WAYS[::-1]:
                    generation += 1
                    fresh = folder / f"n{generation + WORLD_SIZE}" / "service.sock"
                    where = [nodes[0], fresh] if way == JOIN else nodes
                    with service(fresh) if way == JOIN else contextlib.nullcontext():
                        asked = (url, where, environment, self.mib, generation, way != S3)
                        told = ranks.run(restore, *asked, world_size=WORLD_SIZE, timeout_s=TIMEOUT_S)
                    self._note(way, told)
                self.seconds["link"].append(link_s(self.mib * MIB // WORLD_SIZE))

    def _note(self, way: str, told: Sequence[tuple[float, dict[str, Any], bool]]) -> None:
        assert all(same for _, _, same in told), way
        seconds, fields, _ = max(told, key=lambda row: row[0])
        self.seconds[way].append(seconds)
        self.phases[way].append(fields["phases"])
        where = {name: num // MIB for name, num in fields.items() if name.startswith("from_")}
        print(f"{way}: {seconds:.3f} s {fields['phases']} MiB {where}", file=sys.stderr, flush=True)

    def table(self) -> str:
        """The medians, and whether they are within the bars."""
        median = {name: statistics.median(values) for name, values in self.seconds.items()}
        lines = [
            f"| from | s (min to max) | MB/s | times S3 | {' | '.join(PHASES)} |",
            "|---" * (4 + len(PHASES)) + "|",
        ]
        for way in WAYS:
            parts = [statistics.median(row.get(name, 0.0) for row in self.phases[way]) for name in PHASES]
            span = f"{median[way]:.2f} ({min(self.seconds[way]):.2f} to {max(self.seconds[way]):.2f})"
            rate, times = self.mib * MIB / median[way] / 1e6, median[S3] / median[way]
            lines.append(f"| {way} | {span} | {rate:.0f} | {times:.1f}x | {' | '.join(f'{s:.3f}' for s in parts)} |")
        times, allowed_s = median[S3] / median[OWN], OVER_LINK * median["link"] + OVER_S
        lines += ["", f"own memory {times:.1f}x S3, wanted {TIMES_S3:g}x: {_verdict(times >= TIMES_S3)}"]
        lines += [
            f"a join {median[JOIN]:.2f} s, link {median['link']:.2f} s, allowed {allowed_s:.2f} s:"
            f" {_verdict(median[JOIN] <= allowed_s)}"
        ]
        return "\n".join(lines)


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def _is_gone(folder: str) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not Path(folder).exists()


def shared_memory() -> Path | None:
    """Where files lie in memory, if there is such a place."""
    return Path("/dev/shm") if Path("/dev/shm").is_dir() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the state (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} repeats, about two minutes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of all that ends what was started
    bench = Bench(options.mib)
    with tempfile.TemporaryDirectory(dir=shared_memory(), ignore_cleanup_errors=True) as folder:
        bench.run(QUICK if options.quick else options.repeats, Path(folder))
    until("nobody writes there any more", lambda: _is_gone(folder))
    if options.json:
        print(
            json.dumps({"mib": options.mib, "cores": os.cpu_count(), "seconds": bench.seconds, "phases": bench.phases})
        )
        return 0
    print(f"{options.mib} MiB, {WORLD_SIZE} ranks, {os.cpu_count()} cores, torch {torch.__version__}")
    print(bench.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
