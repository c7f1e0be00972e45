"""A script as README shows one, 60 steps; it saves after step 12 and 48, and once a worker is killed after step 30.

Usage: like_readme.py FOLDER checkpointer|own. With `own` it keeps its state in a file of its own, and nothing but
heartbeats tells how far it is. Rank 0 writes each step's beginning and end to FOLDER/steps.jsonl.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from elastic_moe import worker
from storage import Checkpointer

folder, mode = Path(sys.argv[1]), sys.argv[2]
worker.context()
dist.init_process_group("gloo")
state = {"model": torch.nn.Linear(8, 1)}
own = folder / "own"
rank, generation = dist.get_rank(), os.environ["ELASTIC_MOE_GENERATION"]


def train(step: int, save) -> None:
    while step < 60:
        began_ts = time.time()
        time.sleep(0.03)  # the work
        dist.barrier()
        step += 1
        if rank == 0:
            with (folder / "steps.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "generation": generation, "b": began_ts, "e": time.time()}) + "\n")
        worker.heartbeat(step)
        if step in (12, 48):
            save(step)
        dist.barrier()
        if (step, rank, generation) == (30, 1, "1"):
            os.kill(os.getpid(), signal.SIGKILL)


if mode == "own":
    train(int(own.read_text()) if own.exists() else 0, lambda step: rank or own.write_text(str(step)))
else:
    with Checkpointer(str(folder / "run")) as checkpointer:
        train(checkpointer.restore(state), lambda step: checkpointer.save(step, state, wait=True))
dist.barrier()
dist.destroy_process_group()
