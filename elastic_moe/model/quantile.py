"""Balancing by quantiles: which bias would have given every expert the same load.

An expert is chosen for a token where its margin, its biased score less the best one that is left out, is above 0.
Were its bias lower by the margin that exactly ``top_k / E`` of all tokens exceed, then that many would have chosen it,
as long as the other experts' biases stay. That is one step of coordinate descent on the dual of the assignment of
tokens to experts of equal load: Quantile Balancing (Jianlin Su, 2026, https://kexue.fm/archives/11619), which
Megatron-core has as ``quantile_balancing``.

Others average the quantiles of micro-batches, which depends on how a batch is split. Here margins are counted in bins:
counts add up exactly over micro-batches and ranks. The bins are fine around 0 and coarse far away, so the nearer a bias
is, the finer it is set.

Shape suffixes: B sequences, S positions, E experts, H bins.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_FINEST, _COARSEST = -20, 2  # powers of 2: margins of scores in [0, 1] with biases between -1 and 1 are within 4
_BINS_PER_OCTAVE = 8


@functools.cache
def _edges(device: torch.device) -> Tensor:
    """The bins' edges, fp32, rising: powers of two and seven between each, on both sides of 0."""
    exponents = torch.arange(_FINEST * _BINS_PER_OCTAVE, _COARSEST * _BINS_PER_OCTAVE + 1, dtype=torch.float64)
    above = torch.exp2(exponents / _BINS_PER_OCTAVE).float()
    return torch.cat((-above.flip(0), above)).to(device)


def num_bins() -> int:
    """How many bins there are; the first and the last have no outer edge."""
    return 2 * ((_COARSEST - _FINEST) * _BINS_PER_OCTAVE + 1) + 1


@torch.no_grad()
def count_margins(biased_BSE: Tensor, top_k: int, real_B: Tensor) -> Tensor:
    """Count each expert's margins over the real sequences, float64 (E, H).

    Args:
        biased_BSE: fp32, the scores by which experts are chosen.
        top_k: experts chosen; with all of them there is none left out, and every margin counts as 0.
        real_B: bool.
    """
    num_experts = biased_BSE.shape[-1]
    if top_k == num_experts:
        margins_BSE = torch.zeros_like(biased_BSE)
    else:
        margins_BSE = biased_BSE - biased_BSE.topk(top_k + 1, dim=-1).values[..., -1:]
    bins_BSE = torch.bucketize(margins_BSE, _edges(biased_BSE.device))
    bins_BSE += num_bins() * torch.arange(num_experts, device=biased_BSE.device)
    counts = torch.zeros(num_experts * num_bins(), dtype=torch.float64, device=biased_BSE.device)
    weights_BSE = real_B.double()[:, None, None].expand_as(bins_BSE)
    counts.scatter_add_(0, bins_BSE.flatten(), weights_BSE.flatten())
    return counts.view(num_experts, -1)


@torch.no_grad()
def set_bias(expert_bias: Tensor, counts_EH: Tensor, top_k: int) -> None:
    """Lower each bias by the margin that `top_k / E` of all tokens exceed, found in its bin by interpolation.

    Args:
        expert_bias: fp32 (E,), changed in place; kept centred, which changes no choice, so that it cannot drift.
        counts_EH: what `count_margins` gave, summed over the whole batch.
        top_k: experts chosen for each token.
    """
    num_experts = len(expert_bias)
    if top_k == num_experts:
        return
    edges = _edges(counts_EH.device).double()
    # Of each edge, the margins above it: falling, from nearly all tokens to nearly none.
    above_EH = counts_EH.flip(1).cumsum(1).flip(1)[:, 1:].contiguous()
    wanted = counts_EH.sum(1, keepdim=True) * top_k / num_experts
    upper_E1 = (above_EH > wanted).sum(1, keepdim=True).clamp(1, len(edges) - 1)
    more_E1, fewer_E1 = above_EH.gather(1, upper_E1 - 1), above_EH.gather(1, upper_E1)
    low_E1, high_E1 = edges[upper_E1 - 1], edges[upper_E1]
    part_E1 = ((more_E1 - wanted) / (more_E1 - fewer_E1).clamp(min=1.0)).clamp(0.0, 1.0)
    expert_bias -= (low_E1 + part_E1 * (high_E1 - low_E1)).squeeze(1).float()
    expert_bias -= expert_bias.mean()
