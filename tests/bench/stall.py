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

`--quick` takes one turn of the ways that the bars speak of, and to S3 saves half the state. A signal ends it, and all
that it has started.

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
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from tests.bench import stall_ranks
from tests.bench.family import ends_with_its_family
from tests.bench.stall_bars import (
    ASYNC,
    DCP,
    MEMCPY,
    NOTHING,
    Cells,
    StallCell,
    aligned,
    bars,
    lengthened_s,
    memcpys,
    table,
)
from tests.bench.stall_ranks import BUCKET_URL, LAYER_BYTES, PYPI, WAYS, StallRun, StallTask
from tests.ranks import Ranks
from tests.s3 import S3Server, juicefs_gateway

MIB = 1024 * 1024
WORLD_SIZE = 2
TIMEOUT_S = 600.0
QUICK_WAYS = (NOTHING, MEMCPY, "service, sync", "service, overlapped", DCP, *ASYNC)
"""The ways that the bars speak of, as they are under an agent; `dcp.save` is spoken of with S3 only."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much a run does. `size_mib`: of the whole state, about; one save more than `num_saves` is not measured."""

    size_mib: int
    num_saves: int
    steps_between: int


QUICK_TO_S3 = Scale(528, 2, 30)
"""There a save takes seconds on these two cores; it is half the size, and has the time to come to its end."""


def add(cell: StallCell, by_rank: Sequence[StallRun]) -> None:
    """One more run."""
    cell.blocked_s += [
        max(call + held for call, held in zip(calls, helds, strict=True))
        for calls, helds in zip(
            zip(*(run.call_s for run in by_rank), strict=True),
            zip(*(run.held_s for run in by_rank), strict=True),
            strict=True,
        )
    ]
    cell.held_s += [max(helds) for helds in zip(*(run.held_s for run in by_rank), strict=True)]
    cell.commit_s += by_rank[0].commit_s
    cell.steps_s.append(max(run.steps_s for run in by_rank))
    cell.cpu_s.append(sum(run.cpu_s for run in by_rank))
    cell.step_s.append(max(run.step_s for run in by_rank))
    cell.passes_s.append(min(run.passes_s for run in by_rank))
    cell.state_bytes = sum(run.state_bytes for run in by_rank)


class StallBench:
    """Runs ways in turn."""

    def __init__(self, args: argparse.Namespace, folder: Path, server: S3Server | None) -> None:
        self._args = args
        self._folder = folder
        self._server = server
        self.cells: dict[tuple[str, str], StallCell] = {}

    def scale(self, target: str) -> Scale:
        """Of the runs to one target."""
        if self._args.quick and target == "s3":
            return QUICK_TO_S3
        return Scale(self._args.size_mib, self._args.num_saves, self._args.steps_between)

    def run(self) -> None:
        """All of them, and a line to stderr for each.

        The run without saves, with which all are compared, is made before the others and after them.
        """
        turns = [(target, way) for target in self._args.targets for way in self._ways(target)] * self._args.repeats
        began_s = time.monotonic()
        for number, (target, way) in enumerate(turns):
            of_cell = StallCell(target, way, num_saves=self.scale(target).num_saves)
            cell = self.cells.setdefault((target, way), of_cell)
            add(cell, self._once(target, way, number))
            told = f"{target} {way}: blocked {cell.blocked_s[-1]:.3f} s, run {cell.steps_s[-1]:.2f} s"
            left_s = (time.monotonic() - began_s) / (number + 1) * (len(turns) - number - 1)
            print(f"{number + 1}/{len(turns)}, {left_s:.0f} s left: {told}", file=sys.stderr, flush=True)

    def _ways(self, target: str) -> list[str]:
        left_out = {MEMCPY} if target != self._args.targets[0] or self.scale(target) is QUICK_TO_S3 else set()
        left_out |= {PYPI} if target != "folder" else {DCP} if self._args.quick else set()
        ways = [way for way in self._args.ways if way not in left_out]
        return [*ways, NOTHING] if NOTHING in ways else ways

    def _once(self, target: str, way: str, number: int) -> list[StallRun]:
        scale, name = self.scale(target), f"run-{number}"
        where, environment = str(self._folder / name), {"XDG_RUNTIME_DIR": str(self._folder)}
        if target == "s3" and self._server is not None:
            where, environment = f"{BUCKET_URL}/{name}", environment | self._server.environment
            environment.pop("AWS_ENDPOINT_URL_S3")
        task = StallTask(
            way=way,
            target=where,
            endpoint_url=self._server.endpoint_url if target == "s3" and self._server is not None else "",
            environment=environment,
            num_layers=scale.size_mib // WORLD_SIZE // (3 * LAYER_BYTES // MIB),
            num_tokens=self._args.num_tokens,
            num_saves=scale.num_saves,
            steps_between=scale.steps_between,
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


def row_of(cell: StallCell, cells: Cells) -> str:
    """What the table says of a cell, beside those that it is compared with."""
    times, longer_s, nothing = memcpys(cell, cells), lengthened_s(cell, cells), None
    cpu = ""
    if longer_s is not None:
        nothing = cells[cell.target, NOTHING]
        extra_s = statistics.median(cell.cpu_s) - statistics.median(nothing.cpu_s)
        cpu = f"{extra_s / cell.num_saves / (cell.state_bytes / MIB / 1024):.2f}"
    texts = (
        *(cell.target, cell.way, f"{len(cell.blocked_s)}", f"{statistics.median(cell.blocked_s):.4f}"),
        *("" if times is None else f"{times:.2f}x", "" if longer_s is None else f"{longer_s:.3f}"),
        *(f"{statistics.median(cell.commit_s):.2f}" if cell.commit_s else "", cpu),
    )
    return aligned(texts, WIDTHS)


@contextlib.contextmanager
def bench(args: argparse.Namespace) -> Iterator[StallBench]:
    """A benchmark with all that it needs, which ends with the block."""
    with (
        tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-stall-") as folder,
        contextlib.ExitStack() as stack,
    ):
        stack.enter_context(ends_with_its_family(Path(folder)))
        server = stack.enter_context(juicefs_gateway(Path(folder))) if "s3" in args.targets else None
        yield StallBench(args, Path(folder), server)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=1056, help="of the whole state, about")
    parser.add_argument(
        "--quick", action="store_true", help="about 3 minutes a target: one turn of the ways the bars speak of"
    )
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
    if args.quick:
        args.repeats, args.steps_between = 1, min(6, args.steps_between)
        args.ways = [way for way in QUICK_WAYS if way in args.ways]
    if args.pypi is not None:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(args.pypi)]))
        sys.path.append(str(args.pypi))
    if PYPI in args.ways and importlib.util.find_spec("torch_checkpointing") is None:
        args.ways = [way for way in args.ways if way != PYPI]
        print("torch_checkpointing is not installed: left out", file=sys.stderr)
    return args


def told(cells: Cells, args: argparse.Namespace, scales: Mapping[str, Scale]) -> str:
    """The tables, for a reader. `scales`: by target."""
    quiet = [cell for cell in cells.values() if cell.way == NOTHING]
    steps = [f"{statistics.median(cell.step_s):.3f} s ({statistics.median(cell.passes_s):.3f} s)" for cell in quiet]
    runs = "run" if args.repeats == 1 else "runs"
    lines = [
        *(
            f"{target}: about {scale.size_mib} MiB, {scale.num_saves} saves a run, {scale.steps_between} steps between,"
            f" {args.repeats} {runs}"
            for target, scale in scales.items()
        ),
        f"a step (its forward and backward) without saves: {', '.join(steps)}",
        "",
        aligned(COLUMNS, WIDTHS),
        *(row_of(cell, cells) for cell in cells.values()),
    ]
    if found := bars(cells):
        lines += ["", table(found)]
    return "\n".join(lines)


def main() -> None:
    args = parse()
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    with bench(args) as running:
        running.run()
    print(machine)
    print(told(running.cells, args, {target: running.scale(target) for target in args.targets}))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine, "options": {key: str(value) for key, value in vars(args).items()}}
    args.out.write_text(
        json.dumps({**results, "cells": [dataclasses.asdict(cell) for cell in running.cells.values()]}, indent=1)
    )


if __name__ == "__main__":
    main()
