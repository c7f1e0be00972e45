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


def document_mask(documents_BS: Tensor) -> Tensor:
    """Which positions each position sees, bool (B, 1, S, S): itself, and those before it in its document.

    Args:
        documents_BS: int64, the document of each position; a number stands for one document of a sequence.
    """
    num_positions = documents_BS.shape[1]
    before_SS = torch.ones(num_positions, num_positions, dtype=torch.bool, device=documents_BS.device).tril()
    return ((documents_BS[:, :, None] == documents_BS[:, None, :]) & before_SS)[:, None]


class Attention(nn.Module):
    """Multi-head attention, (B, S, D) to (B, S, D), each position seeing itself and those before it.

    With a mask it sees those that the mask has for it. Both ways run in kernels that hold no (S, S) scores for each
    head, on the CPU and on CUDA; there the one that takes a mask knows no groups, so each query head gets its keys.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.rope_theta = config.rope_theta
        self.per_group = config.num_heads // config.num_kv_heads
        # A flag of its own: torch.compile takes numbers that differ between models for variables.
        self.is_grouped = self.per_group > 1
        query_dim, key_dim = config.num_heads * self.head_width, config.num_kv_heads * self.head_width
        self.q_proj = nn.Linear(config.dim, query_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, key_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, key_dim, bias=False)
        self.o_proj = nn.Linear(query_dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor, mask_B1SS: Tensor | None = None) -> Tensor:
        heads = (*x_BSD.shape[:2], -1, self.head_width)
        cos_SH, sin_SH = rotary_tables(x_BSD.shape[1], self.head_width, self.rope_theta, x_BSD.device)
        q_BSNH = rotate(self.q_proj(x_BSD).view(heads), cos_SH, sin_SH)
        k_BSGH = rotate(self.k_proj(x_BSD).view(heads), cos_SH, sin_SH)
        v_BSGH = self.v_proj(x_BSD).view(heads)
        repeats = self.is_grouped and mask_B1SS is not None
        if repeats:
            k_BSGH, v_BSGH = (x_BSGH.repeat_interleave(self.per_group, dim=2) for x_BSGH in (k_BSGH, v_BSGH))
        mixed_BNSH = F.scaled_dot_product_attention(
            q_BSNH.transpose(1, 2),
            k_BSGH.transpose(1, 2),
            v_BSGH.transpose(1, 2),
            attn_mask=mask_B1SS,
            is_causal=mask_B1SS is None,
            enable_gqa=self.is_grouped and not repeats,
        )
        out: Tensor = self.o_proj(mixed_BNSH.transpose(1, 2).flatten(2))
        return out
