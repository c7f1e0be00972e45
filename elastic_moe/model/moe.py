"""The MoE layer: tokens to rows, rows to their experts and back.

Shape suffixes: B sequences, S positions, T = B x S tokens, K experts a token, D model dim.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.dispatch import Dispatcher, LocalDispatch, Routes
from elastic_moe.model.experts import Experts
from elastic_moe.model.router import Router, RouterTerms


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

    `dispatch` is how tokens reach their experts: local until `elastic_moe.parallel` puts an all-to-all there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = SwiGLU(config.dim, config.shared_expert_dim) if config.shared_expert_dim else None
        self.dispatch: Dispatcher = LocalDispatch(config.num_experts)

    def forward(self, x_BSD: Tensor, real_B: Tensor) -> tuple[Tensor, RouterTerms]:
        weights_TK, chosen_TK, terms = self.router(x_BSD, real_B)
        x_TD = x_BSD.flatten(0, 1)
        y_TD = self.dispatch(x_TD, Routes(weights_TK, chosen_TK), self.experts)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(x_BSD), terms
