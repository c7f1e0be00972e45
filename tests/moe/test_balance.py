"""What keeps loads level, against its formula; groups; and what is told of the loads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from elastic_moe.model import ModelConfig
from elastic_moe.model.quantile import count_margins, num_bins, set_bias
from elastic_moe.model.router import Router, global_balance
from elastic_moe.trainer.routing import routing_stats
from tests.moe.test_experts import filled
from tests.moe.test_router import SCORES, config, tokens

ALL_BALANCES = ["sequence", "global", "bias", "quantile", "forced", "none"]


def router_of(**changes: Any) -> Router:
    router = Router(config(**changes))
    filled(router)
    return router


def test_the_global_loss_is_its_formula_whatever_the_split() -> None:
    """E times the sum over experts of the batch's part of rows and its mean probability: arXiv:2501.11873, eq. 1."""
    router = router_of(balance="global")
    x = torch.randn(12, 7, router.weight.shape[1], generator=torch.Generator().manual_seed(1))
    real = torch.tensor([True] * 9 + [False] * 3)
    probs_TE = F.linear(x[real].double(), router.weight.double()).softmax(-1).flatten(0, 1)
    part_E = F.one_hot(probs_TE.topk(2, dim=-1).indices, 4).sum((0, 1)) / (2 * len(probs_TE))
    by_formula = 4 * (part_E * probs_TE.mean(0)).sum()
    (expected,) = torch.autograd.grad(by_formula, router.weight)
    for split in ([12], [1] * 12, [5, 7]):
        terms = [router(part, keep)[2] for part, keep in zip(x.split(split), real.split(split), strict=True)]
        load_LE = torch.stack([each.load_E for each in terms]).sum(0)[None]
        loss = torch.stack([global_balance(each.probs_E[None], load_LE) for each in terms]).sum() / 9
        (got,) = torch.autograd.grad(loss, router.weight)
        assert loss.item() == pytest.approx(by_formula.item(), rel=1e-6)
        torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("num_experts", [4, 5])
def test_level_loads_have_global_balance_one(num_experts: int) -> None:
    level = torch.full((2, num_experts), 1 / num_experts)
    assert float(global_balance(6 * level, level * 100)) == pytest.approx(2 * 6)
    crowded = torch.zeros(1, num_experts)
    crowded[0, 1] = 1.0
    assert float(global_balance(crowded, crowded)) == pytest.approx(num_experts)


@pytest.mark.parametrize("seed", range(4))
def test_a_bias_is_lowered_by_the_quantile_of_its_margins(seed: int) -> None:
    """By what exactly `top_k / E` of the tokens exceed, to within a part of a bin, which is 9 % of the distance."""
    top_k, num_experts = 2, 6
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(10, 100, num_experts, generator=draw).add(torch.randn(num_experts, generator=draw)).softmax(-1)
    margins_TE = (scores - scores.topk(top_k + 1, dim=-1).values[..., -1:]).flatten(0, 1)
    quantiles = margins_TE.quantile(1 - top_k / num_experts, dim=0)
    bias = torch.zeros(num_experts)
    set_bias(bias, count_margins(scores, top_k, torch.ones(10, dtype=torch.bool)), top_k)
    expected = quantiles.mean() - quantiles
    assert bias.mean().abs() < 1e-6
    torch.testing.assert_close(bias, expected, rtol=0.02, atol=0.02 * float(quantiles.abs().max()))


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (8, 1), (64, 6)])
@pytest.mark.parametrize("score", SCORES)
def test_biases_by_quantile_make_loads_level(score: str, num_experts: int, top_k: int) -> None:
    router = router_of(balance="quantile", score=score, num_experts=num_experts, top_k=top_k)
    x, real = tokens(1024)
    with torch.no_grad():
        router.weight[:, 0] += 0.5 * torch.randn(num_experts, generator=torch.Generator().manual_seed(1))
        x[..., 0] = 1.0  # some experts are liked by every token
        found = []
        for _ in range(12):
            terms = router(x, real)[2]
            found.append(float(terms.load_E.max() / terms.load_E.mean()))
            set_bias(router.expert_bias, terms.margins_EH, top_k)
    assert found[0] > 1.3
    assert found[-1] < 1.06


def test_margins_add_up_exactly_and_padding_has_none() -> None:
    draw = torch.Generator().manual_seed(2)
    scores, real = torch.rand(9, 5, 7, generator=draw), torch.rand(9, generator=draw) < 0.7
    whole = count_margins(scores, 3, real)
    assert whole.shape == (7, num_bins())
    assert torch.equal(whole.sum(1), torch.full((7,), 5.0 * int(real.sum()), dtype=torch.float64))
    parts = [count_margins(part, 3, keep) for part, keep in zip(scores.split([2, 7]), real.split([2, 7]), strict=True)]
    assert torch.equal(parts[0] + parts[1], whole)


def test_margins_beyond_every_bin_do_no_harm() -> None:
    """Also where all tokens are at one end, or every expert is chosen anyhow."""
    for scores in (torch.tensor([1e9, 0.0, -1e9]), torch.tensor([torch.nan, 1.0, 2.0]), torch.zeros(3)):
        bias = torch.zeros(3)
        counts = count_margins(scores.expand(2, 4, 3), 1, torch.ones(2, dtype=torch.bool))
        set_bias(bias, counts, 1)
        assert bias.isfinite().all()
    set_bias(bias := torch.ones(3), count_margins(torch.rand(2, 4, 3), 3, torch.ones(2, dtype=torch.bool)), 3)
    assert torch.equal(bias, torch.ones(3))


def chosen_by_groups(biased_E: Tensor, num_groups: int, top_groups: int, top_k: int) -> set[int]:
    """DeepSeek-V3's node-limited routing as its report tells it, for one token."""
    size = len(biased_E) // num_groups
    groups = [biased_E[g * size : (g + 1) * size].tolist() for g in range(num_groups)]
    best = sorted(range(num_groups), key=lambda g: -sum(sorted(groups[g])[-2:]))[:top_groups]
    allowed = [g * size + i for g in best for i in range(size)]
    return set(sorted(allowed, key=lambda expert: -float(biased_E[expert]))[:top_k])


@pytest.mark.parametrize(("num_groups", "top_groups", "top_k"), [(4, 2, 3), (2, 1, 4), (8, 3, 2), (8, 8, 5)])
@pytest.mark.parametrize("score", SCORES)
def test_a_token_goes_to_experts_of_its_best_groups(score: str, num_groups: int, top_groups: int, top_k: int) -> None:
    router = router_of(
        score=score, num_experts=8, top_k=top_k, num_groups=num_groups, top_groups=top_groups, balance="bias"
    )
    # all below 0: a masked score of 0 would win against them
    router.expert_bias += 0.2 * torch.randn(8, generator=torch.Generator().manual_seed(2)) - 1.5
    x, real = tokens(60)
    weights, chosen, terms = router(x, real)
    logits = F.linear(x[0], router.weight)
    biased = (logits.softmax(-1) if score == "softmax" else logits.sigmoid()) + router.expert_bias
    expected = [chosen_by_groups(biased_E.detach(), num_groups, top_groups, top_k) for biased_E in biased]
    assert [set(row) for row in chosen.tolist()] == expected
    torch.testing.assert_close(weights.sum(1), torch.ones(60), rtol=1e-5, atol=1e-5)
    assert terms.load_E.sum() == 60 * top_k


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 3}, "num_experts = 4 is not a multiple of num_groups = 3"),
        ({"num_groups": 2, "top_groups": 3}, "top_groups = 3 is more than num_groups = 2"),
        ({"num_groups": 4, "top_groups": 1}, "top_k = 2 is more than the 1 experts of top_groups = 1 groups"),
        ({"num_groups": 2, "top_groups": 1, "balance": "quantile"}, 'balance = "quantile" cannot be had with top_gr'),
        ({"balance": "level"}, "'sequence', 'global', 'bias', 'quantile', 'forced' or 'none'"),
    ],
)
def test_groups_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**changes)


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (5, 3), (8, 1)])
def test_forced_loads_are_level_whatever_the_router_says(num_experts: int, top_k: int) -> None:
    router = router_of(balance="forced", num_experts=num_experts, top_k=top_k)
    with torch.no_grad():
        router.weight[0] += 0.1
    x, real = tokens(num_experts * 4 + 1)
    weights, chosen, terms = router(x.abs(), real)
    assert terms.load_E.max() - terms.load_E.min() <= 1
    assert all(len(set(row)) == top_k for row in chosen.tolist())
    (weights * torch.arange(1, top_k + 1)).sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.abs().max() > 0  # it is the router's own weights that the outputs have


@pytest.mark.parametrize("balance", ALL_BALANCES)
def test_all_a_router_leaves_adds_up_over_any_split(balance: str) -> None:
    router = router_of(balance=balance, num_experts=8, top_k=3)
    draw = torch.Generator().manual_seed(5)
    x, real = torch.randn(10, 6, router.weight.shape[1], generator=draw), torch.rand(10, generator=draw) < 0.6
    whole = router(x, real)[2]
    parts = [router(part, keep)[2] for part, keep in zip(x.split([3, 1, 6]), real.split([3, 1, 6]), strict=True)]
    for name, value in whole._asdict().items():
        summed = torch.stack([getattr(part, name) for part in parts]).sum(0)
        if name in ("load_E", "margins_EH"):
            assert torch.equal(summed, value), name
        else:
            torch.testing.assert_close(summed, value, rtol=1e-5, atol=1e-5)


def test_statistics_are_those_of_the_loads() -> None:
    load = torch.tensor([[30.0, 10.0, 0.0, 0.0], [10.0, 10.0, 10.0, 10.0]], dtype=torch.float64)
    told = routing_stats(load, torch.tensor([0.0, 20 * math.log(4)], dtype=torch.float64), num_tokens=20, top_k=2)
    assert told.load_LE == [[30, 10, 0, 0], [10, 10, 10, 10]]
    assert (told.load_max, told.load_min, told.load_max_L, told.dropped) == (3.0, 0.0, [3.0, 1.0], 0)
    in_bits = 0.75 * math.log2(4 / 3) + 0.25 * 2
    assert told.load_entropy_L == pytest.approx([in_bits / 2, 1.0])
    assert told.router_entropy_L == pytest.approx([0.0, 1.0])
    assert routing_stats(load, load.sum(1), num_tokens=21, top_k=2).dropped == 4
    assert routing_stats(torch.ones(1, 1).double(), torch.zeros(1).double(), 1, 1).load_entropy_L == [0.0]


def test_a_routers_entropy_is_that_of_its_probabilities_without_padding() -> None:
    router = router_of()
    x = torch.randn(3, 50, router.weight.shape[1], generator=torch.Generator().manual_seed(1))
    probs = F.linear(x[:2], router.weight).softmax(-1)
    expected = -(probs * probs.log()).sum()
    terms = router(x, torch.tensor([True, True, False]))[2]
    assert float(terms.entropy) == pytest.approx(expected.item(), rel=1e-5)


def test_what_is_trained_is_told_by_the_config() -> None:
    assert [ModelConfig.model_validate({"balance": each}).moves_bias for each in ALL_BALANCES] == [
        each in ("bias", "quantile") for each in ALL_BALANCES
    ]
    assert not ModelConfig(num_groups=4).limits_groups
    assert not ModelConfig(num_groups=4, top_groups=4).limits_groups
    assert ModelConfig(num_groups=4, top_groups=2).limits_groups
