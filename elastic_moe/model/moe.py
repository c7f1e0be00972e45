"""Routing and the MoE layer.

Shape suffixes: B sequences, S positions, T = B x S tokens, E experts of the layer, K experts a token,
R = T x K rows, D model dim.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.experts import Experts


class RouterTerms(NamedTuple):
    """What a routing decision leaves for the step, summed over the real (not padding) sequences given."""

    load_E: Tensor
    """float64 (E,): rows sent to each expert, no gradient. Sums over micro-batches and ranks are exact."""
    balance: Tensor
    """fp32 scalar: sum over sequences of the sequence-wise balance loss; 1 a sequence when level."""
    z: Tensor
    """fp32 scalar: sum over tokens of the squared log-partition."""


class Dispatcher(Protocol):
    """Carries rows to the ranks that hold their experts, and the results back."""

    def __call__(self, x_RD: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
        """Apply `experts` to rows sorted by expert, `counts_E` (int64, (E,)) rows for each.

        A collective where experts live on several ranks: each rank calls it, also with no rows.
        """


class LocalDispatch:
    """All experts are on this rank."""

    def __call__(self, x_RD: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
        out: Tensor = experts(x_RD, counts_E[None].cpu())
        return out


class Router(nn.Module):
    """Softmax over all experts in fp32, the best `top_k` of it, renormalised to add up to one."""

    expert_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.dim))
        # Moves which experts are chosen, never how much they weigh; zero unless `balance` is "bias".
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x_BSD: Tensor, real_B: Tensor) -> tuple[Tensor, Tensor, RouterTerms]:
        """Choose experts.

        Args:
            x_BSD: the tokens.
            real_B: bool; False for a padding sequence, which is routed like any other and counted nowhere.

        Returns:
            weights (T, K) fp32, experts (T, K) int64, and the terms.
        """
        logits_BSE = F.linear(x_BSD, self.weight).float()
        probs_BSE = logits_BSE.softmax(dim=-1)
        chosen_BSK = (probs_BSE.detach() + self.expert_bias).topk(self.top_k, dim=-1).indices
        weights_BSK = probs_BSE.gather(-1, chosen_BSK)
        weights_BSK = weights_BSK / weights_BSK.sum(dim=-1, keepdim=True)
        terms = router_terms(logits_BSE, probs_BSE, chosen_BSK, real_B)
        return weights_BSK.flatten(0, 1), chosen_BSK.flatten(0, 1), terms


def router_terms(logits_BSE: Tensor, probs_BSE: Tensor, chosen_BSK: Tensor, real_B: Tensor) -> RouterTerms:
    """Loads and auxiliary losses. Every term is a sum over sequences, so any split of a batch adds up to the same."""
    num_experts, (num_positions, top_k) = probs_BSE.shape[-1], chosen_BSK.shape[1:]
    count_BE = F.one_hot(chosen_BSK, num_experts).sum(dim=(1, 2))
    level = num_experts / (num_positions * top_k)
    balance_B = (count_BE * level * probs_BSE.mean(dim=1)).sum(dim=-1)
    z_B = logits_BSE.logsumexp(dim=-1).square().sum(dim=-1)
    return RouterTerms(
        load_E=(count_BE * real_B[:, None]).sum(dim=0).double(),
        balance=(balance_B * real_B).sum(),
        z=(z_B * real_B).sum(),
    )


@torch.no_grad()
def move_bias(expert_bias: Tensor, load_E: Tensor, rate: float) -> None:
    """One step of aux-loss-free balancing: raise the bias of underloaded experts, lower that of overloaded ones.

    `load_E` is the load of the whole batch, summed over all ranks; see arXiv:2408.15664, algorithm 1. The bias is
    kept centred, which changes no choice, so that it cannot drift.
    """
    expert_bias += rate * torch.sign(load_E.mean() - load_E)
    expert_bias -= expert_bias.mean()


class SwiGLU(nn.Module):
    """One dense SwiGLU network: the shared expert."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class MoE(nn.Module):
    """Top-k mixture of experts without dropped tokens, (B, S, D) to (B, S, D).

    `dispatch` is how rows reach their experts: local until `elastic_moe.parallel` puts an all-to-all there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.num_experts = config.num_experts
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = SwiGLU(config.dim, config.shared_expert_dim) if config.shared_expert_dim else None
        self.dispatch: Dispatcher = LocalDispatch()

    def forward(self, x_BSD: Tensor, real_B: Tensor) -> tuple[Tensor, RouterTerms]:
        weights_TK, chosen_TK, terms = self.router(x_BSD, real_B)
        x_TD = x_BSD.flatten(0, 1)
        order_R = torch.argsort(chosen_TK.flatten(), stable=True)
        counts_E = torch.bincount(chosen_TK.flatten(), minlength=self.num_experts)
        # Each row is copied from its token's K slots, not added into the token: sums over K then run in a fixed
        # order, forward and backward, on any device and for any split of the batch.
        slots_RD = x_TD[:, None].expand(-1, self.top_k, -1).flatten(0, 1)
        y_RD = self.dispatch(slots_RD[order_R], counts_E, self.experts)
        y_TKD = y_RD[torch.argsort(order_R)].unflatten(0, (-1, self.top_k))
        y_TD = (y_TKD * weights_TK[..., None].to(y_TKD.dtype)).sum(dim=1)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(x_BSD), terms
