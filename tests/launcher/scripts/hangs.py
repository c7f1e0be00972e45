"""A worker that hangs in its first generation: rank 1 at step 6, so that the others hang in a collective.

Usage: hangs.py FOLDER HOW. HOW is `sleep`, `spin`, `stop` (SIGSTOP to itself) or `silent` (no heartbeats: lines of
output instead). In later generations all ranks do eight steps and end.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from elastic_moe import worker

folder, how = Path(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
rank = dist.get_rank()


def gets_stuck() -> None:
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    while how == "spin":
        pass
    time.sleep(600)


for step in range(1, 9):
    if step == 6 and rank == 1 and os.environ["ELASTIC_MOE_GENERATION"] == "1":
        gets_stuck()
    dist.all_reduce(torch.ones(1))
    if how == "silent":
        print("step", step)
    else:
        worker.heartbeat(step)
    time.sleep(0.05)
(folder / f"done-{rank}").touch()
dist.barrier()
dist.destroy_process_group()
