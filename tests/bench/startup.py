"""`make bench-startup`: from a worker's start to its first step, with a checkpoint to go on from and without.

Models of several sizes, on one rank and on two: what is left of the time to the first step without the restore (or the
first weights) and without what a later step takes is start-up: meshes, the model on the meta device, FSDP, memory, the
corpus, the Checkpointer, and what the first step does once. Imports are told apart: the agent's workers are forks of
a process that has them. Prints a table and writes JSON beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from elastic_moe.config import JobConfig
from tests.bench.plain_ranks import run_ranks

TIMEOUT_S = 900.0
# Parameters in millions, by layers of 31.9 million each, 16 experts in it.
LAYERS = {"32": 1, "128": 4, "512": 16, "1021": 32}
NUM_LATER_STEPS = 3


def job_of(layers: int, folder: Path, steps: int) -> JobConfig:
    """A job of so many layers whose steps are short beside its parameters."""
    model = {"dim": 512, "num_layers": layers, "num_heads": 8, "num_kv_heads": 4, "num_experts": 16}
    checkpoint = {"url": str(folder / "run"), "every": steps, "keep": 1, "staging": "sync"}
    train = {"global_batch": 2, "seq_len": 64, "steps": steps, "metrics": None, "device": "cpu"}
    return JobConfig.model_validate({"model": {**model, "expert_dim": 1264}, "train": train, "checkpoint": checkpoint})


def start(job: JobConfig, world_size: int) -> dict[str, Any]:
    """The stages of the slowest rank to begin."""
    said = run_ranks("tests.bench.startup_rank", job.model_dump_json(), world_size=world_size, timeout_s=TIMEOUT_S)
    return max((json.loads(line) for line in said), key=lambda stages: stages["until_first_step_s"])


def row(stages: dict[str, Any]) -> dict[str, float]:
    """What a start was made of, seconds."""
    first, *later = stages["step"]
    filled = stages["first_weights"][0] if stages["first_weights"] else stages["restore"][0]
    step = min(later)
    return {
        "imports": stages["imports_s"],
        "group": stages["process_group"][0],
        "mesh": stages["build_mesh"][0],
        "set_up": stages["set_up"][0],
        "store": stages["Checkpointer"][0],
        "teller": sum(stages["open_teller"][:1]),
        "weights": filled,
        "first_step": first,
        "step": step,
        "start_up": stages["until_first_step_s"] - filled - step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["32", "128", "512"], choices=list(LAYERS))
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/bench-startup.json"))
    args = parser.parse_args()
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{machine}; load {os.getloadavg()[0]:.1f}; seconds")
    results = []
    for size in args.sizes:
        for world_size in args.ranks:
            with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
                for resumed, steps in ((False, 1 + NUM_LATER_STEPS), (True, 2 + 2 * NUM_LATER_STEPS)):
                    found = row(start(job_of(LAYERS[size], Path(folder), steps), world_size))
                    if not results:
                        heads = "".join(f"{head:>11}" for head in found)
                        print(f"{'parameters':14}{'ranks':>6}  {'goes on':8}{heads}")
                    cells = "".join(f"{took_s:>11.2f}" for took_s in found.values())
                    print(f"{size + ' million':14}{world_size:>6}  {'yes' if resumed else 'no':8}{cells}", flush=True)
                    results.append({"millions": int(size), "ranks": world_size, "resumed": resumed, **found})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
