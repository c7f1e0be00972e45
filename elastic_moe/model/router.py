"""Which experts a token goes to, how much each of them weighs, and what keeps their loads level.

Shape suffixes: B sequences, S positions, T = B x S tokens, E experts of the layer, K experts a token, D model dim,
G groups of experts, H bins of margins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.quantile import count_margins

_TINY = 1e-20  # added to a sum of sigmoids that may all have underflowed, as DeepSeek-V3 does


class RouterTerms(NamedTuple):
    """What a routing decision leaves for the step, summed over the real (not padding) sequences given."""

    load_E: Tensor
    """float64 (E,): rows sent to each expert, no gradient. Sums over micro-batches and ranks are exact."""
    balance: Tensor
    """fp32 scalar: sum over sequences of the sequence-wise balance loss; 1 a sequence when level."""
    z: Tensor
    """fp32 scalar: sum over tokens of the squared log-partition."""
    probs_E: Tensor
    """fp32 (E,): sum over sequences of each expert's mean probability over positions."""
    entropy: Tensor
    """float64 scalar, no gradient: sum over tokens of the entropy of the experts' probabilities, nats."""
    margins_EH: Tensor
    """float64 (E, H), no gradient: counts of margins with `balance` "quantile", see `count_margins`; else H is 0."""


class Router(nn.Module):
    """Scores every expert for every token, and chooses the best `top_k`.

    Computes in fp32 whatever the model does: in bf16 some tokens would go to other experts.

    With `score` "softmax" the scores of a token are its softmax over all experts (Mixtral), with "sigmoid" each is the
    sigmoid of its own logit (DeepSeek-V3, arXiv:2412.19437 eq. 15). With `norm_topk` the weights of the chosen ones are
    divided by their sum; `route_scale` multiplies them at the end. With `top_groups` they are chosen from the best
    groups (the same, section 2.1.2; a group counts its two best experts, as in the code that was released with it).
    """

    expert_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.score = config.score
        self.norm_topk = config.normalizes
        self.route_scale = config.route_scale
        self.num_groups = config.num_groups
        self.top_groups = config.top_groups if config.limits_groups else None
        self.is_forced = config.balance == "forced"
        self.counts_margins = config.balance == "quantile"
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.dim))
        # Moves which experts are chosen, never how much they weigh; zero unless `balance` is "bias" or "quantile".
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
            biased_BSE = scores_BSE.detach() + self.expert_bias
            chosen_BSK = self._in_turn(biased_BSE) if self.is_forced else self._best(biased_BSE)
            # In this order it is no view, of whose being changed in place FSDP2 would warn.
            weights_TK = self._weights(logits_BSE, scores_BSE, chosen_BSK).flatten(0, 1) * self.route_scale
            # Of a softmax that is a division by one.
            probs_BSE = scores_BSE / (_TINY + scores_BSE.sum(dim=-1, keepdim=True))
            if self.counts_margins:
                margins_EH = count_margins(biased_BSE, self.top_k, real_B)
            else:
                margins_EH = biased_BSE.new_zeros((biased_BSE.shape[-1], 0), dtype=torch.float64)
            terms = router_terms(logits_BSE, probs_BSE, chosen_BSK, real_B)._replace(margins_EH=margins_EH)
        return weights_TK, chosen_BSK.flatten(0, 1), terms

    def _best(self, biased_BSE: Tensor) -> Tensor:
        """The `top_k` experts with the highest scores, of all groups or of the best ones."""
        if self.top_groups is not None:
            of_group_BSGX = biased_BSE.unflatten(-1, (self.num_groups, -1))
            best_two = of_group_BSGX.topk(min(2, of_group_BSGX.shape[-1]), dim=-1).values.sum(dim=-1)
            allowed = best_two.topk(self.top_groups, dim=-1).indices
            closed_BSG = torch.ones_like(best_two, dtype=torch.bool).scatter(-1, allowed, value=False)
            biased_BSE = of_group_BSGX.masked_fill(closed_BSG[..., None], -torch.inf).flatten(-2)
        return biased_BSE.topk(self.top_k, dim=-1).indices

    def _in_turn(self, like_BSE: Tensor) -> Tensor:
        """The experts one after another, by the position in the sequence alone."""
        num_sequences, num_positions, num_experts = like_BSE.shape
        rows = torch.arange(num_positions * self.top_k, device=like_BSE.device) % num_experts
        return rows.view(1, num_positions, self.top_k).expand(num_sequences, -1, -1)

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
    # Not by one-hot rows, which are as many numbers as all probabilities, and whose bounds a GPU would wait to check.
    rows_BR = chosen_BSK.flatten(1)
    count_BE = rows_BR.new_zeros((len(rows_BR), num_experts)).scatter_add_(1, rows_BR, torch.ones_like(rows_BR))
    mean_probs_BE = probs_BSE.mean(dim=1)
    level = num_experts / (num_positions * top_k)
    balance_B = (count_BE * level * mean_probs_BE).sum(dim=-1)
    z_B = logits_BSE.logsumexp(dim=-1).square().sum(dim=-1)
    entropy_B = torch.special.entr(probs_BSE.detach()).sum(dim=(1, 2))
    return RouterTerms(
        load_E=(count_BE * real_B[:, None]).sum(dim=0).double(),
        balance=(balance_B * real_B).sum(),
        z=(z_B * real_B).sum(),
        probs_E=(mean_probs_BE * real_B[:, None]).sum(dim=0),
        entropy=(entropy_B * real_B).double().sum(),
        margins_EH=probs_BSE.new_zeros((num_experts, 0), dtype=torch.float64),
    )


def global_balance(probs_LE: Tensor, load_LE: Tensor) -> Tensor:
    """What some sequences add to the balance loss of a whole batch, summed over layers: 1 a sequence when level.

    The loss of a batch is ``E * sum_e f_e P_e`` (arXiv:2501.11873, eq. 1 over the global batch): `f_e` the part of all
    rows of the batch that go to expert e, without a gradient, and `P_e` its mean probability over the batch. It is
    linear in `P`, so sequences add up whatever the split, once the loads are those of the whole batch.

    Args:
        probs_LE: `RouterTerms.probs_E` of these sequences, by layer.
        load_LE: loads of the whole batch, summed over all ranks and micro-batches.
    """
    part_LE = load_LE / load_LE.sum(dim=1, keepdim=True)
    return load_LE.shape[1] * (part_LE * probs_LE.double()).sum()


@torch.no_grad()
def move_bias(expert_bias: Tensor, load_E: Tensor, rate: float) -> None:
    """One step of aux-loss-free balancing: raise the bias of underloaded experts, lower that of overloaded ones.

    `load_E` is the load of the whole batch, summed over all ranks; see arXiv:2408.15664, algorithm 1. The bias is
    kept centred, which changes no choice, so that it cannot drift.
    """
    expert_bias += rate * torch.sign(load_E.mean() - load_E)
    expert_bias -= expert_bias.mean()
