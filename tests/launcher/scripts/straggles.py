"""Rank 1 sleeps longer than the others for a window of steps; then rank 2 computes longer before a collective."""

import time

import torch
import torch.distributed as dist

from elastic_moe import worker
from launcher.script.stragglers import WINDOW

dist.init_process_group("gloo")
rank = dist.get_rank()
for step in range(1, 2 * WINDOW + 1):
    if step <= WINDOW:
        time.sleep(0.1 if rank == 1 else 0.01)
    else:
        ends_s = time.thread_time() + (0.05 if rank == 2 else 0.001)
        while time.thread_time() < ends_s:
            pass
        dist.all_reduce(torch.ones(1))
    worker.heartbeat(step)
    worker.should_stop()
dist.barrier()
dist.destroy_process_group()
