"""The script of `tests.bench.join_pause`: a state in rows over all ranks, and steps of 20 ms.

Usage: state.py FOLDER URL MIB. Writes each step down, and when it has come how far; stops at a step boundary when a
node comes.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from elastic_moe import worker
from elastic_moe.integrations.session import Session

NUM_TENSORS = 16
folder, url, mib = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])


def note(event: str) -> None:
    """Write down that it has come so far."""
    with (folder / "marks.jsonl").open("a") as marks:
        marks.write(json.dumps({"event": event, "ts": time.time(), "rank": os.environ["RANK"]}) + "\n")


note("script_imported")
worker.context()
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
note("ranks_met")
mesh = init_device_mesh("cpu", (world_size,))
num_rows = mib * 256 // NUM_TENSORS // world_size  # of 4 KiB
state = {f"w{k}": DTensor.from_local(torch.empty(num_rows, 1024), mesh, [Shard(0)]) for k in range(NUM_TENSORS)}
local = [tensor.to_local() for tensor in state.values()]
session = Session(url, keep=1)
session.checkpointer.start()
note("run_claimed")
step = session.restore(state)
if step:
    wrong = [k for k, rows in enumerate(local) if not bool((rows[:, 0] == k).all() and (rows[:, -1] == step).all())]
    assert not wrong, f"rank {rank} has restored something else than was saved: {wrong}"
else:
    for k, rows in enumerate(local):
        rows.fill_(float(k))
stops = False
while not stops:
    time.sleep(0.02)  # the work
    finish = torch.tensor([int((folder / "finish").exists())])
    dist.all_reduce(finish, op=dist.ReduceOp.MIN)
    step += 1
    for rows in local:
        rows[:, -1] = float(step)
    if rank == 0:
        with (folder / "steps.jsonl").open("a") as steps:
            line = {"step": step, "ts": time.time(), "pid": os.getpid(), "world_size": world_size}
            steps.write(json.dumps(line) + "\n")
    stops = session.end_step(step, lambda: state, save=step == 5) or bool(finish.item())
dist.barrier()
dist.destroy_process_group()
