"""The MoE layer: tokens to rows, rows to their experts and back.

Shape suffixes: B sequences, S positions, T = B x S tokens, E experts of the layer, K experts a token,
R = T x K rows, D model dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.experts import Experts
from elastic_moe.model.router import Router, RouterTerms
from elastic_moe.model.rows import RowOrder, combine_rows, gather_rows


class Dispatcher(Protocol):
    """Carries rows to the ranks that hold their experts, and the results back."""

    def __call__(self, x_RD: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
        """Apply `experts` to rows sorted by expert, `counts_E` (int64, (E,)) rows for each.

        A collective where experts live on several ranks: each rank calls it, also with no rows.
        """


class LocalDispatch:
    """All experts are on this rank."""

    def __call__(self, x_RD: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
        out: Tensor = experts(x_RD, counts_E[None])
        return out


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
        order = RowOrder.by_expert(chosen_TK)
        counts_E = torch.bincount(chosen_TK.flatten(), minlength=self.num_experts)
        y_RD = self.dispatch(gather_rows(x_TD, order), counts_E, self.experts)
        y_TD = combine_rows(y_RD, weights_TK, order)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(x_BSD), terms
