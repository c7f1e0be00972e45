"""Routing on its own: scores, weights, and what keeps loads level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from elastic_moe.model import ModelConfig
from elastic_moe.model.router import Router, move_bias
from elastic_moe.parallel import Precision
from tests.moe.cases import SMALL, batch, build, layout
from tests.moe.test_experts import filled
from tests.ranks import Ranks

DIM = 32
SCORES = ["softmax", "sigmoid"]


def config(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"dim": DIM, "num_experts": 4, "top_k": 2, "expert_dim": 48, **changes})


def tokens(num: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(1, num, DIM, generator=torch.Generator().manual_seed(seed)), torch.ones(1, dtype=torch.bool)


def by_definition(router: Router, x_TD: Tensor, *, score: str, norm: bool, scale: float) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's gate as its paper writes it, a token at a time; Mixtral's with a softmax."""
    weights, chosen = [], []
    for x_D in x_TD.double():
        logits_E = router.weight.double() @ x_D
        scores_E = logits_E.softmax(0) if score == "softmax" else logits_E.sigmoid()
        best_K = (scores_E + router.expert_bias.double()).topk(router.top_k).indices
        kept_K = scores_E[best_K]
        weights.append((kept_K / kept_K.sum() if norm else kept_K) * scale)
        chosen.append(best_K)
    return torch.stack(weights), torch.stack(chosen)


@pytest.mark.parametrize("balance", ["sequence", "forced"])
def test_what_it_returns_is_no_view(balance: str) -> None:
    """In a bf16 job it is a unit of FSDP2's, which would warn on each rank that gradients may be wrong."""
    router = Router(config(balance=balance))
    filled(router)
    weights, _, terms = router(*tokens(5))
    assert [tensor._is_view() for tensor in (weights, *terms) if tensor.requires_grad] == [False] * 4


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("norm_topk", [None, False, True])
@pytest.mark.parametrize("score", SCORES)
def test_weights_and_choice_are_as_defined(score: str, norm_topk: bool | None, top_k: int) -> None:
    if norm_topk and top_k == 1:
        with pytest.raises(ValidationError, match="norm_topk = true with top_k = 1"):
            config(score=score, norm_topk=norm_topk, top_k=top_k)
        return
    router = Router(config(score=score, norm_topk=norm_topk, top_k=top_k, route_scale=2.5))
    filled(router)
    router.expert_bias += torch.tensor([0.2, -0.1, 0.0, -0.1])
    x, real = tokens(40)
    weights, chosen, _ = router(x, real)
    norm = top_k > 1 if norm_topk is None else norm_topk
    expected, expected_chosen = by_definition(router, x[0], score=score, norm=norm, scale=2.5)
    assert torch.equal(chosen, expected_chosen)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("score", SCORES)
def test_the_router_learns(score: str, top_k: int) -> None:
    """With one expert a token, too, whose weight must not be divided by itself."""
    router = Router(config(score=score, top_k=top_k))
    filled(router)
    x, real = tokens(50)
    weights, _, _ = router(x, real)
    (weights * torch.arange(1, top_k + 1)).sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.abs().max() > 1e-2


@pytest.mark.parametrize("norm_topk", [None, False])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("score", SCORES)
def test_experts_whose_scores_underflow_weigh_something_finite(score: str, top_k: int, norm_topk: bool | None) -> None:
    """A bias may choose any expert: also one of which exp(-300) is left."""
    router = Router(config(score=score, top_k=top_k, norm_topk=norm_topk))
    torch.nn.init.zeros_(router.weight)
    with torch.no_grad():
        router.weight[:, 0] = torch.tensor([300.0, 299.0, -300.0, -301.0])
    router.expert_bias += torch.tensor([-5.0, -5.0, 5.0, 5.0])
    x, real = tokens(20)
    x[..., 0] = 1.0
    weights, chosen, terms = router(x, real)
    assert chosen.min() >= 2
    assert weights.isfinite().all()
    (weights.square().sum() + terms.balance).backward()
    assert router.weight.grad is not None
    assert router.weight.grad.isfinite().all()


def routed_differently(score: str) -> tuple[int, int, bool]:
    """Tokens that an fp32 router would send elsewhere, tokens in all, and whether bf16 came, in a bf16 model."""
    model, _ = build(SMALL.model_copy(update={"score": score}), layout(shard=2), Precision(compute=torch.bfloat16))
    inputs: list[tuple[Tensor, Tensor]] = []
    choices: list[Tensor] = []
    for block in model.blocks:
        router = block.moe.router
        router.register_forward_pre_hook(
            lambda m, args: inputs.append((args[0].flatten(0, 1), m.weight.detach().clone()))
        )
        router.register_forward_hook(lambda m, args, out: choices.append(out[1]))
    model(batch(SMALL, 16, 32)[:, :-1])
    differ = 0
    for (x_TD, weight), chosen in zip(inputs, choices, strict=True):
        again = F.linear(x_TD.float(), weight.float()).topk(SMALL.top_k, dim=-1).indices
        differ += int((again.sort(1).values != chosen.sort(1).values).any(1).sum())
    is_bf16 = all(x.dtype is torch.bfloat16 and weight.dtype is torch.float32 for x, weight in inputs)
    return differ, sum(map(len, choices)), is_bf16


@pytest.mark.parametrize("score", SCORES)
def test_routing_is_fp32_in_a_bf16_model(ranks: Ranks, score: str) -> None:
    for differ, total, is_bf16 in ranks.run(routed_differently, score, world_size=2):
        assert is_bf16
        assert (differ, total) == (0, 2 * 16 * 32)


@settings(max_examples=25, deadline=None)
@given(
    split=st.lists(st.integers(1, 6), min_size=1, max_size=6), seed=st.integers(0, 99), score=st.sampled_from(SCORES)
)
def test_router_terms_do_not_depend_on_the_split(split: list[int], seed: int, score: str) -> None:
    """Loads, balance and z terms of a batch are the sums over any split of it, padding left out."""
    router = Router(config(score=score))
    filled(router)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(split), 7, DIM, generator=draw)
    real = torch.rand(sum(split), generator=draw) < 0.8
    whole = router(x, real)[2]
    parts = [router(part, keep)[2] for part, keep in zip(x.split(split), real.split(split), strict=True)]
    assert torch.equal(whole.load_E, torch.stack([p.load_E for p in parts]).sum(0))
    assert whole.load_E.sum() == real.sum() * 7 * 2
    for name in ("balance", "z"):
        summed = torch.stack([getattr(p, name) for p in parts]).sum()
        torch.testing.assert_close(getattr(whole, name), summed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_level_routing_has_balance_one(score: str) -> None:
    router = Router(config(score=score))
    torch.nn.init.zeros_(router.weight)
    terms = router(torch.randn(3, 8, DIM), torch.ones(3, dtype=torch.bool))[2]
    assert float(terms.balance.detach()) == pytest.approx(3.0)


@pytest.mark.parametrize("score", SCORES)
def test_bias_moves_the_choice_and_not_the_weights(score: str) -> None:
    router = Router(config(score=score))
    filled(router)
    x, real = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(3)), torch.ones(1, dtype=torch.bool)
    before = router(x, real)
    load = before[2].load_E
    for _ in range(100):
        move_bias(router.expert_bias, router(x, real)[2].load_E, rate=4e-3)
    after = router(x, real)
    assert after[2].load_E.std() < 0.25 * load.std()
    assert router.expert_bias.mean().abs() < 1e-6
    same = (before[1].sort(1).values == after[1].sort(1).values).all(1)
    assert same.any()
    torch.testing.assert_close(before[0][same].sort(1).values, after[0][same].sort(1).values)
