"""What `make bench-train` measures beside ours: transformers' Mixtral, a loop over experts, and a dense network.

Shape suffixes: T tokens, K experts a token, D model dim.
"""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.model import ModelConfig
from elastic_moe.model.moe import MoE

OURS, GROUPED, EAGER, LOOP, DENSE = "ours", "transformers grouped", "transformers eager", "loop", "dense"
WAYS = (OURS, GROUPED, EAGER, LOOP, DENSE)
_STD = 0.05


class Ours(nn.Module):
    """Our layer as a function of its input alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.moe = MoE(config)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.moe(x_BSD, torch.ones(x_BSD.shape[0], dtype=torch.bool))[0]


class Loop(nn.Module):
    """As one writes it first: for each expert the tokens that chose it, three products, and an addition in place."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.router = nn.Linear(config.dim, config.num_experts, bias=False)
        self.experts = nn.ModuleList(Dense(config.dim, config.expert_dim) for _ in range(config.num_experts))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        weights_TK, chosen_TK = self.router(x_TD).float().softmax(-1).topk(self.top_k)
        weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).to(x_TD.dtype)
        y_TD = torch.zeros_like(x_TD)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(chosen_TK == number)
            y_TD.index_add_(0, token, expert(x_TD[token]) * weights_TK[token, choice, None])
        return y_TD.view_as(x_BSD)


class Dense(nn.Module):
    """One SwiGLU network."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def mixtral_config(model: ModelConfig, way: str):
    """transformers' configuration of the same model; its experts run grouped or one by one."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.expert_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        num_local_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
        output_router_logits=True,
        router_aux_loss_coef=model.balance_coeff,
    )
    config._experts_implementation = "grouped_mm" if way == GROUPED else "eager"
    return config


def layer(model: ModelConfig, way: str, dtype: torch.dtype) -> nn.Module:
    """One layer, (B, S, D) to (B, S, D), its weights drawn."""
    if way == OURS:
        found: nn.Module = Ours(model)
    elif way == LOOP:
        found = Loop(model)
    elif way == DENSE:
        found = Dense(model.dim, model.top_k * model.expert_dim)
    else:
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        found = MixtralSparseMoeBlock(mixtral_config(model, way))
    draw = torch.Generator().manual_seed(0)
    for param in found.parameters():
        nn.init.normal_(param, std=_STD, generator=draw)
    return found.to(dtype)


def same_weights(ours: Any, theirs: Any) -> None:
    """Give transformers' layer our weights."""
    moe = ours.moe
    theirs.gate.weight.data.copy_(moe.router.weight.data)
    theirs.experts.gate_up_proj.data.copy_(torch.cat((moe.experts.gate_EFD.data, moe.experts.up_EFD.data), 1))
    theirs.experts.down_proj.data.copy_(moe.experts.down_EDF.data)


class PeakMemory:
    """Bytes that this process has had at most since `begin`, beyond what it had then."""

    def begin(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present from here on
        self._before = _status("VmRSS")

    def taken(self) -> int:
        return max(0, _status("VmHWM") - self._before)


def _status(name: str) -> int:
    (kib,) = re.findall(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kib) * 1024
