"""`make bench-train`: how fast our layer of experts and our training step are, beside others', in turn.

layer    one layer forward and backward, two threads, fp32 and bf16, five shapes: ours; transformers' Mixtral, whose
         experts run grouped (its default) or eager, one by one; a plain loop over experts; a dense network of as many
         parameters as a token meets. `x` columns: their median time over ours; the bar is 1.0 beside the grouped path.
         Memory: bytes at most in a pass, beyond weights and input.
step     a whole step of a model of four layers, the global batch the same, one thread a rank: 1, 2 and 4 ranks; ours
         under FSDP, expert parallelism, or both; transformers' Mixtral under FSDP2. `scaling`: tokens/s over those of
         ours on one rank. More ranks than cores share them: their rows tell of overhead, not of scaling.
         Memory: with parameters and AdamW's moments, of the rank that takes most.
start    from the command to the end of a job of one step, by the size of the model.
why      (only where asked for) the layer with one of its parts taken away, over all of it.
products (only where asked for: a minute) which kernel is fastest for an expert's products, by their size: what two
         constants of `elastic_moe.model` rest on.

Ways take turns; figures are medians. `--quick` takes three minutes, all of it about ten. JSON goes to `--out`.
It may be interrupted: its processes end with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tests.bench.train_layers import SHAPES, LayerCell, LayerTask, measure_layer
from tests.bench.train_models import DENSE, EAGER, GROUPED, LOOP, OURS
from tests.bench.train_products import ProductTask, by_octave, measure_products
from tests.bench.train_steps import (
    FSDP,
    GLOBAL_BATCH,
    SEQ_LEN,
    STARTS,
    StepCell,
    StepTask,
    measure_steps,
    start_s,
    text_file,
)
from tests.bench.train_why import WITHOUT, measure_parts
from tests.ranks import Ranks

OTHERS = (GROUPED, EAGER, LOOP, DENSE)
PARTS = ("layer", "step", "start")
ASKED_FOR = ("why", "products")
TIMEOUT_S = 900.0
MIB = 1024 * 1024


def told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_layers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A cell for each shape and type, each in a process of its own."""
    rows = []
    for shape in SHAPES:
        for dtype in ("float32", "bfloat16"):
            task = LayerTask(shape, dtype, args.repeats, num_threads=args.threads)
            (cell,) = in_ranks(measure_layer, task, world_size=1)
            rows.append({"shape": shape.name, "what": str(shape), "dtype": dtype, **dataclasses.asdict(cell)})
            told(layer_row(shape.name, dtype, cell))
    return rows


def run_steps(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A cell for each world."""
    rows: list[dict[str, Any]] = []
    alone = None
    for world_size in args.worlds:
        task = StepTask(
            world_size,
            args.step_repeats,
            args.steps,
            str(text_file(folder)),
            with_others=not args.ours,
            balance="forced" if args.level else "sequence",
        )
        cells = in_ranks(measure_steps, task, world_size=world_size)
        cell = cells[0]
        cell.peak_bytes = {way: max(each.peak_bytes[way] for each in cells) for way in cell.peak_bytes}
        alone = alone or tokens_per_s(cell, FSDP)
        rows.append({"world_size": world_size, **dataclasses.asdict(cell)})
        for line in step_rows(world_size, cell, alone):
            told(line)
    return rows


def run_starts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts of each size, alone and on two ranks under our agent."""
    rows = []
    for name in list(STARTS)[:2] if args.quick else STARTS:
        for launcher in ("alone", "run"):
            seconds = [start_s(name, launcher) for _ in range(args.start_repeats)]
            rows.append({"parameters": name, "launcher": launcher, "seconds": seconds})
            told(f"| {name} | {launcher} | {statistics.median(seconds):.2f} |")
    return rows


def run_why(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What each part of our layer is worth."""
    rows = []
    for shape in SHAPES:
        for dtype in ("float32", "bfloat16"):
            task = LayerTask(shape, dtype, args.repeats, num_threads=args.threads)
            (gains,) = in_ranks(measure_parts, task, world_size=1)
            rows.append({"shape": shape.name, "dtype": dtype, "without": gains})
            told(f"| {shape.name} | {dtype} | " + " | ".join(f"{gains[part]:.2f}x" for part in WITHOUT) + " |")
    return rows


def run_products(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The gain of the second way over the first by the operations of an expert in a product."""
    rows = []
    for what, dtype in (("library", "float32"), ("apart", "float32"), ("apart", "bfloat16")):
        task = ProductTask(what, dtype, args.threads, args.repeats)
        (cells,) = in_ranks(measure_products, task, world_size=1)
        rows.append({"what": what, "dtype": dtype, "cells": [dataclasses.asdict(cell) for cell in cells]})
        gains = ", ".join(f"{flops / 1e6:.2g}: {gain:.2f}x" for flops, gain in by_octave(cells).items())
        told(f"| {what} | {dtype} | {gains} |")
    return rows


def in_ranks(function: Any, task: Any, world_size: int) -> list[Any]:
    """Run on new processes, which end whatever happens."""
    ranks = Ranks()
    try:
        return ranks.run(function, task, world_size=world_size, timeout_s=TIMEOUT_S)
    finally:
        ranks.close()


def layer_row(name: str, dtype: str, cell: LayerCell) -> str:
    """A line of the table: ours in milliseconds, others' times over it."""
    median = {way: statistics.median(seconds) for way, seconds in cell.seconds.items()}
    ratios = [f"{median[way] / median[OURS]:.2f}x" for way in OTHERS]
    spread = sorted(b / a for a, b in zip(cell.seconds[OURS], cell.seconds[GROUPED], strict=True))
    memory = [f"{cell.peak_bytes[way] / MIB:.0f}" for way in (OURS, GROUPED)]
    ms = f"{median[OURS] * 1e3:.1f}"
    return (
        f"| {name} | {dtype} | {ms} | {' | '.join(ratios)} | {spread[0]:.2f}-{spread[-1]:.2f} | {' / '.join(memory)} |"
    )


def step_rows(world_size: int, cell: StepCell, alone: float) -> list[str]:
    """A line for each way."""
    lines = []
    for way in cell.seconds:
        rate, mib = tokens_per_s(cell, way), cell.peak_bytes[way] / MIB
        times = tokens_per_s(cell, FSDP) / rate
        lines.append(f"| {world_size} | {way} | {rate:.0f} | {rate / alone:.2f} | {times:.2f}x | {mib:.0f} |")
    return lines


def tokens_per_s(cell: StepCell, way: str) -> float:
    return GLOBAL_BATCH * SEQ_LEN / statistics.median(cell.seconds[way])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, no model of 240 M")
    parser.add_argument("--parts", nargs="+", choices=PARTS + ASKED_FOR, default=list(PARTS))
    parser.add_argument("--repeats", type=int, help="of each way of a layer")
    parser.add_argument("--threads", type=int, default=2, help="of a layer (default %(default)s)")
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--ours", action="store_true", help="of a step only our own ways")
    parser.add_argument("--level", action="store_true", help="of a step, send tokens to experts in turn (ours)")
    parser.add_argument("--out", type=Path, default=Path("out/bench-train.json"))
    args = parser.parse_args(arguments)
    args.repeats = args.repeats or (5 if args.quick else 11)
    args.step_repeats, args.steps = (3, 2) if args.quick else (7, 3)
    args.step_repeats = min(args.step_repeats, args.repeats)
    args.start_repeats = 1 if args.quick else 3
    return args


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Measure, print tables, and write what was measured."""
    args = parse()
    signal.signal(signal.SIGTERM, interrupt)
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    told(machine)
    results: dict[str, Any] = {"machine": machine, "options": {key: str(value) for key, value in vars(args).items()}}
    try:
        with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
            if "layer" in args.parts:
                told(
                    "\n| layer | dtype | ours ms | "
                    + " | ".join((*OTHERS, "grouped, spread", "MiB, ours / grouped"))
                    + " |"
                )
                results["layers"] = run_layers(args)
            if "step" in args.parts:
                told("\n| ranks | way | tokens/s | scaling | ours, FSDP over it | MiB |")
                results["steps"] = run_steps(args, Path(folder))
            if "start" in args.parts:
                told("\n| parameters | launcher | s |")
                results["starts"] = run_starts(args)
            if "why" in args.parts:
                told("\n| layer | dtype | without " + " | without ".join(WITHOUT) + " |")
                results["why"] = run_why(args)
            if "products" in args.parts:
                told("\n| what | dtype | gain from so many million operations on |")
                results["products"] = run_products(args)
    except KeyboardInterrupt:
        told("interrupted; what was measured is written")
        return 130
    finally:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
