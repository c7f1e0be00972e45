"""How much a token costs, and what a device could do at best: model FLOPs utilisation (PaLM, arXiv:2204.02311, B)."""

from __future__ import annotations

import functools
import re
import time

import torch

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.products import product

# Dense operations per second by the makers' data sheets, without sparsity: (bfloat16, float32).
# Words of the names that torch.cuda.get_device_name() tells; the first that is in the name counts. An A10G is no A10,
# and of a GB200 public figures contradict one another.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2.25e15, 75e12),
    ("GH200", 989e12, 67e12),
    ("H200", 989e12, 67e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("H20", 148e12, 44e12),
    ("A100", 312e12, 19.5e12),
    ("A800", 312e12, 19.5e12),
    ("A10", 125e12, 31.2e12),
    ("L40S", 362e12, 91.6e12),
    ("L4", 121e12, 30.3e12),
    ("MI300X", 1307e12, 163e12),
    ("MI250X", 383e12, 95.7e12),
)
_MEASURED_WIDTH = 768
_MEASURED_TIMES = 5


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Operations of forward and backward for one token, two for each multiplication and addition.

    Counts what the mathematics asks for: the chosen experts alone, half of each attention matrix, and nothing twice
    that is recomputed. The backward pass takes two products for each of the forward pass.
    """
    attention = 2 * model.dim * model.head_width * (model.num_heads + model.num_kv_heads)
    experts = 3 * model.dim * (model.top_k * model.expert_dim + model.shared_expert_dim)
    router = model.num_experts * model.dim
    scores = 2 * model.num_heads * model.head_width * (seq_len + 1) / 2
    layer = attention + experts + router + scores
    return 3.0 * 2.0 * (model.num_layers * layer + model.vocab_size * model.dim)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second that `device` reaches at best; None where nobody knows. A CPU is measured, once."""
    if device.type == "cpu":
        return _measured(dtype)
    return known_peak(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def known_peak(name: str, dtype: torch.dtype) -> float | None:
    """The peak of a device by its name, None for one that is not listed."""
    for part, bfloat16, float32 in _PEAKS:
        if re.search(rf"\b{part}\b", name):
            return bfloat16 if dtype is torch.bfloat16 else float32
    return None


@functools.cache
def _measured(dtype: torch.dtype) -> float:
    """What the best of a few products reaches in this process: some tens of milliseconds."""
    x = torch.ones(_MEASURED_WIDTH, _MEASURED_WIDTH, dtype=dtype)
    took_s = []
    with torch.no_grad():
        for _ in range(_MEASURED_TIMES):
            began_s = time.perf_counter()
            product(x, x)
            took_s.append(time.perf_counter() - began_s)
    return 2.0 * _MEASURED_WIDTH**3 / min(took_s)
