"""What each rank does in the tests on S3 servers; module-level, so that the ranks' processes can import it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from storage import Checkpointer

SHAPE = (1300, 640)


def _enter(environment: Mapping[str, str]) -> None:
    """A rank's process serves many tests, and s3fs keeps its clients whatever the environment says later."""
    import s3fs

    os.environ.update(environment)
    s3fs.S3FileSystem.clear_instance_cache()


def full(step: int) -> torch.Tensor:
    """The value of the sharded tensor at a step."""
    return torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.float32).reshape(SHAPE) + step


def make_state(step: int) -> dict[str, Any]:
    """A sharded and a replicated tensor, a small one of its own type, and a value."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "sharded": distribute_tensor(full(step), mesh, [Shard(0)]),
        "replicated": distribute_tensor(full(step)[:3], mesh, [Replicate()]),
        "bias": torch.full((7,), float(step), dtype=torch.bfloat16),
        "step": step,
    }


def is_state(state: Mapping[str, Any], step: int) -> bool:
    """Whether `state` is what `make_state` makes."""
    sharded, replicated = state["sharded"], state["replicated"]
    assert isinstance(sharded, DTensor) and isinstance(replicated, DTensor)
    return (
        torch.equal(sharded.full_tensor(), full(step))
        and torch.equal(replicated.to_local(), full(step)[:3])
        and torch.equal(state["bias"], torch.full((7,), float(step), dtype=torch.bfloat16))
        and state["step"] == step
    )


def save_steps(url: str, environment: Mapping[str, str], steps: list[int]) -> list[tuple[str, dict[str, Any]]]:
    """Save the steps; the events."""
    _enter(environment)
    events: list[tuple[str, dict[str, Any]]] = []
    with Checkpointer(url, keep=2, on_event=lambda name, fields: events.append((name, fields))) as ckpt:
        for step in steps:
            ckpt.save(step, make_state(step), wait=True)
    return events


def restore(url: str, environment: Mapping[str, str]) -> tuple[int, bool]:
    """The step that is restored, and whether all of it is right."""
    _enter(environment)
    state = make_state(0)
    with Checkpointer(url) as ckpt:
        step = ckpt.restore(state)
    return step, is_state(state, step)


def save_with_stock(url: str, environment: Mapping[str, str], step: int) -> None:
    """Stock DCP's writer on s3fs."""
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    _enter(environment)
    dcp.save(make_state(step), storage_writer=FsspecWriter(url, thread_count=2))


def load_with_stock(url: str, environment: Mapping[str, str], step: int) -> bool:
    """Stock DCP's reader on s3fs; whether all of it is right."""
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    _enter(environment)
    state = make_state(0)
    dcp.load(state, storage_reader=FsspecReader(url))
    return is_state(state, step)
