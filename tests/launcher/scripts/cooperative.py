"""A worker that keeps the launcher's contract: counts steps, beats, and stops at a step boundary.

Usage: cooperative.py FOLDER. Rank 0 appends every completed step to FOLDER/steps.jsonl; the count is saved every ten
steps; all ranks end once FOLDER/finish exists.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from elastic_moe import worker

folder = Path(sys.argv[1])
saved = folder / "saved"
dist.init_process_group("gloo")
rank, context = dist.get_rank(), worker.context()
step = int(saved.read_text()) if saved.exists() else 0


def save() -> None:
    if rank == 0:
        (folder / "saving").write_text(str(step))
        os.replace(folder / "saving", saved)
    dist.barrier()


while True:
    finish = torch.tensor([int((folder / "finish").exists())])
    dist.all_reduce(finish, op=dist.ReduceOp.MIN)
    if finish.item():
        break
    time.sleep(0.05)  # the work
    step += 1
    worker.heartbeat(step)
    if rank == 0:
        line = {"step": step, "generation": context.generation, "world_size": dist.get_world_size(), "ts": time.time()}
        with (folder / "steps.jsonl").open("a") as steps:
            steps.write(json.dumps(line) + "\n")
    if step % 10 == 0:
        save()
    if worker.should_stop():
        save()
        worker.yielded(step)
        break
dist.barrier()
dist.destroy_process_group()
