"""A job that writes down what it does, so that a checker can say whether two worlds ever ran at once.

Usage: job.py FOLDER [--stock] [--deaf] [--hang STEP] [--fail STEP] [--saves HOW]. Every rank writes each step, with
when it began and ended, to a file FOLDER/steps-*.jsonl of its own, and keeps the time at which it was last alive in
FOLDER/lives. The step is saved after each, under the generation that saved it: a worker that thaws late writes over no
newer one's; or by a Checkpointer, through the node's service, which holds each step in memory, or directly. All ranks
end once FOLDER/finish exists. With --stock nothing of elastic_moe is used; with --deaf SIGTERM is ignored; with --hang
one rank stays out of the collective of that step for ever, once; with --fail that step always fails.
"""

import argparse
import contextlib
import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--stock", action="store_true")
parser.add_argument("--deaf", action="store_true")
parser.add_argument("--hang", type=int)
parser.add_argument("--fail", type=int)
parser.add_argument("--saves", choices=("file", "service", "direct"), default="file")
args = parser.parse_args()
folder: Path = args.folder
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
generation, node = int(os.environ["ELASTIC_MOE_GENERATION"]), os.environ["ELASTIC_MOE_NODE"]
who = {"rank": rank, "world_size": world_size, "generation": generation, "node": node, "pid": os.getpid()}


def beat_for_life() -> None:
    path = folder / "lives" / f"{generation}-{rank}-{os.getpid()}-{node}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(8))
    with path.open("r+b") as file:
        life = mmap.mmap(file.fileno(), 8)
    while True:
        struct.pack_into("<d", life, 0, time.monotonic())
        time.sleep(0.01)


def restore() -> int:
    if ckpt is not None:
        state = {"step": 0, "w": torch.zeros(1000)}
        found = ckpt.restore(state)
        if state["step"] != found or not bool((state["w"] == found).all()):
            sys.exit(f"what was restored for step {found} is not its state")
        return found
    saves = {int(path.suffix[1:]): path for path in folder.glob("saved.*") if path.suffix != ".tmp"}
    return int(saves[max(saves)].read_text()) if saves else 0


def save(step: int) -> None:
    if ckpt is not None:
        ckpt.save(step, {"step": step, "w": torch.full((1000,), float(step))})
        return
    if rank != 0:
        return
    part = folder / f"saving-{generation}.tmp"
    part.write_text(str(step))
    os.replace(part, folder / f"saved.{generation}")


if args.deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if not args.stock:
    from elastic_moe import worker

    worker.context()
threading.Thread(target=beat_for_life, daemon=True).start()
ends = contextlib.ExitStack()
ckpt: Any = None
dist.init_process_group("gloo")
if args.saves != "file":
    from storage import Checkpointer

    by_service = args.saves == "service"
    ckpt = ends.enter_context(
        Checkpointer(folder / "run", every=5 if by_service else 1, ram_every=1 if by_service else None)
    )
step = restore()
with (folder / f"steps-{generation}-{rank}-{os.getpid()}.jsonl").open("a", buffering=1) as steps:
    while True:
        begin_s = time.monotonic()
        if step + 1 == args.fail and rank == world_size - 1:
            raise ArithmeticError(f"step {step + 1} cannot be computed")
        if step + 1 == args.hang and rank == world_size - 1 and not (folder / "hung").exists():
            (folder / "hung").touch()
            threading.Event().wait()
        told = torch.tensor([step, int((folder / "finish").exists())])
        dist.all_reduce(told)
        if told[0] != step * world_size:
            sys.exit(f"rank {rank} is at step {step}, the ranks together at {told[0]} of {world_size}")
        if told[1] == world_size:
            break
        time.sleep(0.02)  # the work
        step += 1
        steps.write(json.dumps({**who, "step": step, "begin_s": begin_s, "end_s": time.monotonic()}) + "\n")
        save(step)
        if args.stock:
            continue
        worker.heartbeat(step, step_s=time.monotonic() - begin_s)
        if worker.should_stop():
            if ckpt is not None:
                ckpt.wait(held=True)  # who has yielded is ended, with what it has not saved
            dist.barrier()
            worker.yielded(step)
            break
dist.barrier()
ends.close()
dist.destroy_process_group()
