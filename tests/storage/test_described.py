"""A state that is as it was, but for its numbers, is not planned anew; any other is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from storage import Checkpointer
from storage.errors import UnsupportedValue
from storage.saving.describe import Holdings, chunk_of, describe
from storage.state.objects import open_state


@pytest.fixture(scope="module", autouse=True)
def alone_in_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(*placements: Any, rows: int = 4) -> DTensor:
    mesh = init_device_mesh("cpu", (1,) * len(placements))
    return DTensor.from_local(torch.randn(rows, 3), mesh, placements, run_check=False)


def state(**changes: Any) -> dict[str, Any]:
    made = {"w": sharded(Shard(0)), "plain": torch.randn(5), "deep": {"list": [1, torch.ones(2)], "text": "a"}, "n": 3}
    return {**made, **changes}


def told(holdings: Holdings) -> tuple[Any, ...]:
    return holdings.chunks, holdings.containers, holdings.digest, [item and item.index for item in holdings.items]


class OfItsOwn(torch.Tensor):
    """A tensor of somebody's class."""


def test_what_dcp_need_not_be_asked_about_is_listed_as_it_would() -> None:
    odd = torch.randn(3).as_subclass(OfItsOwn)
    made = state(parameter=torch.nn.Parameter(torch.ones(2, 0)), scalar=torch.tensor(1.5), odd=odd, none=None, set={1})
    flat, _ = open_state(made, 0)
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(flat.leaves, is_coordinator=True)
    items = planner.create_local_plan().items
    found = describe(made, 0)
    assert list(found.chunks) == [chunk_of(item, flat.paths[item.index.fqn]) for item in items]
    assert [item.index for item in found.items if item] == [i.index for i in items if i.index.fqn in ("w", "odd")]
    for position, item in enumerate(items):
        if found.chunks[position].sizes is not None:
            planned = planner.resolve_data(item)
            assert isinstance(planned, torch.Tensor) and torch.equal(found.tensor(position), planned)
    values = found.encode_values(range(len(items)))
    assert [found.chunks[position].key for position in values] == ["deep.list.0", "deep.text", "n", "none", "set"]


def test_other_numbers_are_planned_as_before() -> None:
    before = describe(state(), 0).without_state()
    new = state(n=4)
    found = describe(new, 0, before=before)
    assert found.items is before.items
    assert told(found) == told(describe(new, 0))
    (position,) = (at for at, chunk in enumerate(found.chunks) if chunk.key == "plain")
    assert found.tensor(position).data_ptr() == new["plain"].data_ptr()
    assert found.sums == describe(new, 0).sums


@pytest.mark.parametrize(
    "changes",
    [
        {"plain": torch.randn(6)},
        {"plain": torch.randn(5).double()},
        {"plain": 5},
        {"n": torch.ones(1)},
        {"deep": {"list": (1, torch.ones(2)), "text": "a"}},
        {"deep": {"list": [1, torch.ones(2), 2], "text": "a"}},
        {"more": 1},
        {"deep": {"list": [1, torch.ones(2)]}, "deep.text": "a"},
        {7: "a key of another type"},
    ],
)
def test_anything_else_is_planned_anew(changes: dict[Any, Any]) -> None:
    before = describe(state(), 0).without_state()
    new = {**state(), **changes}
    assert told(describe(new, 0, before=before)) == told(describe(new, 0)) != told(before)


@pytest.mark.parametrize("placements", [(Shard(1),), (Replicate(), Shard(0)), (Shard(0),)], ids=str)
def test_other_shards_are_planned_anew(placements: tuple[Any, ...]) -> None:
    before = describe(state(), 0).without_state()
    new = state(w=sharded(*placements, rows=8))
    assert told(describe(new, 0, before=before)) == told(describe(new, 0)) != told(before)
    same = state(w=sharded(*placements))
    assert (describe(same, 0, before=before).items is before.items) == (placements == (Shard(0),))


def test_an_odd_tensor_that_comes_later_is_refused_as_well() -> None:
    state: dict[str, Any] = {"w": torch.ones(3)}
    before = describe(state, 0)
    assert describe(state, 0, before=before).items is before.items
    for odd in (torch.nn.parameter.UninitializedParameter(), torch.ones(3, device="meta")):
        with pytest.raises(UnsupportedValue, match="'w'"):
            describe({"w": odd}, 0, before=before)


class Counted:
    """An object that counts how often it is asked for its state."""

    def __init__(self) -> None:
        self.num_asked = 0

    def state_dict(self) -> dict[str, Any]:
        self.num_asked += 1
        return {"t": torch.ones(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_a_state_that_is_noted_and_saved_is_taken_apart_once(memory_url: str) -> None:
    counted, noted, live = Counted(), list[str](), Mock()
    live.state.asks = False
    live.state.note.side_effect = lambda step, state, healthy: noted.extend(open_state(state, 0)[0].leaves)
    with Checkpointer(memory_url) as ckpt:
        assert ckpt._started is not None
        ckpt._started = dataclasses.replace(ckpt._started, live=live)
        for number in (1, 2):
            ckpt.save(number, {"counted": counted, "n": number}, wait=True)
            assert counted.num_asked == number
    assert noted == ["counted.t", "n"] * 2
