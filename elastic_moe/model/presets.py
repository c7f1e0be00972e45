"""Models by name: what `model.preset` lays under the other fields of `[model]`. No torch.

The large ones have the public models' shapes, to plan, to try out and to count with; what is computed is this model's
mathematics, so only `mixtral-8x7b` is what it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

PresetName = Literal["tiny", "small", "mixtral-8x7b", "dbrx-132b", "deepseek-like"]

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        # What the defaults are: 3.4 million parameters that two cores train on bytes.
        "tiny": {
            "vocab_size": 256,
            "dim": 128,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "num_experts": 8,
            "top_k": 2,
            "expert_dim": 256,
        },
        # 107 million, 32 million of them active.
        "small": {
            "vocab_size": 256,
            "dim": 512,
            "num_layers": 8,
            "num_heads": 8,
            "num_kv_heads": 4,
            "num_experts": 8,
            "top_k": 2,
            "expert_dim": 1024,
            "shared_expert_dim": 0,
        },
        # arXiv:2401.04088, and config.json of mistralai/Mixtral-8x7B-v0.1.
        "mixtral-8x7b": {
            "vocab_size": 32_000,
            "dim": 4096,
            "num_layers": 32,
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
            "rope_theta": 1e6,
            "num_experts": 8,
            "top_k": 2,
            "expert_dim": 14_336,
            "balance": "sequence",
            "balance_coeff": 0.02,
        },
        # config.json of databricks/dbrx-base; its norms have means and its attention clips, which this model does not.
        "dbrx-132b": {
            "vocab_size": 100_352,
            "dim": 6144,
            "num_layers": 40,
            "num_heads": 48,
            "num_kv_heads": 8,
            "rope_theta": 5e5,
            "num_experts": 16,
            "top_k": 4,
            "expert_dim": 10_752,
            "balance": "sequence",
            "balance_coeff": 0.05,
        },
        # DeepSeek-V3's routing (arXiv:2412.19437, sections 2.1.2 and 4.2) in a model of 16 billion parameters, of the
        # shape of Moonlight-16B-A3B (arXiv:2502.16982): attention is grouped, not latent, and all layers are sparse.
        "deepseek-like": {
            "vocab_size": 102_400,
            "dim": 2048,
            "num_layers": 27,
            "num_heads": 16,
            "num_kv_heads": 16,
            "rope_theta": 1e4,
            "num_experts": 64,
            "top_k": 6,
            "expert_dim": 1408,
            "shared_expert_dim": 2816,
            "score": "sigmoid",
            "norm_topk": True,
            "route_scale": 2.5,
            "num_groups": 8,
            "top_groups": 4,
            "balance": "bias",
            "balance_rate": 1e-3,
        },
    }
)


def with_preset(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """`fields` laid over those of the preset that they name, without that name; as they are where they name none."""
    name = fields.get("preset")
    if not isinstance(name, str) or name not in PRESETS:
        return fields
    return {**PRESETS[name], **{field: value for field, value in fields.items() if field != "preset"}}
