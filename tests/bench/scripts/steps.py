"""The script that the recovery benchmark runs under every launcher: it all-reduces, and writes each step down.

Usage: steps.py FOLDER. Knows nothing of any launcher but, where elastic_moe's agent is there, reports its progress.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

cooperates = "ELASTIC_MOE_CHANNEL" in os.environ
if cooperates:
    from elastic_moe import worker

    worker.context()
folder = Path(sys.argv[1])
dist.init_process_group("gloo")
saved = folder / "saved"
step = int(saved.read_text()) if saved.exists() else 0
while True:
    finish = torch.tensor([int((folder / "finish").exists())])
    dist.all_reduce(finish, op=dist.ReduceOp.MIN)
    if finish.item():
        break
    time.sleep(0.02)  # the work
    step += 1
    if dist.get_rank() == 0:
        with (folder / "steps.jsonl").open("a") as steps:
            line = {"step": step, "ts": time.time(), "pid": os.getpid(), "world_size": dist.get_world_size()}
            steps.write(json.dumps(line) + "\n")
        (folder / "saving").write_text(str(step))
        os.replace(folder / "saving", saved)
    if cooperates:
        worker.heartbeat(step)
        if worker.should_stop():
            dist.barrier()
            worker.yielded(step)
            break
dist.barrier()
dist.destroy_process_group()
