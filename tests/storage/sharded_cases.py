"""What the ranks of `test_sharded` do; functions by name, because they run in other processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from storage import Checkpointer, ShardReader, ShardWriter

# name -> (world size, shape of the mesh); "ep": dim 0 of the middle layer is sharded twice, as for experts
LAYOUTS: dict[str, tuple[int, tuple[int, ...]]] = {
    "plain": (1, ()),
    "fsdp2": (2, (2,)),
    "fsdp3": (3, (3,)),
    "fsdp4": (4, (4,)),
    "hsdp2x2": (4, (2, 2)),
    "ep2x2": (4, (2, 2)),
}
Full = dict[str, torch.Tensor]


class App(Stateful):
    """A small model with its AdamW state, on one of the layouts."""

    def __init__(self, layout: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(10, 7), nn.Linear(7, 6, bias=False), nn.Linear(6, 3))
        shape = LAYOUTS[layout][1]
        if layout == "ep2x2":
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("fsdp", "ep"))
            middle = self.model[1]
            sharded = distribute_tensor(middle.weight, mesh["ep"], [Shard(0)])  # type: ignore[arg-type]
            middle.register_parameter("weight", nn.Parameter(sharded))
            fully_shard(middle, mesh=mesh["fsdp"])
            fully_shard(self.model[0], mesh=mesh["fsdp"])
            fully_shard(self.model[2], mesh=mesh["fsdp"])
        elif shape:
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
            for layer in self.model:
                fully_shard(layer, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, foreach=False)

    def step(self, factor: float) -> None:
        """One optimizer step on made-up gradients, the same on every layout."""
        for parameter in self.model.parameters():
            parameter.grad = parameter.detach() * factor
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def full(self) -> Full:
        """Every tensor of the state, whole, by its path."""
        found: Full = {}

        def walk(path: str, value: Any) -> None:
            if isinstance(value, dict):
                for key, entry in value.items():
                    walk(f"{path}.{key}", entry)
            elif isinstance(value, torch.Tensor):
                found[path] = value.full_tensor() if isinstance(value, DTensor) else value.clone()

        walk("", self.state_dict())
        return found


def state_of(app: App, step: int) -> dict[str, Any]:
    extra = torch.arange(70.0).reshape(10, 7) * step
    if dist.is_initialized() and dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return {
            "app": app,
            "columns": distribute_tensor(extra, mesh, [Shard(1)]),
            "replicated": distribute_tensor(extra, mesh, [Replicate()]),
            "step": step,
        }
    return {"app": app, "columns": extra, "replicated": extra.clone(), "step": step}


def save(url: str, layout: str) -> Full:
    """Train a little and save with the Checkpointer."""
    app = App(layout, seed=1)
    app.step(0.2)
    with Checkpointer(url) as ckpt:
        ckpt.save(1, state_of(app, 1), wait=True)
        app.step(0.3)
        ckpt.save(2, state_of(app, 2), wait=True)  # by the cached plan
        assert ckpt.wait()
    return app.full()


def load(urls: dict[str, str], layout: str) -> dict[str, Full]:
    """Restore each run into a model of its own; what was loaded, and the extra tensors."""
    found = {}
    for name, url in urls.items():
        app = App(layout, seed=100)
        state = state_of(app, 0)
        with Checkpointer(url) as ckpt:
            assert ckpt.restore(state) == 2
        assert state["step"] == 2
        extra = {key: _whole(state[key]) for key in ("columns", "replicated")}
        found[name] = {**app.full(), **extra}
    return found


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def interchange(folder: str, layout: str) -> None:
    """Stock dcp.save -> our readers; our writers -> stock dcp.load; our planner classes under async_save."""
    app = App(layout, seed=1)
    app.step(0.2)
    expected = app.full()

    def check(load_with: Callable[[dict[str, Any]], Any]) -> None:
        fresh = App(layout, seed=50)
        state = state_of(fresh, 0)
        load_with(state)
        assert state["step"] == 7
        found = fresh.full()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        assert torch.equal(_whole(state["columns"]), torch.arange(70.0).reshape(10, 7) * 7)

    def ours(state: dict[str, Any]) -> None:
        with Checkpointer(f"{folder}/stock") as ckpt:
            assert ckpt.restore(state) == 7

    dcp.save(state_of(app, 7), checkpoint_id=f"{folder}/stock/step-000000007")
    check(ours)
    check(lambda state: dcp.load(state, storage_reader=ShardReader(f"{folder}/stock")))

    with Checkpointer(f"{folder}/ours") as ckpt:
        ckpt.save(7, state_of(app, 7), wait=True)
    check(lambda state: dcp.load(state, checkpoint_id=f"{folder}/ours/step-000000007"))
    check(lambda state: dcp.load(state, storage_reader=ShardReader(f"{folder}/ours/step-000000007")))

    dcp.save(state_of(app, 7), storage_writer=ShardWriter(f"{folder}/writer/step-000000007"))
    check(lambda state: dcp.load(state, checkpoint_id=f"{folder}/writer/step-000000007"))
    check(lambda state: dcp.load(state, storage_reader=ShardReader(f"{folder}/writer")))
    dcp.async_save(state_of(app, 7), storage_writer=ShardWriter(f"{folder}/async")).result()
    check(lambda state: dcp.load(state, storage_reader=ShardReader(f"{folder}/async")))
