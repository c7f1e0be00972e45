"""Which experts a token goes to, how much each of them weighs, and what keeps their loads level.

Shape suffixes: B sequences, S positions, T = B x S tokens, E experts of the layer, K experts a token, D model dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.model.config import ModelConfig

_TINY = 1e-20  # added to a sum of sigmoids that may all have underflowed, as DeepSeek-V3 does


class RouterTerms(NamedTuple):
    """What a routing decision leaves for the step, summed over the real (not padding) sequences given."""

    load_E: Tensor
    """float64 (E,): rows sent to each expert, no gradient. Sums over micro-batches and ranks are exact."""
    balance: Tensor
    """fp32 scalar: sum over sequences of the sequence-wise balance loss; 1 a sequence when level."""
    z: Tensor
    """fp32 scalar: sum over tokens of the squared log-partition."""


class Router(nn.Module):
    """Scores every expert for every token, and chooses the best `top_k`.

    Computes in fp32 whatever the model does: in bf16 some tokens would go to other experts.

    With `score` "softmax" the scores of a token are its softmax over all experts (Mixtral), with "sigmoid" each is the
    sigmoid of its own logit (DeepSeek-V3, arXiv:2412.19437 eq. 15). With `norm_topk` the weights of the chosen ones are
    divided by their sum; `route_scale` multiplies them at the end.
    """

    expert_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.score = config.score
        self.norm_topk = config.normalizes
        self.route_scale = config.route_scale
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
        with torch.autocast(x_BSD.device.type, enabled=False):
            logits_BSE = F.linear(x_BSD.float(), self.weight.float())
            scores_BSE = logits_BSE.softmax(dim=-1) if self.score == "softmax" else logits_BSE.sigmoid()
            chosen_BSK = (scores_BSE.detach() + self.expert_bias).topk(self.top_k, dim=-1).indices
            weights_BSK = self._weights(logits_BSE, scores_BSE, chosen_BSK) * self.route_scale
            # Of a softmax that is a division by one.
            probs_BSE = scores_BSE / (_TINY + scores_BSE.sum(dim=-1, keepdim=True))
            terms = router_terms(logits_BSE, probs_BSE, chosen_BSK, real_B)
        return weights_BSK.flatten(0, 1), chosen_BSK.flatten(0, 1), terms

    def _weights(self, logits_BSE: Tensor, scores_BSE: Tensor, chosen_BSK: Tensor) -> Tensor:
        if not self.norm_topk:
            return scores_BSE.gather(-1, chosen_BSK)
        if self.score == "softmax":
            # The same as the chosen probabilities over their sum, which is 0/0 where a bias has chosen experts whose
            # probabilities have all underflowed.
            return logits_BSE.gather(-1, chosen_BSK).softmax(dim=-1)
        weights_BSK = scores_BSE.gather(-1, chosen_BSK)
        return weights_BSK / (_TINY + weights_BSK.sum(dim=-1, keepdim=True))


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
