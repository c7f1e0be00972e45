"""Public Mixtral weights to ours.

The names are those of Hugging Face's `MixtralForCausalLM.state_dict()`: experts held together as 3-D tensors
(transformers 5) or one by one (transformers 4, and the published safetensors files).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from elastic_moe.model.config import ModelConfig

_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q_proj.weight": "self_attn.q_proj.weight",
    "attention.k_proj.weight": "self_attn.k_proj.weight",
    "attention.v_proj.weight": "self_attn.v_proj.weight",
    "attention.o_proj.weight": "self_attn.o_proj.weight",
    "moe_norm.weight": "post_attention_layernorm.weight",
}


def dense_names(config: ModelConfig) -> dict[str, str]:
    """Our name of every parameter outside the MoE layers, and Mixtral's name of the same tensor."""
    layers = {
        f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}"
        for i in range(config.num_layers)
        for ours, theirs in _LAYER.items()
    }
    return _TOP | layers


def from_mixtral(theirs: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Mixtral's tensors under our names, for `elastic_moe.parallel.load_full`.

    Raises:
        KeyError: a tensor that `config` calls for is missing.
    """
    ours = {name: theirs[source] for name, source in dense_names(config).items()}
    for i in range(config.num_layers):
        moe = f"layers.{i}.moe"
        if (fused := f"model.layers.{i}.mlp") + ".gate.weight" in theirs:
            ours[f"{moe}.router.weight"] = theirs[f"{fused}.gate.weight"]
            gate_EFD, up_EFD = theirs[f"{fused}.experts.gate_up_proj"].chunk(2, dim=1)
            down_EDF = theirs[f"{fused}.experts.down_proj"]
        else:
            single = f"model.layers.{i}.block_sparse_moe"
            ours[f"{moe}.router.weight"] = theirs[f"{single}.gate.weight"]
            gate_EFD, down_EDF, up_EFD = (
                torch.stack([theirs[f"{single}.experts.{e}.{w}.weight"] for e in range(config.num_experts)])
                for w in ("w1", "w2", "w3")
            )
        ours[f"{moe}.experts.gate_EFD"] = gate_EFD
        ours[f"{moe}.experts.up_EFD"] = up_EFD
        ours[f"{moe}.experts.down_EDF"] = down_EDF
    return ours
