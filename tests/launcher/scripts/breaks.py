"""A worker that breaks: `breaks.py FOLDER HOW RANK`. Undecorated, as most scripts are.

HOW: `import` (RANK does not import), `step` (RANK raises after step 3, always), `wait` (nobody does: ends with
FOLDER/finish). Each start is a line in FOLDER/started.jsonl. A collective in every step holds the ranks together.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from elastic_moe import worker

folder, how, culprit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rank = int(os.environ["RANK"])
with (folder / "started.jsonl").open("a") as started:
    started.write(json.dumps({"RANK": rank, "pid": os.getpid()}) + "\n")
print(f"rank {rank} says hello", flush=True)
print(f"rank {rank} warns", file=sys.stderr, flush=True)
if how == "import" and rank == culprit:
    import there_is_no_such_module  # type: ignore[import-not-found]  # noqa: F401


def train_step(step: int) -> None:
    """The line that fails."""
    if how == "step" and step == 4 and rank == culprit:
        raise ValueError(f"no batch for step {step}")


dist.init_process_group("gloo")
for step in range(1, 100_000):
    finish = torch.tensor([int((folder / "finish").exists())])
    dist.all_reduce(finish, op=dist.ReduceOp.MIN)
    if finish.item():
        break
    train_step(step)
    worker.heartbeat(step)
dist.barrier()
dist.destroy_process_group()
