"""A script that knows nothing of us: all-reduces until FOLDER/finish exists, then every rank ends.

Usage: stock.py FOLDER. Appends {"rank", "world_size", "pid", "restarts", ...} to FOLDER/started.jsonl as it starts.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT")
with (folder / "started.jsonl").open("a") as started:
    fields = {name: int(os.environ[name]) for name in names}
    started.write(json.dumps({**fields, "node": os.environ.get("ELASTIC_MOE_NODE"), "pid": os.getpid()}) + "\n")
while True:
    finish = torch.tensor([int((folder / "finish").exists())])
    dist.all_reduce(finish, op=dist.ReduceOp.MIN)
    if finish.item():
        break
    time.sleep(0.02)
dist.barrier()
dist.destroy_process_group()
