"""What the ranks of `test_s3_deaths` do; functions by name, because they run in other processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from storage import Checkpointer, JobIdentity
from storage.errors import Cause
from storage.stores import retry_policy
from storage.stores.s3 import bucket

LINEAGE = "deaths"
"""Of one launch: whoever comes next does not ask whether the dead are alive."""
ROWS, COLUMNS = 2624, 1024
"""Of a float32 tensor: a little more than 5 MiB on each of two ranks, which goes up in two parts."""


def whole(step: int) -> dict[str, Any]:
    """The state of a step, on one rank."""
    return {"large": torch.full((ROWS, COLUMNS), float(step)), "small": torch.full((8, 5), float(step)), "n": step}


def is_whole(state: Mapping[str, Any], step: int) -> bool:
    """Whether it is that of the step, every byte of it."""
    return state["n"] == step and all(bool((state[name] == step).all()) for name in ("large", "small"))


def shards(step: int) -> dict[str, Any]:
    """The same in rows over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        name: distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in whole(step).items()
    }


def impatient() -> None:
    """Failures that stay are given up soon, in this process from now on."""
    for cause, rule in impatient_rules().items():
        retry_policy.RULES[cause] = rule  # type: ignore[index]


def impatient_rules() -> dict[Cause, retry_policy.Rule]:
    """What is tried again then, and how often: more where half a second without a word counts, as on a busy machine."""
    tries = {cause: min(rule.num_tries, 3) for cause, rule in retry_policy.RULES.items()} | {Cause.STALLED: 20}
    return {cause: retry_policy.Rule(num, 0.001, 0.01, 60.0) for cause, num in tries.items()}


def save(url: str, environment: Mapping[str, str], step: int, timeouts_s: list[float]) -> bool | None:
    """Save `step`, keeping only it; whether it has committed, or None where another rank was lost before the save."""
    os.environ.update(environment)
    impatient()
    bucket._verdicts.clear()  # so that every run asks the server what it honours
    try:
        ckpt = Checkpointer(url, keep=1, job=JobIdentity(lineage=LINEAGE), timeout_s=timeouts_s[dist.get_rank()])
        ckpt.save(step, shards(step))
    except RuntimeError:  # gloo's, of a peer that is gone
        return None
    with ckpt:
        return ckpt.wait()
