"""A model in shards, without a replica of any: of its state each rank writes down its part, after each step.

Usage: sharded.py FOLDER URL STORED. A state is written to FOLDER/after-STEP-GENERATION-RANK-WORLD_SIZE, and what was
restored to FOLDER/restored-... of those names. Step STORED is stored, every second one is held in memory, and every
tenth is to be stored. All ranks wait once FOLDER/limit says that there is no further step, though not for ever; and for
the copies of each state in memory, as what is staged meanwhile would not be copied.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from storage import Checkpointer

_PATIENCE_S = 300.0


class Training:
    """Two layers in shards, and AdamW, whose losses do not matter."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(37, 61), nn.ReLU(), nn.Linear(61, 11))
        for layer in self.model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "step": 0}
        self.folder = folder

    def step(self, step: int) -> None:
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 37, generator=generator)).square().mean().backward()
        self.optimizer.step()
        self.state["step"] = step

    def write(self, what: str, step: int) -> None:
        """What this rank holds, by name: what is in shards, and what is whole on each rank."""
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            of_parameter = {"": parameter, **self.optimizer.state[parameter]}
            for kind, tensor in of_parameter.items():
                where = "shard" if isinstance(tensor, DTensor) else "whole"
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                found[f"{where} {name} {kind}"] = local.detach().clone()
        found["whole step"] = torch.tensor(self.state["step"])
        generation = os.environ["ELASTIC_MOE_GENERATION"]
        path = self.folder / f"{what}-{step}-{generation}-{dist.get_rank()}-{dist.get_world_size()}"
        torch.save(found, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)


def may_go_on(folder: Path, step: int) -> bool:
    """Whether rank 0 has read that there is a further step, and that what was staged last is copied."""
    is_told = dist.get_rank() == 0 and step < int((folder / "limit").read_text()) and is_copied()
    told = torch.tensor([int(is_told)])
    dist.all_reduce(told)
    return bool(told.item())


def is_copied() -> bool:
    """Whether each rank's part of the newest state that was staged, if one was, is on two nodes."""
    lines = Path(os.environ["ELASTIC_MOE_EVENTS"]).read_text().split("\n")[:-1]
    events = [json.loads(line) for line in lines if '"event":"checkpoint_' in line]
    here = [event for event in events if event["generation"] == int(os.environ["ELASTIC_MOE_GENERATION"])]
    staged = max((event["step"] for event in here if event["event"] == "checkpoint_staged"), default=None)
    copied = {e["of_rank"] for e in here if (e["event"], e.get("step")) == ("checkpoint_copied", staged)}
    return staged is None or len(copied) == dist.get_world_size()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("url")
    parser.add_argument("stored", type=int)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    training = Training(args.folder)
    with Checkpointer(args.url, every=10, ram_every=2) as checkpointer:
        step = checkpointer.restore(training.state)
        if step:
            training.write("restored", step)
        deadline_s = time.monotonic() + _PATIENCE_S
        while True:
            if not may_go_on(args.folder, step):
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"nobody has let step {step + 1} begin in {_PATIENCE_S:g} s")
                time.sleep(0.02)
                continue
            deadline_s = time.monotonic() + _PATIENCE_S
            step += 1
            training.step(step)
            training.write("after", step)
            checkpointer.save(step, training.state, wait=step == args.stored)


if __name__ == "__main__":
    main()
