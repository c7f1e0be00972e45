"""What the ranks of `test_sharded` do; functions by name, because they run in other processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
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

from storage import Checkpointer, ShardReader, ShardWriter, open_store, register_scheme
from storage.errors import Fenced, StorageError, Transient
from storage.format.layout import is_heartbeat_name
from storage.run import owner
from storage.stores.local import LocalStore
from storage.stores.objects import ObjectInfo

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
            sharded = distribute_tensor(middle.weight, mesh["ep"], [Shard(0)])
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


class Failing(LocalStore):
    """Fails to put what `fails` says."""

    fails: Callable[[str], bool] = staticmethod(lambda key: False)

    def put(self, key: str, buffers: Sequence[Any], *, if_absent: bool = False) -> ObjectInfo:
        if self.fails(key):
            raise Transient("no more space")
        return super().put(key, buffers, if_absent=if_absent)


def fail_on_one_rank(folder: str, victim: int, where: str) -> list[tuple[str, dict[str, Any]]]:
    """A save that fails on rank `victim`, then one that does not; the events of this rank."""
    events: list[tuple[str, dict[str, Any]]] = []
    store = Failing(folder)
    register_scheme("failing", lambda rest: store)
    state = _rows(1)
    with Checkpointer("failing://", on_event=lambda name, fields: events.append((name, fields)), timeout_s=20) as ckpt:
        if dist.get_rank() == victim:
            store.fails = lambda key: where in key  # type: ignore[method-assign]
        ckpt.save(1, state, wait=True)
        assert not ckpt.wait()
        store.fails = lambda key: False  # type: ignore[method-assign]
        assert ckpt.restore(_rows(0)) == 0
        ckpt.save(2, state, wait=True)
        assert ckpt.wait()
    return events


def _rows(number: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {"w": distribute_tensor(torch.full((8, 5000), float(number)), mesh, [Shard(0)]), "n": number}


def mistake_on_one_rank(folder: str) -> list[str]:
    """Errors that only rank 1 can see; what every rank raises."""
    messages = []

    def attempt(call: Callable[[], Any]) -> None:
        try:
            call()
        except StorageError as error:
            messages.append(f"{type(error).__name__}: {error}")

    odd = dist.get_rank() == 1
    with Checkpointer(folder) as ckpt:
        attempt(lambda: ckpt.save(1, {**_rows(1), "extra": (lambda: 0) if odd else 0}))
        attempt(lambda: ckpt.save(1, {**_rows(1), "only": torch.ones(2 + dist.get_rank())}))
        ckpt.save(1, _rows(1), wait=True)
        attempt(lambda: ckpt.restore({**_rows(0), **({"other": 1} if odd else {})}))
    return messages


def fall_back(folder: str) -> tuple[int, int, list[str]]:
    """Restore a run whose newest checkpoint only one rank can find damaged: step, value, events of this rank."""
    names: list[str] = []
    state = _rows(0)
    with Checkpointer(folder, on_event=lambda name, fields: names.append(name)) as ckpt:
        step = ckpt.restore(state)
    whole = state["w"].full_tensor()
    assert (whole == state["n"]).all()
    return step, state["n"], names


def fenced(folder: str) -> list[str]:
    """Two saves after another owner has taken the run over; what the second one raises."""
    messages = []
    with Checkpointer(folder, generation=1, lineage="a") as ckpt:
        dist.barrier()
        if dist.get_rank() == 0:
            owner.claim(open_store(folder), owner.Owner(lineage="b", generation=0, epoch=0, token="another launch"))
        ckpt.save(1, _rows(1), wait=True)
        for step in (2, 3):
            try:
                ckpt.save(step, _rows(step))
            except Fenced as error:
                messages.append(str(error))
    return messages


class Hasty(LocalStore):
    """Shows the newest step to rank 0 only: a save has just committed it."""

    def folders(self, prefix: str) -> Sequence[str]:
        found = super().folders(prefix)
        return found if prefix or dist.get_rank() == 0 else found[:-1]


def read_while_saving(folder: str) -> list[int]:
    """What `dcp.load` reads of a run where the ranks see different steps; then what each rank reads alone."""
    register_scheme("hasty", lambda rest: Hasty(folder))
    numbers = []
    for alone in (False, True):
        whole = torch.zeros(8, 5000)
        state = {"w": whole, "n": 0} if alone else _rows(0)
        dcp.load(state, storage_reader=ShardReader("hasty://", no_dist=alone), no_dist=alone)
        assert ((whole if alone else state["w"].full_tensor()) == state["n"]).all()
        numbers.append(state["n"])
        dist.barrier()
    return numbers


def not_shared(folder: str) -> str:
    """Open a folder that each rank has for itself; what is raised."""
    try:
        Checkpointer(f"{folder}/{dist.get_rank()}").close()
    except StorageError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Silent(LocalStore):
    """Swallows the receipt of rank 1."""

    def put(self, key: str, buffers: Sequence[Any], *, if_absent: bool = False) -> ObjectInfo:
        if key.endswith("receipt-000001.json"):
            raise Transient("swallowed")
        return super().put(key, buffers, if_absent=if_absent)


def silent_rank(folder: str) -> str:
    """A save of which one rank can tell nobody how it went; the reason of its failure."""
    reasons: list[str] = []
    register_scheme("silent", lambda rest: Silent(folder))
    with Checkpointer(
        "silent://", on_event=lambda _, fields: reasons.append(fields.get("reason", "")), timeout_s=0.5
    ) as c:
        c.save(1, _rows(1), wait=True)
        assert not c.wait()
    return reasons[-1]


class BadMemory(LocalStore):
    """Every byte that is read into memory arrives with a flipped bit."""

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        etag = super().read_into(key, offset, buffers, if_match=if_match)
        buffers[-1][-1] ^= 1
        return etag


def bad_reader(folder: str) -> str:
    """Restore where rank 1's memory is bad; what is raised."""
    register_scheme("bad-memory", lambda rest: BadMemory(folder))
    with Checkpointer("bad-memory://" if dist.get_rank() == 1 else folder) as ckpt:
        try:
            ckpt.restore(_rows(0))
        except StorageError as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


class Unregistered:
    """A class that no safe loader knows."""


def unloadable(folder: str) -> tuple[str, str, list[str]]:
    """Restore a value of a class that was registered for the save only; what is raised by both ways, and events."""
    seen: list[str] = []
    with torch.serialization.safe_globals([Unregistered]), Checkpointer(folder) as ckpt:
        ckpt.save(1, _rows(1), wait=True)
        ckpt.save(2, {**_rows(2), "value": Unregistered()}, wait=True)
    found = []
    with Checkpointer(folder, on_event=lambda name, fields: seen.append(name)) as ckpt:
        for read in (
            lambda: ckpt.restore({**_rows(0), "value": None}),
            lambda: dcp.load({"value": None}, storage_reader=ShardReader(f"{folder}/step-000000002")),
        ):
            try:
                read()
            except (StorageError, dcp.CheckpointException) as error:
                found.append(f"{type(error).__name__}: {error}")
    return found[0], found[1], seen


class Unreachable(LocalStore):
    """Data objects cannot be read."""

    def read_into(self, key: str, *args: Any, **kwargs: Any) -> str:
        raise Transient("unreachable")


def damage_and_outage(folder: str) -> str:
    """Restore where rank 0 finds damage and rank 1 finds the store unreachable; what is raised."""
    register_scheme("unreachable", lambda rest: Unreachable(folder))
    url = "unreachable://" if dist.get_rank() == 1 else folder
    with Checkpointer(url) as ckpt:
        try:
            ckpt.restore(_rows(0))
        except StorageError as error:
            return type(error).__name__
    return "nothing"


def save_rows(folder: str, steps: Sequence[int]) -> None:
    with Checkpointer(folder) as ckpt:
        for step in steps:
            ckpt.save(step, _rows(step), wait=True)
            assert ckpt.wait()


class Deadly(LocalStore):
    """Counts the changes it makes, and kills its process at one of them: before it, in the middle, or after.

    Beats do not count: they come at any time.
    """

    def __init__(self, root: str, kill_at: int, moment: str) -> None:
        super().__init__(root)
        self.num_changes = 0
        self._kill_at = kill_at
        self._moment = moment

    def _die(self, moment: str) -> None:
        if self.num_changes == self._kill_at and self._moment == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def put(self, key: str, buffers: Sequence[Any], *, if_absent: bool = False) -> ObjectInfo:
        if is_heartbeat_name(key):
            return super().put(key, buffers, if_absent=if_absent)
        self._die("before")
        info = super().put(key, buffers, if_absent=if_absent)
        self._die("after")
        self.num_changes += 1
        return info

    def delete(self, key: str) -> None:
        if is_heartbeat_name(key):
            super().delete(key)
            return
        self._die("before")
        super().delete(key)
        self._die("after")
        self.num_changes += 1

    def _place(self, temporary: Path, path: Path, if_absent: bool) -> None:
        if not is_heartbeat_name(path.name):
            self._die("middle")
        super()._place(temporary, path, if_absent)


def save_and_die(folder: str, step: int, victim: int, kill_at: int, moment: str) -> int:
    """Save `step`, keeping only it; rank `victim` kills itself at its change number `kill_at`. Changes made."""
    store = Deadly(folder, kill_at if dist.get_rank() == victim else -1, moment)
    register_scheme("deadly", lambda rest: store)
    with Checkpointer("deadly://", keep=1, lineage="a") as ckpt:
        ckpt.save(step, _rows(step), wait=True)
        assert ckpt.wait()
    return store.num_changes
