"""Gradients on every kind of mesh against those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from elastic_moe.model.decoder import Decoder
from elastic_moe.parallel import begin_round
from elastic_moe.parallel.collectives import GatherByMailbox
from launcher.rounds.mesh import MeshPlan
from tests.moe.cases import SMALL, batch, build, gradients, layout, objective
from tests.ranks import Ranks

MESHES = {
    "FS2xEP2": layout(shard=2, expert=2),
    "R2xEP2": layout(replicate=2, expert=2),
    "R2xFS2": layout(replicate=2, shard=2),
    "EP3": layout(expert=3),
    "FS3": layout(shard=3),
}


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> tuple[dict[str, Tensor], float]:
    return ranks.run(gradients, SMALL, layout(), world_size=1)[0]


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("num_rounds", "keep_gathered"), [(1, False), (2, False), (2, True)], ids=["1-round", "2-rounds", "kept"]
)
@pytest.mark.parametrize("plan", MESHES.values(), ids=MESHES.keys())
def test_every_gradient_equals_one_process(
    ranks: Ranks, alone: tuple[dict[str, Tensor], float], plan: MeshPlan, num_rounds: int, keep_gathered: bool
) -> None:
    expected, expected_norm = alone
    assert expected.keys() == dict(Decoder(SMALL).named_parameters()).keys()
    for got, norm in ranks.run(gradients, SMALL, plan, num_rounds, keep_gathered, world_size=plan.world_size):
        errors = {name: relative_error(got[name], expected[name]) for name in expected}
        assert max(errors.values()) <= 1e-5, sorted(errors.items(), key=lambda item: -item[1])[:5]
        assert norm == pytest.approx(expected_norm, rel=1e-6)


@pytest.mark.parametrize("plan", [MESHES["FS2xEP2"], MESHES["R2xEP2"]], ids=["FS2xEP2", "R2xEP2"])
def test_clipping_scales_every_gradient_alike(
    ranks: Ranks, alone: tuple[dict[str, Tensor], float], plan: MeshPlan
) -> None:
    expected, expected_norm = alone
    limit = expected_norm / 3
    got, norm = ranks.run(gradients, SMALL, plan, 1, False, limit, world_size=plan.world_size)[0]
    assert norm == pytest.approx(expected_norm, rel=1e-6)
    clipped = torch.stack([g.double().square().sum() for g in got.values()]).sum().sqrt()
    assert float(clipped) == pytest.approx(limit, rel=1e-6)
    assert all(relative_error(got[name], expected[name] / 3) <= 1e-5 for name in expected)


UNEVEN = {
    "8 on FS3": (8, 64, layout(shard=3)),  # whose widths 3 does not divide either: shards of 3, 3 and 2 experts
    "8 on EP3": (8, 64, layout(expert=3)),
    "5 on EP4": (5, 64, layout(expert=4)),  # 2, 2, 1 and none
    "5 on FS2xEP2": (5, 64, layout(shard=2, expert=2)),  # each shard half of every expert of its part
    "5 on R2xEP2, odd": (5, 63, layout(replicate=2, expert=2)),  # computed one by one
    "5 on EP4, odd": (5, 63, layout(expert=4)),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_gradients_of_uneven_parts_and_shards(ranks: Ranks, case: str) -> None:
    num_experts, expert_dim, plan = UNEVEN[case]
    config = SMALL.model_copy(update={"num_experts": num_experts, "expert_dim": expert_dim})
    expected, expected_norm = ranks.run(gradients, config, layout(), world_size=1)[0]
    for got, norm in ranks.run(gradients, config, plan, world_size=plan.world_size):
        assert max(relative_error(got[name], expected[name]) for name in expected) <= 1e-5
        assert norm == pytest.approx(expected_norm, rel=1e-6)


def gathers(plan: MeshPlan) -> tuple[int, int, bool]:
    """How many units gather in a pass forward and backward, and in one that only goes forward; and whether parameters
    stay gathered after that."""
    model, _ = build(SMALL, plan)
    tokens = batch(SMALL, num_sequences=2, num_positions=8)
    with pytest.MonkeyPatch.context() as patch:
        calls: list[int] = []
        gather = GatherByMailbox.__call__

        def counted(self: GatherByMailbox, **of: Any) -> None:
            calls.append(1)
            gather(self, **of)

        patch.setattr(GatherByMailbox, "__call__", counted)
        begin_round(model, last=True)
        objective(model, tokens, num_sequences=4).backward()
        both_ways = len(calls)
        begin_round(model, last=False, backward=False)
        with torch.no_grad():
            model(tokens[:, :-1])
    return both_ways, len(calls) - both_ways, any(not isinstance(param, DTensor) for param in model.parameters())


@pytest.mark.parametrize(
    ("plan", "expected"),
    [(layout(shard=2), (4, 3, False)), (layout(shard=2, expert=2), (7, 5, False))],
    ids=["experts with their block", "experts apart"],
)
def test_what_the_backward_pass_begins_with_is_gathered_once(
    ranks: Ranks, plan: MeshPlan, expected: tuple[int, int, bool]
) -> None:
    assert ranks.run(gathers, plan, world_size=plan.world_size) == [expected] * plan.world_size
