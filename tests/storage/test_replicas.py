"""Silent corruption: replicas are compared, the odd one out is named and set right, and a tie goes to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from storage import Checkpointer, PerRank
from storage.errors import ReplicasDiffer
from storage.saving.replicas import Differing, device_sum, find_differing, sums_of
from tests.ranks import Ranks


def test_the_minority_is_found_and_a_tie_told_as_one() -> None:
    alike = {"a": 1, "b": 2}
    assert find_differing([alike, alike, alike]) == []
    assert find_differing([alike, {"a": 9, "b": 2}, alike]) == [Differing("a", (1,), 0, (0, 2))]
    assert find_differing([{"a": 9}, {"a": 1}, {"a": 1}, {"a": 7}, {"a": 1}]) == [Differing("a", (0, 3), 1, (1, 2, 4))]
    assert find_differing([{"a": 1}, {"a": 2}]) == [Differing("a", (0, 1), None)]
    assert find_differing([{"a": 1}, {"a": 2}, {"a": 1}, {"a": 2}]) == [Differing("a", (0, 1, 2, 3), None)]
    assert find_differing([{"a": 1}, {"b": 2}]) == []  # shards that nobody else holds


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64]
)
def test_a_sum_tells_any_bit_wherever_it_is_made(dtype: torch.dtype) -> None:
    drawn = torch.randint(0, 2, (1100, 1000), generator=torch.Generator().manual_seed(1))
    tensor = drawn.to(dtype)
    for odd in (tensor, tensor.t(), tensor[:, 3:500]):
        assert device_sum(odd).item() == device_sum(odd.clone(memory_format=torch.contiguous_format)).item()
    before = device_sum(tensor).item(), sums_of([tensor])
    for at in (0, 77, 1_048_575, 1_048_576, tensor.numel() - 1):
        changed = tensor.clone()
        changed.view(-1).view(torch.uint8)[at * changed.element_size()] ^= 1
        assert device_sum(changed).item() != before[0]
        assert sums_of([changed]) != before[1]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)


def trained() -> tuple[Model, torch.optim.Optimizer]:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.last(model.norm(model.first(torch.ones(4, 6)))).sum().backward()
    optimizer.step()
    return model, optimizer


def flip(tensor: torch.Tensor) -> None:
    """Change the lowest bit of the first number."""
    with torch.no_grad():
        tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def corrupted(folder: str, odd_ranks: tuple[int, ...], where: str) -> tuple[list[dict[str, Any]], str, bool, int]:
    """What is told, raised, and so on the ranks; whether the state is what it must be; the newest step then."""
    heard: list[dict[str, Any]] = []
    model, optimizer = trained()
    good = {name: value.clone() for name, value in model.state_dict().items()}
    moment = optimizer.state[model.last.weight]["exp_avg"]
    rank = dist.get_rank()
    model.norm.running_mean.fill_(float(rank))  # type: ignore[union-attr,operator]
    state = {"model": nn.parallel.DistributedDataParallel(model, broadcast_buffers=False), "optim": optimizer}
    state |= {"rng": PerRank(torch.full((3,), float(rank)))}
    error = ""
    on_event = lambda event, fields: heard.append({"event": str(event), **fields})  # noqa: E731
    with Checkpointer(folder, every=4, check_replicas=2, on_event=on_event) as ckpt:
        ckpt.restore(state)
        for step in range(1, 5):
            if step == 3 and rank in odd_ranks:
                flip(model.first.weight if where == "weight" else moment)
            try:
                ckpt.save(step, state, wait=step == 1)
            except ReplicasDiffer as raised:
                error = str(raised)
                break
        ckpt.wait()
        newest = ckpt.restore(state)
    whole = all(torch.equal(value, good[name]) for name, value in model.state_dict().items() if "norm." not in name)
    return [row for row in heard if row["event"] == "checkpoint_replica_differs"], error, whole, newest


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_the_odd_replica_out_is_named_and_given_what_most_hold(ranks: Ranks, tmp_path: Path, where: str) -> None:
    (told, error, whole, newest), *others = ranks.run(
        corrupted, str(tmp_path), (1,), where, world_size=3, timeout_s=180
    )
    assert error == "" and whole and newest == 4
    assert all(row[1:] == ("", True, 4) and row[0] == [] for row in others)
    (row,) = told
    assert row["host"]
    assert (row["step"], row["on_rank"], row["others"], row["num"], row["healed"]) == (4, 1, [0, 2], 1, True)
    assert row["name"].startswith("model.first.weight" if where == "weight" else "optim.state.last.weight.exp_avg")


def test_two_that_differ_stop_the_job_before_anything_is_saved(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks.run(corrupted, str(tmp_path), (1,), "weight", world_size=2, timeout_s=180)
    for _, error, whole, newest in found:
        assert "after step 4 rank 0 and rank 1 hold 'model.first.weight" in error
        assert newest == 1 and whole  # the last state that was the same on both
    assert [row["healed"] for row in found[0][0]] == [False, False]
    assert {row["on_rank"] for row in found[0][0]} == {0, 1}


def sharded(folder: str) -> tuple[str, list[dict[str, Any]]]:
    """Two shards on two replicas, of which one holds one shard differently; and a tensor that each rank holds whole."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    weight = distribute_tensor(torch.arange(8.0), mesh, [Replicate(), Shard(0)])
    assert isinstance(weight, DTensor)
    heard: list[dict[str, Any]] = []
    on_event = lambda event, fields: heard.append({"event": str(event), **fields})  # noqa: E731
    with Checkpointer(folder, every=10, check_replicas=1, on_event=on_event) as ckpt:
        ckpt.save(1, {"weight": weight, "step": 1})
        if dist.get_rank() == 3:
            flip(weight.to_local())
        try:
            ckpt.save(2, {"weight": weight, "step": 2})
        except ReplicasDiffer as error:
            return str(error), heard
    return "", heard


def test_a_shard_is_compared_with_its_copy_alone(ranks: Ranks, tmp_path: Path) -> None:
    (error, heard), *_ = ranks.run(sharded, str(tmp_path), world_size=4, timeout_s=180)
    assert error.startswith("after step 2 rank 1 and rank 3 hold 'weight[4]' differently")
    assert [(row["on_rank"], row["others"]) for row in heard if row["event"] == "checkpoint_replica_differs"] == [
        (1, [3]),
        (3, [1]),
    ]


def test_alone_nothing_is_compared(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, check_replicas=1) as ckpt:
        ckpt.save(1, {"w": torch.ones(3)}, wait=True)
        assert ckpt.wait()
