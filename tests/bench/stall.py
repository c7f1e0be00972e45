"""`make bench-stall`: what a save costs a training that goes on: ours, and others', in turn.

Two ranks (gloo, a thread each) train a stack of layers, whose state (parameters and AdamW's moments) is saved to a
folder in memory and to an S3 gateway, by each of these ways in turn, `--repeats` times:

no save, one memcpy      what there is to compare with: the copy goes into memory that is in use already
ours, sync / overlapped  `Checkpointer(staging=..., service=False)`
service, sync / ...      the same with `service=True`: a process of the node stores and commits, at low priority
dcp.save                 stock, `FileSystemWriter` and `FsspecWriter`
async thread / process   stock `dcp.async_save`, with a process group of its own
async shared             the same in a thread, with `DefaultStager` in shared memory
torch_checkpointing      from PyPI, folder only, where it is installed, or lies in a folder named by --pypi

Columns, medians over all saves of all repeats: `blocked`, seconds in the call and in waits of the optimizer's step for
a copy (the longest of the ranks); `lengthened`, by how much the run took longer for each save than without; `commit`,
from the call to the checkpoint being whole; `CPU`, seconds of the ranks and their children per GiB beyond those of the
run without saves. What a way does after the last step of a run does not lengthen it, and is in `CPU` and `commit`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.bench import stall_ranks
from tests.bench.stall_ranks import BUCKET_URL, LAYER_BYTES, MEMCPY, NOTHING, PYPI, WAYS, StallRun, StallTask
from tests.ranks import Ranks
from tests.s3 import S3Server, juicefs_gateway

MIB = 1024 * 1024
WORLD_SIZE = 2
TIMEOUT_S = 600.0


@dataclass
class StallCell:
    """One way to one target: a value a save, or a run."""

    target: str
    way: str
    blocked_s: list[float] = field(default_factory=list)
    held_s: list[float] = field(default_factory=list)
    commit_s: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    state_bytes: int = 0

    def add(self, by_rank: Sequence[StallRun]) -> None:
        """One more run."""
        self.blocked_s += [
            max(call + held for call, held in zip(calls, helds, strict=True))
            for calls, helds in zip(
                zip(*(run.call_s for run in by_rank), strict=True),
                zip(*(run.held_s for run in by_rank), strict=True),
                strict=True,
            )
        ]
        self.held_s += [max(helds) for helds in zip(*(run.held_s for run in by_rank), strict=True)]
        self.commit_s += by_rank[0].commit_s
        self.steps_s.append(max(run.steps_s for run in by_rank))
        self.cpu_s.append(sum(run.cpu_s for run in by_rank))
        self.step_s.append(max(run.step_s for run in by_rank))
        self.state_bytes = sum(run.state_bytes for run in by_rank)


class StallBench:
    """Runs ways in turn."""

    def __init__(self, args: argparse.Namespace, folder: Path, server: S3Server | None) -> None:
        self._args = args
        self._folder = folder
        self._server = server
        self.cells: dict[tuple[str, str], StallCell] = {}

    def run(self) -> None:
        """All of them, and a line to stderr for each."""
        for repeat in range(self._args.repeats):
            for target in self._args.targets:
                for way in self._args.ways:
                    if way == PYPI and target != "folder":
                        continue
                    cell = self.cells.setdefault((target, way), StallCell(target, way))
                    cell.add(self._once(target, way, repeat))
                    told = f"{target} {way}: blocked {cell.blocked_s[-1]:.3f} s, run {cell.steps_s[-1]:.2f} s"
                    print(f"{repeat + 1}/{self._args.repeats} {told}", file=sys.stderr, flush=True)

    def _once(self, target: str, way: str, repeat: int) -> list[StallRun]:
        args, name = self._args, f"{repeat}-{WAYS.index(way)}"
        where, environment = str(self._folder / name), {"XDG_RUNTIME_DIR": str(self._folder)}
        if target == "s3" and self._server is not None:
            where, environment = f"{BUCKET_URL}/{name}", environment | self._server.environment
            environment.pop("AWS_ENDPOINT_URL_S3")
        task = StallTask(
            way=way,
            target=where,
            endpoint_url=self._server.endpoint_url if target == "s3" and self._server is not None else "",
            environment=environment,
            num_layers=args.size_mib // WORLD_SIZE // (3 * LAYER_BYTES // MIB),
            num_tokens=args.num_tokens,
            num_saves=args.num_saves,
            steps_between=args.steps_between,
        )
        ranks = Ranks()  # a way may leave processes in its ranks
        try:
            return ranks.run(stall_ranks.run, task, world_size=WORLD_SIZE, timeout_s=TIMEOUT_S)
        finally:
            ranks.close()
            shutil.rmtree(self._folder / name, ignore_errors=True)
            if target == "s3":
                shutil.rmtree(self._folder / "data", ignore_errors=True)


COLUMNS = ("", "way", "n", "blocked s", "x memcpy", "lengthened s", "commit s", "CPU s/GiB")
WIDTHS = (-7, -21, 4, 11, 10, 14, 10, 11)


def row_of(cell: StallCell, cells: dict[tuple[str, str], StallCell], num_saves: int) -> str:
    """What the table says of a cell, beside those that it is compared with."""
    memcpy, nothing = cells.get((cell.target, MEMCPY)), cells.get((cell.target, NOTHING))
    blocked_s = statistics.median(cell.blocked_s)
    ratio = f"{blocked_s / statistics.median(memcpy.blocked_s):.2f}x" if memcpy else ""
    longer = cpu = ""
    if nothing is not None and cell.way != NOTHING:
        longer_s = statistics.median(cell.steps_s) - statistics.median(nothing.steps_s)
        longer = f"{longer_s / num_saves:.3f}"
        extra_s = statistics.median(cell.cpu_s) - statistics.median(nothing.cpu_s)
        cpu = f"{extra_s / num_saves / (cell.state_bytes / MIB / 1024):.2f}"
    commit = f"{statistics.median(cell.commit_s):.2f}" if cell.commit_s else ""
    return aligned((cell.target, cell.way, f"{len(cell.blocked_s)}", f"{blocked_s:.4f}", ratio, longer, commit, cpu))


def aligned(texts: Sequence[str]) -> str:
    """A line of the table."""
    return "".join(f"{text:{'<' if width < 0 else '>'}{abs(width)}}" for text, width in zip(texts, WIDTHS, strict=True))


@contextlib.contextmanager
def bench(args: argparse.Namespace) -> Iterator[StallBench]:
    """A benchmark with all that it needs, which ends with the block."""
    with (
        tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-stall-") as folder,
        contextlib.ExitStack() as stack,
    ):
        server = stack.enter_context(juicefs_gateway(Path(folder))) if "s3" in args.targets else None
        yield StallBench(args, Path(folder), server)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=1056, help="of the whole state, about")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-saves", type=int, default=3, help="in a run, after one that is not measured")
    parser.add_argument("--steps-between", type=int, default=8)
    parser.add_argument("--num-tokens", type=int, default=64, help="of a step, which makes it long")
    parser.add_argument("--targets", nargs="+", choices=("folder", "s3"), default=["folder", "s3"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--folder", default=memory, help="where checkpoints and the gateway's objects lie")
    parser.add_argument("--pypi", type=Path, help="a folder in which torch_checkpointing is installed")
    parser.add_argument("--out", type=Path, default=Path("out/bench-stall.json"))
    args = parser.parse_args(arguments)
    if args.pypi is not None:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(args.pypi)]))
        sys.path.append(str(args.pypi))
    if importlib.util.find_spec("torch_checkpointing") is None:
        args.ways = [way for way in args.ways if way != PYPI]
        print("torch_checkpointing is not installed: left out", file=sys.stderr)
    return args


def main() -> None:
    args = parse()
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    with bench(args) as running:
        running.run()
    print(f"{machine}; {args.num_saves} saves a run, {args.steps_between} steps between, {args.repeats} runs")
    print(aligned(COLUMNS))
    for cell in running.cells.values():
        print(row_of(cell, running.cells, args.num_saves))
    steps = [statistics.median(cell.step_s) for cell in running.cells.values() if cell.way == NOTHING]
    print("a step takes " + ", ".join(f"{step_s:.3f} s" for step_s in steps))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine, "options": {key: str(value) for key, value in vars(args).items()}}
    args.out.write_text(
        json.dumps({**results, "cells": [dataclasses.asdict(cell) for cell in running.cells.values()]}, indent=1)
    )


if __name__ == "__main__":
    main()
