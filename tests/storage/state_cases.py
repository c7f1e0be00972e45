"""What every rank does in the tests of states."""

from __future__ import annotations

import shutil
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from storage import Checkpointer, PerRank
from storage.errors import StorageError, UsageError
from tests.storage.states import Draw, fresh, plain, same


def _mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def save_draws(folder: str, seeds: list[int]) -> list[str]:
    """Save the states of these seeds, a run each; for each "" or why it was refused."""
    mesh, found = _mesh(), []
    for seed in seeds:
        state = Draw(seed, dist.get_rank(), mesh).state()
        with Checkpointer(f"{folder}/{seed}") as checkpointer:
            try:
                checkpointer.save(1, state)
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
            else:
                found.append("" if checkpointer.wait() else "not committed")
    return found


def restore_draws(folder: str, seeds: list[int], num_saved: int) -> list[str]:
    """Restore them into fresh states; for each "" or what is wrong."""
    mesh, rank, found = _mesh(), dist.get_rank(), []
    for seed in seeds:
        # of a rank of its own that did not save nothing is known
        expected = Draw(seed, rank, mesh).state()
        state = fresh(expected, seed)
        own = {key for key, part in expected.items() if type(part).__name__ == "PerRank" and rank >= num_saved}
        before = {key: plain(state[key]) for key in own}
        try:
            with Checkpointer(f"{folder}/{seed}") as checkpointer:
                step = checkpointer.restore(state)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
            continue
        wrong = [
            f"{key}: {plain(state[key])} is not {wanted}"
            for key, wanted in ((key, before.get(key, plain(expected[key]))) for key in expected)
            if not same(plain(state[key]), wanted)
        ]
        found.append("; ".join(wrong) if step == 1 else f"step {step}")
    dist.barrier()
    if rank == 0:
        for seed in seeds:
            shutil.rmtree(f"{folder}/{seed}", ignore_errors=True)
    return found


LAYOUTS = {"plain": 1, "ddp": 2, "fsdp1": 2, "fsdp2": 3, "hsdp": 4}
"""How a model is laid out, and over how many ranks."""


def app(layout: str, seed: int) -> dict[str, Any]:
    """A model in that layout, with an optimizer and a schedule that know nothing of it."""
    torch.manual_seed(seed)
    net: nn.Module = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 7, bias=False), nn.Linear(7, 3))
    world_size = dist.get_world_size()
    if layout == "ddp":
        net = nn.parallel.DistributedDataParallel(net)
    elif layout == "fsdp1":
        net = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    elif layout in ("fsdp2", "hsdp"):
        shape, names = ((world_size,), ("s",)) if layout == "fsdp2" else ((2, world_size // 2), ("r", "s"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in [*net, net]:
            fully_shard(layer, mesh=mesh)
            layer.set_gradient_divide_factor(1.0)
            layer.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    return {"model": net, "optimizer": optimizer, "schedule": torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 4])}


def train(state: dict[str, Any], num_steps: int) -> None:
    """Steps with the same gradients in any layout."""
    for number in range(num_steps):
        for name, parameter in state["model"].named_parameters():
            generator = torch.Generator().manual_seed(len(name) + number)
            if isinstance(parameter, DTensor):
                whole = torch.randn(parameter.shape, generator=generator)
                parameter.grad = distribute_tensor(
                    whole, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            else:
                parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
        state["optimizer"].step()
        state["schedule"].step()


def full(state: dict[str, Any]) -> dict[str, Any]:
    """Whole tensors on every rank, by torch's own names."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=False)
    weights, moments = get_state_dict(state["model"], state["optimizer"], options=options)
    return {"model": weights, "optimizer": moments, "schedule": state["schedule"].state_dict()}


def save_layout(folder: str, layout: str) -> dict[str, Any]:
    """Train and save; what was saved (rank 0)."""
    state = app(layout, seed=1)
    train(state, 3)
    with Checkpointer(f"{folder}/{layout}") as checkpointer:
        checkpointer.save(3, state, wait=True)
    return full(state)


def load_layouts(folder: str, layout: str, sources: list[str]) -> dict[str, Any]:
    """By the layout that saved, what a fresh app of this layout then has (rank 0)."""
    found = {}
    for saved in sources:
        state = app(layout, seed=2)
        with Checkpointer(f"{folder}/{saved}") as checkpointer:
            assert checkpointer.restore(state) == 3
        found[saved] = full(state)
    return found


def own_of_ranks(folder: str, is_first: bool) -> tuple[Any, list[str]]:
    """Each rank's own, in several forms; what this rank has in the end, and its events."""
    rank, events = dist.get_rank(), []
    loader = StatefulDataLoader(list(range(100 * rank, 100 * rank + 20)), batch_size=2)
    batches = iter(loader)
    own = {"rng": torch.full((rank + 2,), rank + 10), "position": [rank] * rank, f"only-{rank}": rank}
    state = {"own": PerRank(own if is_first else {"fresh": rank}), "loader": loader, "w": torch.ones(3)}
    with Checkpointer(folder, on_event=lambda name, fields: events.append(name)) as checkpointer:
        if is_first:
            for _ in range(rank + 1):
                next(batches)
            checkpointer.save(1, state, wait=True)
        else:
            assert checkpointer.restore(state) == 1
    return (state["own"].value, next(batch.tolist()[0] for batch in loader)), events  # type: ignore[return-value]


def different(folder: str) -> list[str]:
    """What every rank hears of states that differ between ranks; "" where they may."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    odd = nn.Linear(2, 2)  # no DDP, and no common seed
    batch_norm = nn.BatchNorm1d(2)
    batch_norm.running_mean.fill_(rank)
    equal = ["a" + "b"] * 2 if rank else ["ab", "".join(["a", "b"])]  # their pickles differ
    cases: list[dict[str, Any]] = [
        {"x": rank},
        {"d": {"rng": torch.arange(5) + rank}},
        {"big": torch.arange(10) == rank, "y": {"z": [1, {"t": (rank,)}]}},
        {"model": odd},
        {"model": batch_norm, "e": equal, "n": float("nan"), "s": {1, 2}, "same": torch.ones(3)},
        {f"of-{rank}": rank, "w": torch.ones(2)},
        {"own": PerRank(rank)},
        {"o": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1 * (rank + 1))},
        {"kind": PerRank(5) if rank else 5},
        {"hist": [{"loss": 1.0}] * (1 + rank)},
        {"own": PerRank(odd)},
    ]
    found = []
    for number, state in enumerate(cases):
        with Checkpointer(f"{folder}/{number}") as checkpointer:
            try:
                checkpointer.save(1, state)
                assert checkpointer.wait()
                found.append("")
            except UsageError as error:
                found.append(str(error))
    with Checkpointer(f"{folder}/lenient") as checkpointer:
        checkpointer.save(1, {"x": rank}, compare_ranks=False)
        assert checkpointer.wait()
    return found


def later_difference(folder: str) -> str:
    """A value that is the same at first, and then is not."""
    with Checkpointer(folder) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": torch.ones(2), "x": 5, "y": [step]}, wait=True)
        try:
            checkpointer.save(3, {"w": torch.ones(2), "x": 5, "y": [dist.get_rank()]})
        except UsageError as error:
            return str(error)
    return ""


def failure_beside_collectives(folder: str) -> list[str]:
    """One rank fails where the state of another object is a collective; what every rank hears."""
    rank, found = dist.get_rank(), []

    class Broken:
        def state_dict(self) -> Any:
            if rank == 0:
                raise RuntimeError("broken on purpose")
            return {"x": 1}

        def load_state_dict(self, state: Any) -> None:
            self.state_dict()

    class Meets:
        def state_dict(self) -> Any:
            dist.barrier()
            return {"y": 1}

        def load_state_dict(self, state: Any) -> None:
            dist.barrier()

    class Fine(Broken):
        def state_dict(self) -> Any:
            return {"x": 1}

        def load_state_dict(self, state: Any) -> None:
            super().state_dict()

    loader = torch.utils.data.DataLoader([1]) if rank == 0 else 5  # type: ignore[arg-type]
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(1, {"a": Fine(), "m": Meets()}, wait=True)
        for call in (
            lambda: checkpointer.save(2, {"a": Broken(), "m": Meets()}),
            lambda: checkpointer.save(2, {"a": loader, "m": Meets()}),
            lambda: checkpointer.restore({"a": Fine(), "m": Meets()}),
        ):
            try:
                call()
            except StorageError as error:
                found.append(str(error))
    return found
