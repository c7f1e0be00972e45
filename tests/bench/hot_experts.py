"""`make bench-hot`: steps of a model some of whose experts get most tokens, with and without replicas of these.

The choices of experts are drawn by Zipf's law, the same in every way, so that the first expert gets a good third of all
rows (`--zipf` 1.2), or level ones (`--zipf` 0). Ways take turns in the same processes of one thread each:

plain      every rank computes the rows of its own experts (`train.expert_replicas = 0`);
replicas   hot experts' weights are sent where that pays, by what a short probe has measured of this machine;
always     the same, whatever the planner's costs say: what the decision is worth.

Columns: rows of the busiest rank over the mean, without and with what was shared; copies of an expert a step; of the
step the median, and plain's over it in each turn (median, least and greatest); the processor's time of the rank that
takes most of it in a step, plain's over it likewise, and that of all ranks. The processor's time is what a step would
take where each rank has a core of its own, and hardly minds who else is at work here; more ranks than cores take
turns, where a level load wins nothing. JSON goes to `--out`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from elastic_moe.calibrate import measure
from elastic_moe.config import JobConfig
from elastic_moe.model import ModelConfig
from elastic_moe.model.decoder import Decoder
from elastic_moe.parallel import build_mesh, init_weights
from elastic_moe.trainer.routing import SharingStats
from elastic_moe.trainer.setup import set_up
from elastic_moe.trainer.step import Stepper
from launcher import MeshPlan
from tests.bench.train_steps import text_file
from tests.ranks import Ranks

PLAIN, REPLICAS, ALWAYS = "plain", "replicas", "always"
WAYS = (PLAIN, REPLICAS, ALWAYS)
MODEL = ModelConfig(
    dim=256, expert_dim=512, num_layers=4, num_heads=8, num_kv_heads=4, num_experts=8, top_k=2, balance="none"
)
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class HotTask:
    """Steps of one world."""

    world_size: int
    turns: int
    steps: int
    zipf: float
    guests: int
    text: str
    global_batch: int = 16
    seq_len: int = 256


@dataclass
class HotCell:
    """What a world has measured: the machine, and by way seconds of a step in each turn and what was shared."""

    machine: dict[str, float]
    copy_rows: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_s: dict[str, list[float]] = field(default_factory=dict)
    cpu_all_s: dict[str, list[float]] = field(default_factory=dict)
    sharing: dict[str, SharingStats | None] = field(default_factory=dict)


def measure_hot(task: HotTask) -> HotCell:
    """On every rank: build all ways, then let each do some steps in turn."""
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(task.world_size)
    cell, steppers = HotCell(measure(job_of(task, PLAIN, {}), torch.device("cpu"))), {}
    for way in WAYS:
        steppers[way] = stepper_of(task, way, cell.machine)
        cell.sharing[way] = steppers[way].step(0).sharing
        cell.seconds[way], cell.cpu_s[way], cell.cpu_all_s[way] = [], [], []
    for turn in range(task.turns):
        for way, stepper in steppers.items():
            dist.barrier()
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            for number in range(task.steps):
                stepper.step(1 + turn * task.steps + number)
            cpu_s = torch.tensor([(time.process_time() - began_cpu_s) / task.steps], dtype=torch.float64)
            most_s = cpu_s.clone()
            dist.all_reduce(most_s, op=dist.ReduceOp.MAX)
            dist.all_reduce(cpu_s)
            cell.cpu_s[way].append(float(most_s))
            cell.cpu_all_s[way].append(float(cpu_s))
            cell.seconds[way].append((time.perf_counter() - began_s) / task.steps)
    dispatch = steppers[REPLICAS].model.blocks[0].moe.dispatch
    cell.copy_rows = dispatch.rule.copy_rows if hasattr(dispatch, "rule") else 0.0
    return cell


def job_of(task: HotTask, way: str, machine: dict[str, float]) -> JobConfig:
    """The job of a way; `always` is told of links, memory and cores that no copy has to wait for."""
    if way == ALWAYS:
        machine = {"flops_per_s": 1.0}
    return JobConfig.model_validate(
        {
            "model": MODEL.model_dump(),
            "train": {
                "steps": 1000,
                "global_batch": task.global_batch,
                "seq_len": task.seq_len,
                "expert_replicas": 0 if way == PLAIN else task.guests,
            },
            "data": {"url": task.text, "format": "text"},
            "mesh": machine,
        }
    )


def stepper_of(task: HotTask, way: str, machine: dict[str, float]) -> Stepper:
    """The trainer's own steps, on as many expert-parallel ranks as there are."""
    plan = MeshPlan(1, 1, task.world_size, idle=0, micro_batch=task.global_batch // task.world_size, rounds=1)
    stepper, _ = set_up(job_of(task, way, machine), build_mesh(plan, "cpu"), dist.get_rank(), torch.device("cpu"))
    init_weights(stepper.model, 0)
    choose_by_zipf(stepper.model, task)
    return stepper


def choose_by_zipf(model: Decoder, task: HotTask) -> None:
    """Replace what routers choose by a draw without replacement in which expert e has the weight (e + 1) ** -zipf."""
    weights = torch.arange(1, MODEL.num_experts + 1, dtype=torch.float64) ** -task.zipf
    draw = torch.Generator().manual_seed(dist.get_rank())
    num_rows = task.global_batch // task.world_size * task.seq_len
    chosen = torch.multinomial(weights.expand(num_rows, -1), MODEL.top_k, generator=draw)
    table = chosen.view(-1, task.seq_len, MODEL.top_k)
    for block in model.blocks:
        block.moe.router._best = lambda scores_BSE: table[: len(scores_BSE)]  # type: ignore[method-assign]


def rows_of(task: HotTask, cell: HotCell) -> list[str]:
    """A line for each way."""
    lines = []
    for way in cell.seconds:
        stats = cell.sharing[way] or cell.sharing[ALWAYS]
        assert stats is not None
        shared = cell.sharing[way]
        level = f"{stats.rank_load_owned:.2f} -> {shared.rank_load if shared else stats.rank_load_owned:.2f}"
        lines.append(
            f"| {task.world_size} | {task.zipf:g} | {way} | {level} | {shared.copies if shared else 0} | "
            f"{over_plain(cell.seconds, way)} | {over_plain(cell.cpu_s, way)} | "
            f"{statistics.median(cell.cpu_all_s[way]) * 1e3:.0f} |"
        )
    return lines


def over_plain(seconds: dict[str, list[float]], way: str) -> str:
    """Milliseconds of a way, and what plain takes over it."""
    times = sorted(a / b for a, b in zip(seconds[PLAIN], seconds[way], strict=True))
    return (
        f"{statistics.median(seconds[way]) * 1e3:.0f} | {statistics.median(times):.2f} ({times[0]:.2f}-{times[-1]:.2f})"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--zipf", nargs="+", type=float, default=[1.2, 0.0])
    parser.add_argument("--guests", type=int, default=2, help="train.expert_replicas (default %(default)s)")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of a turn (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/bench-hot.json"))
    return parser.parse_args(arguments)


def main() -> int:
    """Measure, print a table, and write what was measured."""
    args = parse()
    results: list[dict[str, Any]] = []
    ranks = Ranks()
    print(
        "| ranks | zipf | way | busiest rank / mean | copies | step ms | plain / it | cpu ms | plain / it | all |",
        flush=True,
    )
    try:
        with tempfile.TemporaryDirectory(prefix="bench-hot-") as folder:
            text = str(text_file(Path(folder)))
            for world_size in args.worlds:
                for zipf in args.zipf:
                    task = HotTask(world_size, args.turns, args.steps, zipf, args.guests, text)
                    cell = ranks.run(measure_hot, task, world_size=world_size, timeout_s=TIMEOUT_S)[0]
                    results.append({**dataclasses.asdict(task), **dataclasses.asdict(cell)})
                    print("\n".join(rows_of(task, cell)), flush=True)
                    print(f"  a copy costs as much as {cell.copy_rows:.0f} rows here", file=sys.stderr, flush=True)
    finally:
        ranks.close()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
