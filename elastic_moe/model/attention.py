"""Causal self-attention with rotary positions and grouped key heads.

Shape suffixes: B sequences, S positions, D model dim, N query heads, G key heads, H head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.model.config import ModelConfig


def rotary_tables(num_positions: int, head_width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, fp32, each (S, H): the two halves of H repeat."""
    frequencies = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BSNH: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
    """Turn each pair (i, i + H/2) by its position's angle: the pairing of the public Llama and Mixtral weights."""
    low, high = x_BSNH.chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return x_BSNH * cos_SH[:, None].to(x_BSNH.dtype) + turned * sin_SH[:, None].to(x_BSNH.dtype)


class Attention(nn.Module):
    """Multi-head attention, (B, S, D) to (B, S, D), each position seeing itself and those before it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.rope_theta = config.rope_theta
        query_dim, key_dim = config.num_heads * self.head_width, config.num_kv_heads * self.head_width
        self.q_proj = nn.Linear(config.dim, query_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, key_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, key_dim, bias=False)
        self.o_proj = nn.Linear(query_dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        heads = (*x_BSD.shape[:2], -1, self.head_width)
        cos_SH, sin_SH = rotary_tables(x_BSD.shape[1], self.head_width, self.rope_theta, x_BSD.device)
        q_BSNH = rotate(self.q_proj(x_BSD).view(heads), cos_SH, sin_SH)
        k_BSGH = rotate(self.k_proj(x_BSD).view(heads), cos_SH, sin_SH)
        v_BSGH = self.v_proj(x_BSD).view(heads)
        mixed_BNSH = F.scaled_dot_product_attention(
            q_BSNH.transpose(1, 2),
            k_BSGH.transpose(1, 2),
            v_BSGH.transpose(1, 2),
            is_causal=True,
            enable_gqa=q_BSNH.shape[2] != k_BSGH.shape[2],
        )
        out: Tensor = self.o_proj(mixed_BNSH.transpose(1, 2).flatten(2))
        return out
