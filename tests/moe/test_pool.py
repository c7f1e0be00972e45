"""Blocks that a step takes again and again, and layers that are gathered into the memory of one."""

from __future__ import annotations

import gc
import mmap
import resource

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from elastic_moe import pool as pools
from elastic_moe.parallel import Precision, apply, begin_round, expect_first_step, gather_full
from elastic_moe.parallel.turns import Turns, TurnSeat, turns_of
from elastic_moe.pool import Pool, make_pages, map_memory
from launcher.rounds.mesh import MeshPlan
from tests.moe.cases import SMALL, batch, build, grads, layout, objective
from tests.ranks import Ranks

_LARGE = 1 << 20
DEEP = SMALL.model_copy(update={"num_layers": 5, "balance": "sequence", "balance_coeff": 0.01})


def test_a_place_is_taken_again_once_nothing_looks_at_it() -> None:
    pool = Pool()
    pool.expect(9 * _LARGE)  # or new memory might lie where some was given back
    first = pool.take([2, _LARGE // 8], torch.float32)
    place, view = first.data_ptr(), first[1, 5:]
    view.fill_(7.0)
    del first
    other = pool.take([_LARGE // 4], torch.float32)
    assert other.data_ptr() != place, "a view looks at it still"
    other.fill_(1.0)
    assert bool((view == 7.0).all())
    del view
    again = pool.take([_LARGE // 2], torch.bfloat16)
    assert again.data_ptr() == place
    third = pool.like(again)
    assert third.data_ptr() not in (place, other.data_ptr())
    assert (third.shape, third.dtype) == (again.shape, again.dtype)


def test_memory_outlives_its_pool() -> None:
    tensor = Pool().take([_LARGE], torch.int64)
    gc.collect()
    assert int(tensor.fill_(3).sum()) == 3 * _LARGE


def test_what_is_expected_is_what_is_taken_next() -> None:
    pool = Pool()
    mapped = pool.expect(3 * _LARGE)
    first, second = pool.take([_LARGE], torch.uint8), pool.take([2 * _LARGE], torch.uint8)
    second.fill_(9)
    assert mapped[_LARGE:] == b"\x09" * (2 * _LARGE) and second.data_ptr() == first.data_ptr() + _LARGE
    assert pool.take([_LARGE], torch.uint8).fill_(1).sum() == _LARGE, "more than was expected"
    assert pool.take([4], torch.uint8).numel() == 4 and pool.take([0], torch.float32).numel() == 0
    assert min(pool._free) == _LARGE, "what is small is malloc's"


def test_pages_are_made_beside_and_keep_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_AT_ONCE_BYTES", 4 << 20)
    tensor, mapped = torch.frombuffer(map_memory(16 << 20), dtype=torch.uint8), map_memory(16 << 20)
    tensor[5 << 20] = 77
    make_pages([tensor, mapped, torch.empty(4)]).join()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert int(tensor[5 << 20]) == 77
    tensor.fill_(1)
    torch.frombuffer(mapped, dtype=torch.uint8).fill_(1)
    num_made = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert num_made < (32 << 20) / resource.getpagesize() / 4, f"{num_made} pages were left to make"


class Pages:
    """Huge pages that are costly, or not, at each look."""

    def __init__(self, told: list[str], are_costly: bool) -> None:
        self.told, self.are_costly = told, are_costly

    def advise(self, address: int, size_bytes: int) -> None:
        self.told.append(f"look at {size_bytes >> 20}")


@pytest.mark.parametrize("are_costly", [False, True], ids=["cheap", "costly"])
@pytest.mark.parametrize("num_made", [0, 2, 4])
def test_huge_pages_are_looked_for_as_pages_are_made_and_asked_for_afterwards(
    num_made: int, are_costly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may make huge ones of what has become small ones, in its own time. But what could not be made ahead
    (an old kernel, no memory left) is made as it is written, and must not be huge pages that are costly."""
    told: list[str] = []

    def madvise(address: int, num_bytes: int, advice: int) -> int:
        is_made = advice == mmap.MADV_HUGEPAGE or sum(each.startswith("make") for each in told) < num_made
        told.append(f"{'huge' if advice == mmap.MADV_HUGEPAGE else 'make'} {num_bytes >> 20}")
        return 0 if is_made else -1

    monkeypatch.setattr(pools, "_AT_ONCE_BYTES", 4 << 20)
    monkeypatch.setattr(pools, "_madvise", madvise)
    monkeypatch.setattr(pools, "_huge_pages", Pages(told, are_costly))
    monkeypatch.setattr(pools, "_span", lambda memory: (6 << 20, 17 << 20))
    pools._make_pages([torch.empty(0)])
    made = ["look at 2", "make 2", "look at 4", "make 4", "look at 4", "make 4", "look at 1", "make 1"]
    if num_made < 4:
        made = made[: 2 * num_made + 2]
    assert told == made + ([] if are_costly and num_made < 4 else ["huge 11"])


def deep_gradients(plan: MeshPlan, way: str, variant: str) -> tuple[dict[str, Tensor], int]:
    """Whole gradients of two steps of two rounds, and in how many places the layers' first norms were gathered."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "apart":
            patch.setattr(apply, "gather_by_turns", lambda model, pool: None)
        patch.setattr(pools, "_LEAST_BYTES", 1)
        model, _ = build(DEEP, plan)
        model.recompute = variant == "recompute"
        places: set[int] = set()
        for block in model.blocks:  # hears of its norms' parameters by what is never compiled
            norm = block.attention_norm
            block.moe.register_forward_pre_hook(lambda moe, args, norm=norm: places.add(norm.weight.data_ptr()))
        found: dict[str, Tensor] = {}
        for step in range(2):
            for last in (False, True):
                begin_round(model, last=last)
                objective(model, batch(DEEP, 2, 16, seed=step), num_sequences=4).backward()
            found |= {f"{name} {step}": grad.clone() for name, grad in gather_full(dict(grads(model))).items()}
            model.zero_grad()
    return found, len(places)


@pytest.mark.parametrize("variant", ["", "recompute"], ids=["kept", "recomputed"])
@pytest.mark.parametrize("plan", [layout(), layout(shard=2), layout(expert=2)], ids=["alone", "FS2", "EP2"])
def test_layers_that_take_turns_have_the_same_gradients(ranks: Ranks, plan: MeshPlan, variant: str) -> None:
    """To the last bit: with five layers the first four share a place, in forward and backward passes."""
    plain, turns = (
        ranks.run(deep_gradients, plan, way, variant, world_size=plan.world_size)[0] for way in ("apart", "by turns")
    )
    assert turns[1] == 2 < plain[1]
    assert all(torch.equal(turns[0][name], plain[0][name]) for name in plain[0])


def first_step(plan: MeshPlan, exact: bool, kept: bool) -> tuple[bool, float]:
    """Whether what was expected of a first step sufficed for it, and how much of that was taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "_LEAST_BYTES", 1)
        patch.setattr(pools, "_ALIGNMENT", 8)
        model, _ = build(DEEP, plan, Precision(exact=exact))
        turns = turns_of(model)
        assert turns is not None
        expected = expect_first_step(model, plan, torch.float32, exact=exact, keep_gathered=kept)
        begin_round(model, last=True, keep_gathered=kept)
        objective(model, batch(DEEP, 1, 16), num_sequences=1).backward()
        assert expected is not None
        return turns.pool._mapped is expected, turns.pool._next / len(expected)


@pytest.mark.parametrize(
    ("exact", "kept"), [(False, False), (True, False), (False, True)], ids=["fp32", "exact", "kept"]
)
@pytest.mark.parametrize("plan", [layout(), layout(replicate=2), layout(expert=2)], ids=["alone", "R2", "EP2"])
def test_a_first_step_takes_what_was_expected(ranks: Ranks, plan: MeshPlan, exact: bool, kept: bool) -> None:
    for is_enough, part in ranks.run(first_step, plan, exact, kept, world_size=plan.world_size):
        assert is_enough and part > 0.8


def test_layers_share_a_place_and_what_is_in_one_layer_does_not() -> None:
    turns = Turns(Pool())

    def place(layer: int, unit: str, index: int, num: int = 4) -> int:
        return TurnSeat(turns, layer, unit).place(index, num, torch.float32).data_ptr()

    assert place(0, "", 0) == place(1, "", 0)
    assert len({place(0, "", 0), place(0, "", 1), place(0, "moe.experts", 0), place(0, "", 0, num=5)}) == 4
    turns.all_stay = True
    assert len({place(layer, "", 0) for layer in range(3)}) == 3


def stays_after_turns() -> str:
    model, _ = build(DEEP, layout())
    begin_round(model, last=True, keep_gathered=True)
    model(batch(DEEP, 1, 8)[:, :-1])
    other, _ = build(DEEP, layout())
    begin_round(other, last=True)
    other(batch(DEEP, 1, 8)[:, :-1])
    try:
        begin_round(other, last=True, keep_gathered=True)
    except RuntimeError as error:
        return str(error)
    return ""


def test_layers_that_take_turns_cannot_stay_gathered(ranks: Ranks) -> None:
    assert "cannot stay gathered" in ranks.run(stays_after_turns, world_size=1)[0]


def stays_in_the_way() -> list[str]:
    """What is raised where layers stay gathered that take turns: two passes, of which the second finds the first's."""
    model, _ = build(DEEP, layout())
    begin_round(model, last=True)
    block = model.blocks[1]
    assert isinstance(block, FSDPModule)
    block.set_reshard_after_forward(False)
    found = []
    for _ in range(2):
        try:
            model(batch(DEEP, 1, 8)[:, :-1])
        except RuntimeError as error:
            found.append(str(error))
    return found


def test_no_layer_is_gathered_over_one_that_is_in_use(ranks: Ranks) -> None:
    """As a torch might that gathers ahead, or a pass that ended in an error."""
    first, second = ranks.run(stays_in_the_way, world_size=1)[0]
    assert first == "layer 2 would be gathered over layer 1, which is still in use"
    assert second == "layer 0 would be gathered over layer 1, which is still in use"
