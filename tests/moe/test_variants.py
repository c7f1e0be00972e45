"""Layers whose attention is compiled, or that are computed again for the backward pass: the same gradients and loads.

All of these tests with such layers: `make test-variants`, see `variants.py`.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from elastic_moe.model import ModelConfig
from elastic_moe.parallel import begin_round, gather_full
from launcher.rounds.mesh import MeshPlan
from tests.moe.cases import SMALL, batch, build, grads, layout, objective
from tests.ranks import Ranks


def learned(config: ModelConfig, plan: MeshPlan, variant: str) -> tuple[dict[str, Tensor], Tensor]:
    """Whole gradients of a batch of 8 over the ranks, and the loads of each layer, summed over ranks."""
    model, _ = build(config, plan)
    model.recompute = "recompute" in variant
    if "compile" in variant:
        for block in model.blocks:
            block.compile_attention("aot_eager")  # traces as inductor does, and needs no compiler
    told: list[Tensor] = []
    model.register_forward_hook(lambda module, args, out: told.append(out.load_LE))
    mine = batch(config, num_sequences=8, num_positions=16).tensor_split(dist.get_world_size())[dist.get_rank()]
    begin_round(model, last=True)
    objective(model, mine, num_sequences=8).backward()
    (load_LE,) = told
    dist.all_reduce(load_LE)
    return gather_full(dict(grads(model))), load_LE


@pytest.mark.parametrize("variant", ["compile", "recompute", "compile,recompute"])
@pytest.mark.parametrize(("balance", "num_experts"), [("sequence", 6), ("quantile", 5)])
def test_a_variant_learns_the_same_and_counts_loads_once(
    ranks: Ranks, balance: str, num_experts: int, variant: str
) -> None:
    config = SMALL.model_copy(update={"balance": balance, "num_experts": num_experts})
    plan = layout(expert=2)
    expected, expected_loads = ranks.run(learned, config, plan, "", world_size=2)[0]
    got, loads = ranks.run(learned, config, plan, variant, world_size=2)[0]
    assert torch.equal(loads, expected_loads)
    assert loads.sum() == config.num_layers * 8 * 16 * config.top_k
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-7, msg=name)
