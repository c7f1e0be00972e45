"""Blocks that a step takes again and again, and layers that are gathered into the memory of two."""

from __future__ import annotations

import gc
import resource

import pytest
import torch
from torch import Tensor

from elastic_moe import pool as pools
from elastic_moe.parallel import apply, begin_round, gather_full
from elastic_moe.pool import Pool, make_pages, map_memory
from launcher.rounds.mesh import MeshPlan
from tests.moe.cases import SMALL, batch, build, grads, layout, objective
from tests.ranks import Ranks

_LARGE = 1 << 20
DEEP = SMALL.model_copy(update={"num_layers": 5, "balance": "sequence", "balance_coeff": 0.01})


def test_a_place_is_taken_again_once_nothing_looks_at_it() -> None:
    pool = Pool()
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
    assert pool.like(other).data_ptr() not in (place, other.data_ptr())


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


def test_pages_are_made_beside_and_keep_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_AT_ONCE_BYTES", 3 << 20)
    tensor, mapped = torch.frombuffer(map_memory(16 << 20), dtype=torch.uint8), map_memory(16 << 20)
    tensor[5 << 20] = 77
    make_pages([tensor, mapped, torch.empty(4)]).join()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert int(tensor[5 << 20]) == 77
    tensor.fill_(1)
    torch.frombuffer(mapped, dtype=torch.uint8).fill_(1)
    num_made = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert num_made < (32 << 20) / resource.getpagesize() / 4, f"{num_made} pages were left to make"


def deep_gradients(plan: MeshPlan, way: str, variant: str) -> tuple[dict[str, Tensor], int]:
    """Whole gradients of two steps of two rounds, and in how many places the layers' first norms were gathered."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "apart":
            patch.setattr(apply, "gather_by_turns", lambda model, pool: None)
        patch.setattr(pools, "_LEAST_BYTES", 1)
        model, _ = build(DEEP, plan)
        model.recompute = variant == "recompute"
        places: set[int] = set()
        for block in model.blocks:
            block.attention_norm.register_forward_hook(lambda norm, args, out: places.add(norm.weight.data_ptr()))
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
    """To the last bit: with five layers the first four share two places, in forward and backward passes."""
    plain, turns = (
        ranks.run(deep_gradients, plan, way, variant, world_size=plan.world_size)[0] for way in ("apart", "by turns")
    )
    assert turns[1] == 3 < plain[1]
    assert all(torch.equal(turns[0][name], plain[0][name]) for name in plain[0])


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
