"""`make bench-tiny`: how far a job of defaults comes in ten minutes here, and whether all of its experts are used.

The default corpus (Python's standard library), a hundredth of it held out. How many steps fit is measured over the
first ones, and the learning rate planned for so many. Prints the validation loss on the way, and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from elastic_moe.config import JobConfig, mesh_spec
from elastic_moe.parallel import build_mesh, init_weights
from elastic_moe.trainer.setup import set_up
from elastic_moe.trainer.step import Stepper
from launcher import plan
from tests.ranks import Ranks

_FIRST_STEPS = 30
_MARGIN = 0.97  # of the time left, for steps that take longer
_TOLD_STEPS = 200


def job(sets: list[str]) -> JobConfig:
    """The defaults, but for what is set: `section.field=value`, a JSON value."""
    told: dict[str, Any] = {"data": {"validation": 0.01}, "train": {"validation_sequences": 256, "steps": 10**6}}
    for each in sets:
        name, _, value = each.partition("=")
        section, _, field = name.partition(".")
        told.setdefault(section, {})[field] = json.loads(value)
    return JobConfig.model_validate(told)


def train_for(what: JobConfig, seconds: float, threads: int) -> dict[str, Any]:
    """Train on this rank until the time is up: losses on the way, and the mean loads of the last tenth of steps."""
    torch.set_num_threads(threads)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    began_s = time.monotonic()
    mesh = plan(world_size, mesh_spec(what), ranks_per_node=world_size)
    stepper, _ = set_up(what, build_mesh(mesh, "cpu"), rank, torch.device("cpu"))
    init_weights(stepper.model, what.train.seed)
    curve, loads = [], []
    step, last = 0, _FIRST_STEPS
    stepper.horizon = 10**6  # not known yet
    while step < last:
        first_s = time.monotonic()
        loads.append(stepper.step(step).load_LE)
        step += 1
        if step == _FIRST_STEPS:
            step_s = (time.monotonic() - began_s) / step
            last = stepper.horizon = _from_rank_0(step + int(_MARGIN * (seconds - step * step_s) / step_s))
        if step % _TOLD_STEPS == 0 or step == last:
            val_loss = _tell(stepper, step, last, began_s, rank)
            curve.append({"step": step, "s": round(time.monotonic() - began_s, 1), "val_loss": val_loss})
            if _from_rank_0(int(time.monotonic() - began_s > seconds - (time.monotonic() - first_s))):
                break
    late = torch.stack(loads[-max(1, step // 10) :]).mean(dim=0)
    least_L = (late.amin(dim=1) / late.mean(dim=1)).tolist()
    tokens_per_s = step * what.train.global_batch * what.train.seq_len / (time.monotonic() - began_s)
    return {
        "mesh": str(mesh),
        "steps": step,
        "tokens_per_s": round(tokens_per_s),
        "least_load_L": least_L,
        "curve": curve,
    }


def _tell(stepper: Stepper, step: int, last: int, began_s: float, rank: int) -> float:
    val_loss = stepper.validate()
    if rank == 0:
        print(f"{time.monotonic() - began_s:6.0f} s  step {step:6} of {last}  validation {val_loss:.4f}", flush=True)
    return val_loss


def _from_rank_0(number: int) -> int:
    told = torch.tensor(number)
    dist.broadcast(told, 0)
    return int(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--ranks", type=int, default=2, help="processes that share the cores (default 2)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", dest="sets")
    parser.add_argument("--out", type=Path, default=Path("out/bench-tiny.json"))
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    print(
        f"{cores} cores, torch {torch.__version__}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )
    seconds, ranks = 60 * args.minutes, Ranks()
    arguments = (job(args.sets), seconds, max(1, cores // args.ranks))
    try:
        result = ranks.run(train_for, *arguments, world_size=args.ranks, timeout_s=2 * seconds + 60)[0]
    finally:
        ranks.close()
    val_loss, least = result["curve"][-1]["val_loss"], min(result["least_load_L"])
    print(f"{result['steps']} steps, {result['tokens_per_s']} tokens/s, {result['mesh']}")
    print(f"validation loss {val_loss:.4f} nats a byte (bar 2.2); least load {least:.2f} of the mean (bar 0.25)")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
