"""`make bench-storage`: saves to an S3 gateway and loads from it, ours and others' in turn.

Clients: `dcp.save/load` with this package's writer and reader (a save once more without the SHA-256 of each body, which
is how it is over TLS, and how s3torchconnector sends always); with torch's `FsspecWriter/Reader` on s3fs; with
s3torchconnector's; and raw parallel ranged GETs that look at nothing, by the fastest client of `raw_reads`, which is
found out first. The server is a real one (`juicefs gateway`) whose objects lie in memory where there is /dev/shm. Ranks
are processes of gloo, a pool of them for each client. Every row is measured without and with a latency that a proxy
adds to each request. A first pass of each client in each row is not timed: it goes through the proxy, which counts
requests and bytes, and what it loads is compared with what was saved. Then all clients run in turn, `--repeats` times,
but none of them longer than `--budget-s` for a row (two times at least). Prints a table, and writes JSON beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from storage import open_store
from tests.bench import raw_reads, storage_ranks
from tests.bench.delay_proxy import Counts, DelayProxy
from tests.bench.storage_ranks import CONNECTOR, FSSPEC, LAYOUTS, OURS, RAW, UNSIGNED, Measured, Task
from tests.ranks import Ranks
from tests.s3 import S3Server, juicefs_gateway

MIB = 1024 * 1024
TENSOR_MIB = 16
TIMEOUT_S = 600.0
STOCK = "stock"  # the folder of what FsspecWriter wrote, which s3torchconnector reads as well
# row -> saved as, loaded as; None: it is the save that is measured
ROWS: dict[str, tuple[str, str | None]] = {
    **{f"save {name}": (name, None) for name in ("1", "2", "4")},
    "load 1": ("1", "1"),
    "load 2": ("2", "2"),
    "load 4": ("4", "4"),
    "load 2->4": ("2", "4"),
    "load 4->3": ("4", "3"),
    "load HSDP 2x2": ("HSDP 2x2", "HSDP 2x2"),
}


@dataclass
class Cell:
    """One client in one row, at one latency."""

    row: str
    latency_ms: float
    client: str
    counts: Counts | None = None
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    server_cpu_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def add(self, by_rank: Sequence[Measured], server_cpu_s: float) -> None:
        """One more run."""
        self.seconds.append(max(measured.seconds for measured in by_rank))
        self.cpu_s.append(sum(measured.cpu_s for measured in by_rank))
        self.server_cpu_s.append(server_cpu_s)
        self.peak_bytes = max(self.peak_bytes, *(measured.peak_bytes for measured in by_rank))

    @property
    def median_s(self) -> float:
        """Of the slowest rank of each run."""
        return statistics.median(self.seconds)


class Bench:
    """The gateway, its proxies, and the ranks of each client."""

    def __init__(self, server: S3Server, args: argparse.Namespace, proxies: dict[float, DelayProxy]) -> None:
        self._server = server
        self._args = args
        self._proxies = proxies
        self._pools: dict[str, Ranks] = {}
        self._gateway = _gateway()
        self._raw = ""
        self._num_saves = 0
        self._counts: dict[tuple[str, str], Counts] = {}
        self._num_tensors = args.size_mib // TENSOR_MIB
        self.cells: list[Cell] = []

    @property
    def state_bytes(self) -> int:
        """Of the whole state, each byte once."""
        return self._num_tensors * storage_ranks.COLUMNS * (storage_ranks.ROWS + 1) * 4

    def close(self) -> None:
        """End all ranks."""
        for pool in self._pools.values():
            pool.close()

    def run(self, rows: Sequence[str]) -> None:
        """Measure those rows."""
        for saved in dict.fromkeys(ROWS[row][0] for row in rows):
            of_saved = [row for row in rows if ROWS[row][0] == saved]
            for row in of_saved:
                if ROWS[row][1] is None:
                    for latency_ms in self._args.latency_ms:
                        self._measure_saves(row, saved, latency_ms)
            if not any(ROWS[row][1] for row in of_saved):
                continue
            peers = {FSSPEC, CONNECTOR} & {*self._args.clients}
            for client, folder in ((OURS, OURS), (FSSPEC, STOCK))[: 2 if peers else 1]:
                task = Task(client, self._server.endpoint_url, folder, saved, self._num_tensors)
                self._on_ranks(storage_ranks.save, task)
            for row in of_saved:
                if (loaded := ROWS[row][1]) is not None:
                    for latency_ms in self._args.latency_ms:
                        self._measure_loads(row, loaded, latency_ms)
            for folder in (OURS, STOCK):
                self._remove(folder)

    def choose_raw(self) -> dict[str, float]:
        """Find the fastest of the raw clients, on one rank; MiB/s of each."""
        task = Task(OURS, self._server.endpoint_url, OURS, "1", self._num_tensors)
        self._on_ranks(storage_ranks.save, task)
        rates = {}
        for name in raw_reads.CLIENTS:
            raw = dataclasses.replace(task, client=name, objects=self._objects(OURS))
            seconds = [self._on_ranks(storage_ranks.load, raw)[0][0].seconds for _ in range(4)][1:]
            rates[f"{name} MiB/s"] = self.state_bytes / MIB / min(seconds)
        self._raw = max(rates, key=lambda name: rates[name]).removesuffix(" MiB/s")
        self._proxied_raw(dataclasses.replace(task, client=self._raw, objects=self._objects(OURS)), rates)
        self._remove(OURS)
        return rates

    def _proxied_raw(self, task: Task, rates: dict[str, float]) -> None:
        """What the way through the proxy costs by itself."""
        proxied = dataclasses.replace(task, endpoint_url=self._proxies[0.0].endpoint_url)
        before_s = self._proxies[0.0].cpu_s()
        seconds = [self._on_ranks(storage_ranks.load, proxied)[0][0].seconds for _ in range(3)]
        rates[f"{task.client} through the proxy, MiB/s"] = self.state_bytes / MIB / min(seconds)
        gib = 3 * self.state_bytes / MIB / 1024
        rates["proxy CPU s/GiB"] = (self._proxies[0.0].cpu_s() - before_s) / gib

    def _measure_saves(self, row: str, layout: str, latency_ms: float) -> None:
        def task(client: str, endpoint_url: str) -> Task:
            self._num_saves += 1
            return Task(client, endpoint_url, f"save-{self._num_saves}", layout, self._num_tensors)

        self._measure(row, latency_ms, (OURS, UNSIGNED, FSSPEC, CONNECTOR), storage_ranks.save, task)

    def _measure_loads(self, row: str, layout: str, latency_ms: float) -> None:
        def task(client: str, endpoint_url: str) -> Task:
            folder = OURS if client in (OURS, RAW) else STOCK
            objects = self._objects(OURS) if client == RAW else ()
            name = self._raw if client == RAW else client
            return Task(name, endpoint_url, folder, layout, self._num_tensors, objects, check=True)

        self._measure(row, latency_ms, (OURS, FSSPEC, CONNECTOR, RAW), storage_ranks.load, task)

    def _measure(
        self,
        row: str,
        latency_ms: float,
        clients: Sequence[str],
        function: Callable[[Task], Measured],
        task: Callable[[str, str], Task],
    ) -> None:
        proxy = self._proxies[latency_ms]
        endpoint_url = proxy.endpoint_url if latency_ms else self._server.endpoint_url
        cells = [Cell(row, latency_ms, client) for client in clients if client in self._args.clients]
        for cell in cells:
            if (row, cell.client) not in self._counts:
                self._counts[row, cell.client] = self._count(
                    row, function, task(cell.client, proxy.endpoint_url), proxy
                )
            cell.counts = self._counts[row, cell.client]
        for number in range(self._args.repeats):
            for cell in cells:
                if number >= 2 and sum(cell.seconds) * (1 + 1 / number) > self._args.budget_s:
                    continue
                timed = dataclasses.replace(task(cell.client, endpoint_url), check=False)
                cell.add(*self._on_ranks(function, timed))
                self._remove_saved(timed)
        for cell in cells:
            print(row_of(cell, cells, self.state_bytes), flush=True)
        self.cells += cells

    def _count(self, row: str, function: Callable[[Task], Measured], task: Task, proxy: DelayProxy) -> Counts:
        """What the task sends and receives; it must do its work well, too."""
        before = proxy.counts()
        by_rank, _ = self._on_ranks(function, task)
        assert all(measured.is_right for measured in by_rank), f"{task.client} loaded something else in {row}"
        counts = proxy.counts().since(before)
        self._remove_saved(task)
        return counts

    def _on_ranks(self, function: Callable[[Task], Measured], task: Task) -> tuple[list[Measured], float]:
        """By rank; and the CPU seconds of the gateway meanwhile."""
        client = {UNSIGNED: OURS, **dict.fromkeys(raw_reads.CLIENTS, RAW)}.get(task.client, task.client)
        world_size = LAYOUTS[task.layout].world_size
        if client not in self._pools:
            self._pools[client] = Ranks()
            self._pools[client].run(storage_ranks.prepare, self._server.environment, world_size=4)
        before_s = _cpu_s(self._gateway)
        by_rank = self._pools[client].run(function, task, world_size=world_size, timeout_s=TIMEOUT_S)
        return by_rank, _cpu_s(self._gateway) - before_s

    def _objects(self, folder: str) -> tuple[tuple[str, int], ...]:
        store = open_store(self._server.url(folder))
        return tuple(
            (f"{folder}/{info.key}", info.size_bytes) for info in store.list("") if info.key.endswith(".distcp")
        )

    def _remove_saved(self, task: Task) -> None:
        if task.prefix.startswith("save-"):
            self._remove(task.prefix)

    def _remove(self, folder: str) -> None:
        store = open_store(self._server.url(folder))
        for info in store.list(""):
            store.delete(info.key)


def _gateway() -> psutil.Process:
    """The gateway's process, a child of this one."""
    (process,) = (child for child in psutil.Process().children(recursive=True) if child.name() == "juicefs")
    return process


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


HEAD = (
    f"{'':15}{'latency':>9}{'client':>18}{'n':>3}{'median s':>10}{'min':>7}{'MiB/s':>7}{'CPU s/GiB':>11}{'server':>8}"
    f"{'peak MiB':>10}{'wire/needed':>13}{'requests':>10}{'to ours':>9}"
)


def row_of(cell: Cell, cells: Sequence[Cell], state_bytes: int) -> str:
    """The cell as a line of the table, beside `cells` of the same row and latency."""
    gib = state_bytes / MIB / 1024
    ours = next((other.median_s for other in cells if other.client == OURS), None)
    ratio = f"{cell.median_s / ours:8.2f}x" if ours else ""
    assert cell.counts is not None
    wire_bytes = cell.counts.up_bytes if cell.row.startswith("save") else cell.counts.down_bytes
    return (
        f"{cell.row:15}{cell.latency_ms:6.0f} ms{cell.client:>18}{len(cell.seconds):3}{cell.median_s:10.2f}"
        f"{min(cell.seconds):7.2f}{gib * 1024 / cell.median_s:7.0f}{statistics.median(cell.cpu_s) / gib:11.2f}"
        f"{statistics.median(cell.server_cpu_s) / gib:8.2f}{cell.peak_bytes / MIB:10.0f}"
        f"{wire_bytes / state_bytes:13.4f}{cell.counts.num_requests:10}{ratio:>9}"
    )


@contextlib.contextmanager
def bench(args: argparse.Namespace) -> Iterator[Bench]:
    """A benchmark with all that it needs, which ends with the block."""
    with (
        tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-storage-") as folder,
        contextlib.ExitStack() as stack,
    ):
        server = stack.enter_context(juicefs_gateway(Path(folder)))
        storage_ranks.prepare(server.environment)
        latencies = dict.fromkeys([0.0, *args.latency_ms])
        proxies = {ms: stack.enter_context(DelayProxy(server.endpoint_url, ms / 1000)) for ms in latencies}
        running = Bench(server, args, proxies)
        stack.callback(running.close)
        yield running


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=1024, help=f"of the whole state; a multiple of {TENSOR_MIB}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget-s", type=float, default=6.0, help="for all timed runs of a client in a row")
    parser.add_argument("--latency-ms", type=float, nargs="+", default=[0.0, 20.0])
    parser.add_argument(
        "--cases", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument(
        "--clients", nargs="+", choices=CLIENTS, default=CLIENTS, metavar="CLIENT", help=", ".join(CLIENTS)
    )
    parser.add_argument("--folder", default=memory, help="where the gateway keeps its objects")
    parser.add_argument("--out", type=Path, default=Path("out/bench-storage.json"))
    args = parser.parse_args(arguments)
    if args.size_mib % TENSOR_MIB or args.size_mib <= 0:
        parser.error(f"--size-mib {args.size_mib} is not a multiple of {TENSOR_MIB}")
    return args


CLIENTS = [OURS, UNSIGNED, FSSPEC, CONNECTOR, RAW]


def main() -> None:
    args = parse()
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{machine}; {args.size_mib} MiB, at most {args.repeats} times each", flush=True)
    with bench(args) as running:
        raw = running.choose_raw()
        print("raw: " + ", ".join(f"{name} {value:.2f}" for name, value in raw.items()), flush=True)
        print(HEAD)
        running.run(args.cases)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine, "state_bytes": running.state_bytes, "raw": raw}
    results["cells"] = [dataclasses.asdict(cell) for cell in running.cells]
    args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
