"""What a step tells of its routing: how level the experts' loads are, and how decided the routers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_moe.parallel import Shared


@dataclass(frozen=True)
class RoutingStats:
    """A step's routing, over all ranks. A row is a token at one of its experts.

    Attributes:
        load_LE: rows of each expert, by layer.
        load_max: rows of the busiest expert of any layer over its layer's mean; 1 is level.
        load_min: rows of the least busy one over its layer's mean.
        load_max_L: `load_max` by layer.
        load_entropy_L: entropy of a layer's loads over that of level ones: 1 is level, 0 all rows at one expert.
        router_entropy_L: mean entropy of a token's probabilities over that of equal ones, by layer: 0 is decided.
        dropped: rows that should have gone to an expert and went to none.
    """

    load_LE: list[list[int]]
    load_max: float
    load_min: float
    load_max_L: list[float]
    load_entropy_L: list[float]
    router_entropy_L: list[float]
    dropped: int


def routing_stats(load_LE: Tensor, entropy_L: Tensor, num_tokens: int, top_k: int) -> RoutingStats:
    """The statistics of a batch.

    Args:
        load_LE: float64, rows of each expert.
        entropy_L: float64, sums over the tokens of the entropy of a token's probabilities, nats.
        num_tokens: of the batch.
        top_k: experts that each of them should have gone to.
    """
    load_LE, entropy_L = load_LE.cpu(), entropy_L.cpu()
    num_experts = load_LE.shape[1]
    mean_L1 = load_LE.mean(dim=1, keepdim=True)
    over_mean_LE = load_LE / mean_L1
    level = math.log(num_experts) if num_experts > 1 else 1.0
    parts_LE = load_LE / load_LE.sum(dim=1, keepdim=True)
    return RoutingStats(
        load_LE=[[int(rows) for rows in layer] for layer in load_LE.tolist()],
        load_max=float(over_mean_LE.max()),
        load_min=float(over_mean_LE.min()),
        load_max_L=over_mean_LE.amax(dim=1).tolist(),
        load_entropy_L=(torch.special.entr(parts_LE).sum(dim=1) / level).tolist(),
        router_entropy_L=(entropy_L / num_tokens / level).tolist(),
        dropped=int(load_LE.shape[0] * num_tokens * top_k - load_LE.sum()),
    )


@dataclass(frozen=True)
class SharingStats:
    """How level the ranks' shares of a step's rows were, where ranks may compute hot experts of others.

    Attributes:
        rank_load: rows of the busiest rank of an expert-parallel group over the mean, over layers and rounds; 1 is
            level.
        rank_load_owned: what it would have been if each rank had computed those of its own experts.
        copies: experts' weights that were sent, over all groups, layers and rounds, forward.
    """

    rank_load: float
    rank_load_owned: float
    copies: int


def sharing_stats(shared: Shared) -> SharingStats | None:
    """The statistics of what all ranks have counted; None where none did."""
    if not shared.level_rows:
        return None
    return SharingStats(
        rank_load=shared.busiest_rows / shared.level_rows,
        rank_load_owned=shared.owned_rows / shared.level_rows,
        copies=round(shared.copies),
    )
