"""`make bench-restore`: a state out of its node's memory, out of another node's, and out of S3, in one run.

Two ranks stand for two nodes of this machine, each with a checkpoint service of its own, and have saved a state of
`--mib` in all, in rows, to an S3 gateway. Each node's memory then holds its own part and its buddy's. The ranks restore
it `--repeats` times each way:

own memory      each from its node's
a join          the second rank's node has just come, and has nothing: all that it needs is in the first one's memory
S3              without a service

`link` is what one connection of the loopback interface carries from one process to another, of the same number of
bytes as the rank that joins needs; `allowed` is twice that and 0.5 s.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from storage import Checkpointer, JobIdentity
from storage.agent import AgentEnvironment
from storage.service.held_messages import AskCard
from storage.service.local_memory import ServiceMemory
from storage.service.ways import ServiceAt
from tests.ranks import Ranks
from tests.s3 import juicefs_gateway
from tests.storage.service_cases import process, until

MIB = 1024 * 1024
NUM_TENSORS = 16
WORLD_SIZE = 2
TIMEOUT_S = 600.0
OWN, JOIN, S3 = "own memory", "a join", "S3"
WAYS = (OWN, S3, JOIN)


def state_of(mib: int, number: int) -> dict[str, Any]:
    """`NUM_TENSORS` tensors in rows over the ranks."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    rows = mib * MIB // NUM_TENSORS // 4096
    generator = torch.Generator().manual_seed(number)
    whole = [torch.rand(rows, 1024, generator=generator) for _ in range(NUM_TENSORS)]
    return {f"w{k}": distribute_tensor(tensor, mesh, [Shard(0)]) for k, tensor in enumerate(whole)}


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
    with contextlib.closing(ServiceMemory(ServiceAt(Path(told.service)), AskCard(node=told.node))) as memory:
        until("the copy", lambda: len(memory.labels(_run_of(url))) == WORLD_SIZE)
    torch.distributed.barrier()


def _run_of(url: str) -> str:
    from storage import open_store

    with open_store(url) as store:
        return store.url


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
        began_s = time.perf_counter()
        c.restore(state)
        seconds = time.perf_counter() - began_s
    expected = state_of(mib, 1)
    same = all(torch.equal(state[name].to_local(), tensor.to_local()) for name, tensor in expected.items())
    return seconds, told["restored"], same


def link_s(num_bytes: int) -> float:
    """Seconds for so many bytes over one connection of the loopback interface, between two threads of two processes."""
    listener = socket.create_server(("127.0.0.1", 0))
    child = os.fork()
    if child == 0:
        connection = socket.create_connection(listener.getsockname())
        data = memoryview(bytearray(4 * MIB))
        for _ in range(num_bytes // data.nbytes):
            connection.sendall(data)
        os._exit(0)
    connection, _ = listener.accept()
    began_s, buffer, left = time.perf_counter(), memoryview(bytearray(4 * MIB)), num_bytes // (4 * MIB) * 4 * MIB
    while left:
        left -= connection.recv_into(buffer[: min(left, buffer.nbytes)])
    seconds = time.perf_counter() - began_s
    os.waitpid(child, 0)
    connection.close()
    listener.close()
    return seconds


def run(mib: int, repeats: int, folder: Path) -> dict[str, Any]:
    """By way the seconds of each repeat, of the slower rank."""
    found: dict[str, Any] = {way: [] for way in WAYS} | {"link": []}
    ranks = Ranks()
    with contextlib.ExitStack() as stack:
        stack.callback(ranks.close)
        server = stack.enter_context(juicefs_gateway(folder))
        os.environ.update(server.environment)
        url = server.url("restore")
        nodes = [folder / f"n{number}" / "service.sock" for number in range(2 + repeats)]
        for node in nodes:
            stack.enter_context(process(node, "--linger", "600"))
        environment = dict(server.environment)
        ranks.run(save, url, nodes[:2], environment, mib, world_size=WORLD_SIZE, timeout_s=TIMEOUT_S)
        for generation, (way, repeat) in enumerate(itertools.product(WAYS, range(repeats)), 2):
            where = [nodes[0], nodes[2 + repeat]] if way == JOIN else nodes[:2]  # who joins has not been there before
            asked = (url, where, environment, mib, generation, way != S3)
            told = ranks.run(restore, *asked, world_size=WORLD_SIZE, timeout_s=TIMEOUT_S)
            assert all(same for _, _, same in told), way
            found[way].append(max(seconds for seconds, _, _ in told))
            print(way, [(round(seconds, 3), fields) for seconds, fields, _ in told], file=sys.stderr)
            found["link"].append(link_s(mib * MIB // WORLD_SIZE))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the state (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        found = run(options.mib, options.repeats, Path(folder))
    median = {name: statistics.median(values) for name, values in found.items()}
    if options.json:
        print(json.dumps({"mib": options.mib, "cores": os.cpu_count(), "seconds": found}))
        return 0
    print(f"{options.mib} MiB, {WORLD_SIZE} ranks, {os.cpu_count()} cores, torch {torch.__version__}")
    print("| from | s | MB/s | times S3 |\n|---|---|---|---|")
    for way in WAYS:
        rate, times = options.mib * MIB / median[way] / 1e6, median[S3] / median[way]
        print(f"| {way} | {median[way]:.2f} | {rate:.0f} | {times:.1f}x |")
    print(f"\nlink {median['link']:.2f} s, allowed {2 * median['link'] + 0.5:.2f} s for a join")
    return 0


if __name__ == "__main__":
    sys.exit(main())
