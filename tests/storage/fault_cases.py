"""What the ranks of `test_s3_fault_ranks` do; functions by name, because they run in other processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from storage import Checkpointer
from storage.agent import AgentEnvironment
from storage.errors import StorageError
from tests.storage.death_cases import impatient

PLACEMENTS: dict[str, Placement] = {"sharded": Shard(0), "replicated": Replicate()}
ROWS, COLUMNS = 2400, 900
"""8.6 MB: what all ranks need of it is fetched in several pieces, by all of them."""


def make_state(step: int, layout: str) -> dict[str, Any]:
    """A large and a small tensor, each byte of which follows from the step, and a value."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    large = (torch.arange(ROWS * COLUMNS, dtype=torch.float32) + step).reshape(ROWS, COLUMNS)
    whole = {"large": large, "small": large[:3].clone()}
    placed = [PLACEMENTS[layout]]
    return {**{name: distribute_tensor(t, mesh, placed, src_data_rank=None) for name, t in whole.items()}, "n": step}


def is_state(state: Mapping[str, Any], step: int, layout: str) -> bool:
    """Whether this rank holds what belongs to the step, every byte of it."""
    wanted = make_state(step, layout)
    tensors = [(state[name], wanted[name]) for name in ("large", "small")]
    assert all(isinstance(found, DTensor) for found, _ in tensors)
    return state["n"] == step and all(torch.equal(found.to_local(), w.to_local()) for found, w in tensors)


def save(
    url: str, environment: Mapping[str, str], step: int, layout: str, service: str = ""
) -> list[tuple[str, dict[str, Any]]]:
    """Save the step, by the service that listens at `service` if there is one, and go on training; the events."""
    os.environ.update(environment)
    os.environ[AgentEnvironment.variable("service")] = service
    impatient()
    events: list[tuple[str, dict[str, Any]]] = []
    try:
        with Checkpointer(url, keep=9, on_event=lambda name, fields: events.append((name, fields))) as ckpt:
            ckpt.save(step, make_state(step, layout), wait=True)
            gradient = torch.ones(3)
            dist.all_reduce(gradient)
            assert gradient.tolist() == [dist.get_world_size()] * 3
    finally:
        del os.environ[AgentEnvironment.variable("service")]  # this process has other tests to run
    return events


def restore(url: str, environment: Mapping[str, str], layout: str) -> tuple[int, bool, str, list[str]]:
    """The step that is restored, whether all of it is right, what was raised instead, and what was read again why."""
    os.environ.update(environment)
    impatient()
    causes: list[str] = []

    def listen(name: str, fields: dict[str, Any]) -> None:
        if name == "checkpoint_retried":
            causes.extend(fields["retries"])

    state = make_state(0, layout)
    with Checkpointer(url, on_event=listen) as ckpt:
        try:
            step = ckpt.restore(state)
        except StorageError as error:
            return 0, False, f"{type(error).__name__}: {error}", causes
    return step, is_state(state, step, layout), "", causes
