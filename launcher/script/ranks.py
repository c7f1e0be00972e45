"""What a script's ranks do together, and on which device each computes. Imports torch.

`torch.accelerator.current_accelerator()` names what torch was built for, be it there or not: PyPI's torch is built for
CUDA, on a laptop too. Nothing here asks it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)


def highest(values: Sequence[float]) -> list[float]:
    """The maximum over all ranks of each value: one all-reduce, of float64, on the default process group.

    Without a process group the values themselves.
    """
    if not dist.is_initialized():
        return list(values)
    held = torch.tensor(values, dtype=torch.float64, device=collective_device())
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    agreed: list[float] = held.tolist()
    return agreed


def collective_device() -> torch.device:
    """A device whose tensors the default process group can reduce: the CPU wherever it can do that.

    By the kinds of device that the group has a backend for, as its name tells nothing: it is "undefined" where
    `init_process_group()` was left to choose, and "cpu:gloo,cuda:nccl" is two.
    """
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config().split(",")]
    if "cpu" in kinds or not torch.accelerator.is_available():
        return torch.device("cpu")
    bound = dist.group.WORLD.bound_device_id  # type: ignore[union-attr]
    return bound if bound is not None else torch.device(kinds[0])


def use_own_device(local_rank: int) -> None:
    """Make the accelerator of this local rank the current one, where there is one and nobody has chosen another yet.

    Without it every rank of a node would compute on the first. Where each worker sees only its own
    (`CUDA_VISIBLE_DEVICES`), that one is the current device anyway.
    """
    if not torch.accelerator.is_available():
        return
    num_devices = torch.accelerator.device_count()
    if local_rank < num_devices:
        if torch.accelerator.current_device_index() == 0:
            torch.accelerator.set_device_index(local_rank)
    elif num_devices > 1:
        log.warning("local rank %d has no device of its own: this node has %d", local_rank, num_devices)
