"""The contract of a `Dispatcher`, for each implementation: what comes back is what the definition says, and so are the
gradients of tokens, weights and every expert's parameters."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from elastic_moe.model import ModelConfig
from elastic_moe.model.dispatch import Dispatcher, LocalDispatch, Routes
from elastic_moe.model.experts import Experts
from elastic_moe.parallel.dispatch import AllToAllDispatch
from elastic_moe.parallel.sharing import SharingDispatch
from launcher import ShareRule, experts_per_rank
from tests.moe.test_experts import filled
from tests.ranks import Ranks

DIM, WIDTH = 32, 48


class Case(NamedTuple):
    """Tokens of each rank, and which experts they go to."""

    num_experts: int
    top_k: int
    tokens: tuple[int, ...]
    crowded: bool = False
    """Whether all go to the first experts."""
    exact: bool = False


CASES = {
    "even": Case(4, 2, (5, 8)),
    "uneven": Case(5, 3, (6, 4)),
    "three ranks": Case(7, 2, (3, 4, 5)),
    "a rank without an expert": Case(2, 1, (3, 4, 5)),
    "a rank without a token": Case(4, 2, (7, 0)),
    "ranks whose experts idle": Case(8, 2, (4, 4, 4), crowded=True),
    "exact": Case(5, 2, (6, 3), exact=True),
}


def drawn(case: Case, rank: int) -> tuple[Tensor, Routes]:
    draw = torch.Generator().manual_seed(rank)
    num = case.tokens[rank]
    x = torch.randn(num, DIM, generator=draw).requires_grad_()
    weights = torch.rand(num, case.top_k, generator=draw).requires_grad_()
    scores = torch.rand(num, case.num_experts, generator=draw)
    if case.crowded:
        scores[:, case.top_k :] = -1.0
    return x, Routes(weights, scores.topk(case.top_k, dim=1).indices)


def experts_of(case: Case, first: int = 0, count: int | None = None) -> Experts:
    """The layer's experts from `first` on, their values those of the whole layer."""
    config = ModelConfig(dim=DIM, num_experts=case.num_experts, top_k=case.top_k, expert_dim=WIDTH)
    experts = Experts(config)
    filled(experts)
    if count is not None:
        for name, param in list(experts.named_parameters()):
            part = param.detach()[first : first + count].clone()
            experts.register_parameter(name, torch.nn.Parameter(part))
    experts.exact = case.exact
    return experts


def by_definition(x_TD: Tensor, routes: Routes, experts: Experts) -> Tensor:
    out = []
    for x_D, weights_K, chosen_K in zip(x_TD, *routes, strict=True):
        total = torch.zeros(DIM)
        for weight, expert in zip(weights_K, chosen_K.tolist(), strict=True):
            gate, up, down = (w[expert] for w in (experts.gate_EFD, experts.up_EFD, experts.down_EDF))
            total = total + weight * (down @ (F.silu(gate @ x_D) * (up @ x_D)))
        out.append(total)
    return torch.stack(out) if out else x_TD + routes.weights_TK.sum()


def compared(case: Case, dispatch: Dispatcher, experts: Experts, first: int, rank: int) -> list[str]:
    """What differs from the definition on this rank."""
    x, routes = drawn(case, rank)
    got = dispatch(x, routes, experts)
    (got * got).sum().backward()
    reference, expected, losses = experts_of(case._replace(exact=False)), {}, []
    for each in range(len(case.tokens)):  # an expert learns from the tokens of all ranks
        x_of, routes_of = drawn(case, each)
        y = by_definition(x_of, routes_of, reference)
        losses.append((y * y).sum())
        if each == rank:
            expected = {"outputs": y, "tokens": x_of, "weights": routes_of.weights_TK}
    torch.stack(losses).sum().backward()
    pairs = {"outputs": (got, expected["outputs"])}
    pairs |= {name: (leaf.grad, expected[name].grad) for name, leaf in (("tokens", x), ("weights", routes.weights_TK))}
    for (name, part), whole in zip(experts.named_parameters(), reference.parameters(), strict=True):
        if len(part):
            grad = torch.zeros_like(whole) if whole.grad is None else whole.grad
            pairs[name] = (part.grad, grad[first : first + len(part)])
    wrong = [name for name, (mine, its) in pairs.items() if mine is None or its is None or mine.shape != its.shape]
    return wrong + [
        name
        for name, (mine, its) in pairs.items()
        if mine is not None and its is not None and not torch.allclose(mine.float(), its, rtol=1e-4, atol=1e-4)
    ]


def over_ranks(case: Case, rule: ShareRule | None = None) -> list[str]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    held = experts_per_rank(case.num_experts, world_size)
    first = sum(held[:rank])
    assert dist.group.WORLD is not None
    experts = experts_of(case, first, held[rank])
    if rule is None:
        return compared(case, AllToAllDispatch(dist.group.WORLD, case.num_experts), experts, first, rank)
    dispatch = SharingDispatch(dist.group.WORLD, case.num_experts, rule)
    wrong = compared(case, dispatch, experts, first, rank)
    return [*wrong, "nothing was shared"] if case.crowded and not dispatch.shared.copies else wrong


@pytest.mark.parametrize("name", CASES)
def test_all_to_all_is_as_defined(ranks: Ranks, name: str) -> None:
    case = CASES[name]
    assert ranks.run(over_ranks, case, world_size=len(case.tokens)) == [[] for _ in case.tokens]


SHARED = {name: case for name, case in CASES.items() if not case.exact} | {
    "two experts for two": Case(8, 1, (9, 9), crowded=True),
    "several guests": Case(9, 2, (40, 1, 1), crowded=True),
    "no expert and no token": Case(2, 2, (9, 9, 0), crowded=True),
}


@pytest.mark.parametrize("name", SHARED)
def test_sharing_is_as_defined(ranks: Ranks, name: str) -> None:
    case = SHARED[name]
    rule = ShareRule(guests=2, copy_rows=0)
    assert ranks.run(over_ranks, case, rule, world_size=len(case.tokens)) == [[] for _ in case.tokens]


@pytest.mark.parametrize("name", CASES)
def test_local_is_as_defined(name: str) -> None:
    case = CASES[name]
    alone = case._replace(tokens=case.tokens[-1:])
    assert compared(alone, LocalDispatch(case.num_experts), experts_of(alone), 0, 0) == []
