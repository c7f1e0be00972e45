"""Experts and dispatch on their own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from elastic_moe.model import ModelConfig
from elastic_moe.model.experts import (
    Experts,
    grouped_obstacle,
    grouped_products,
    looped_products,
)
from elastic_moe.model.moe import MoE
from elastic_moe.parallel.dispatch import AllToAllDispatch
from tests.ranks import Ranks

CONFIG = ModelConfig(dim=32, num_experts=4, top_k=2, expert_dim=48)


def filled(module: torch.nn.Module, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for param in module.parameters():
        torch.nn.init.normal_(param, std=0.3, generator=draw)


def dense_moe(moe: MoE, x_TD: Tensor) -> Tensor:
    """The definition: each token through all experts, weighted by its renormalised top-k probabilities."""
    probs = F.linear(x_TD, moe.router.weight).softmax(-1)
    top = probs.topk(moe.router.top_k).indices
    kept = torch.zeros_like(probs).scatter(1, top, probs.gather(1, top))
    weights = kept / kept.sum(-1, keepdim=True)
    e = moe.experts
    hidden = F.silu(torch.einsum("td,efd->tef", x_TD, e.gate_EFD)) * torch.einsum("td,efd->tef", x_TD, e.up_EFD)
    return torch.einsum("tef,edf,te->td", hidden, e.down_EDF, weights)


def test_moe_equals_its_definition() -> None:
    moe = MoE(CONFIG)
    filled(moe)
    x = torch.randn(2, 9, CONFIG.dim, generator=torch.Generator().manual_seed(1))
    got, terms = moe(x, torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(got.flatten(0, 1), dense_moe(moe, x.flatten(0, 1)), rtol=1e-5, atol=1e-5)
    assert terms.load_E.sum() == 2 * 9 * CONFIG.top_k


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 8, 0], [0, 0, 0, 0]])
def test_grouped_and_looped_products_agree(counts: list[int]) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 32, generator=draw)
    weight = torch.randn(4, 48, 32, generator=draw)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    results = []
    for products in (grouped_products, looped_products):
        x_in, w_in = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = products(x_in, w_in, ends)
        (y * y).sum().backward()
        assert x_in.grad is not None
        assert w_in.grad is not None
        results.append((y.detach(), x_in.grad, w_in.grad))
    for grouped, looped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, looped, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "dtype", "dims", "obstacle"),
    [
        ("cpu", torch.float32, (64, 96), None),
        ("cpu", torch.float32, (64, 30), "dimension 30"),
        ("cpu", torch.bfloat16, (64, 8), None),
        ("cpu", torch.bfloat16, (64, 12), "dimension 12"),
        ("cuda", torch.bfloat16, (64, 96), None),
        ("cuda", torch.float32, (64, 96), "takes bfloat16"),
        ("mps", torch.float32, (64, 96), "no kernel for mps"),
    ],
)
def test_obstacles_to_the_grouped_kernel(
    device: str, dtype: torch.dtype, dims: tuple[int, ...], obstacle: str | None
) -> None:
    found = grouped_obstacle(device, dtype, dims)
    assert (found is None) if obstacle is None else (found is not None and obstacle in found)


def test_odd_widths_fall_back_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    experts = Experts(ModelConfig(dim=30, num_heads=1, head_dim=30, num_kv_heads=1, num_experts=2, expert_dim=10))
    filled(experts)
    with caplog.at_level("INFO"):
        experts(torch.randn(4, 30), torch.tensor([[3, 1]]))
        experts(torch.randn(4, 30), torch.tensor([[0, 4]]))
    assert [r.message for r in caplog.records] == [
        "experts run one by one: dimension 10 of torch.float32 is not a multiple of 16 bytes"
    ]


@pytest.mark.parametrize("exact", [False, True])
def test_rows_of_several_sources_meet_the_same_experts(exact: bool) -> None:
    experts = Experts(CONFIG)
    filled(experts)
    counts = torch.tensor([[2, 0, 1, 3], [0, 0, 0, 0], [1, 4, 0, 2]])
    x = torch.randn(int(counts.sum()), CONFIG.dim, generator=torch.Generator().manual_seed(1))
    apart = torch.cat([experts(rows, row[None]) for rows, row in zip(x.split([6, 0, 7]), counts, strict=True)])
    experts.exact = exact
    torch.testing.assert_close(experts(x, counts), apart, rtol=1e-5, atol=1e-5)


def dispatched(owner: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows through an all-to-all over 2 ranks, all bound for `owner`'s experts (None: for both)."""
    rank, config = dist.get_rank(), CONFIG
    experts = Experts(config)
    filled(experts)
    half = config.num_experts // 2
    choices = torch.arange(config.num_experts) if owner is None else owner * half + torch.arange(half)
    draw = torch.Generator().manual_seed(rank)
    expert_of_row = choices[torch.randint(len(choices), (5 + 3 * rank,), generator=draw)].sort().values
    x = torch.randn(len(expert_of_row), config.dim, generator=draw).requires_grad_()
    counts = torch.bincount(expert_of_row, minlength=config.num_experts)

    expected = experts(x, counts[None])
    (expected_grad,) = torch.autograd.grad((expected * expected).sum(), x)

    mine = Experts(config.model_copy(update={"num_experts": half}))
    for part, whole in zip(mine.parameters(), experts.parameters(), strict=True):
        part.data.copy_(whole.data[rank * half : (rank + 1) * half])
    assert dist.group.WORLD is not None
    got = AllToAllDispatch(dist.group.WORLD, config.num_experts).carry(x, counts, mine)
    (got * got).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(x.grad, expected_grad, rtol=1e-4, atol=1e-4)
    grads = [p.grad for p in mine.parameters()]
    assert all(g is not None for g in grads)
    return got.detach(), counts, torch.stack([g.abs().sum() for g in grads if g is not None])


@pytest.mark.parametrize("owner", [None, 0, 1])
def test_all_to_all_equals_local_experts(ranks: Ranks, owner: int | None) -> None:
    """Also where one rank gets no row at all: it takes part, and its gradients are zeros rather than missing."""
    results = ranks.run(dispatched, owner, world_size=2)
    for rank, (_, _, grad_sums) in enumerate(results):
        idle = owner is not None and rank != owner
        assert bool((grad_sums == 0).all()) == idle
