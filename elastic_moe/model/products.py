"""Matrix products of experts: one expert's by the library that is fastest for it, or those of all in one kernel.

Shape suffixes: R rows (of one expert, or of all), E experts, I and O the widths of a matrix.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_moe.torch_private import onednn_linear

# About where what a call of oneDNN costs more than one of MKL is what it saves: an estimate, no measured crossing.
_ONEDNN_FROM_FLOPS = 4e6


def product(x_RI: Tensor, weight_OI: Tensor, ends_E: Tensor | None = None) -> Tensor:
    """Rows times a matrix, (R, O); with `ends_E` each expert's rows times its own, of (E, O, I)."""
    if ends_E is not None:
        return F.grouped_mm(x_RI, weight_OI.transpose(-2, -1), offs=ends_E)
    return _linear(x_RI, weight_OI)


def product_back(grad_RO: Tensor, weight_OI: Tensor, ends_E: Tensor | None = None) -> Tensor:
    """The gradient (R, I) of the rows of a `product`."""
    if ends_E is not None:
        return F.grouped_mm(grad_RO, weight_OI, offs=ends_E)
    return _linear(grad_RO, weight_OI.transpose(0, 1))


def product_weight(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The gradient of the matrix of a `product`, of its shape; in `out` where that is given, which is one expert's."""
    if ends_E is not None:
        return F.grouped_mm(grad_RO.transpose(0, 1), x_RI, offs=ends_E)
    if _onednn_pays(grad_RO, x_RI.shape[1]):
        found = onednn_linear(grad_RO.transpose(0, 1), x_RI.transpose(0, 1))
        return found if out is None else out.copy_(found)
    return torch.mm(grad_RO.transpose(0, 1), x_RI, out=out)


def _linear(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    if _onednn_pays(x_RI, weight_OI.shape[0]):
        return onednn_linear(x_RI, weight_OI)
    return torch.mm(x_RI, weight_OI.transpose(0, 1))


def _onednn_pays(x_RI: Tensor, width: int) -> bool:
    return uses_onednn(x_RI.device.type, x_RI.dtype) and 2.0 * x_RI.numel() * width >= _ONEDNN_FROM_FLOPS


@functools.cache
def uses_onednn(device_type: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN is faster than what torch takes for a product of its own accord.

    For fp32 torch takes MKL, which uses no AVX-512 on a CPU that is not Intel's: oneDNN has twice its speed there. For
    bf16 torch takes oneDNN by itself.
    """
    if device_type != "cpu" or dtype is not torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not _is_intel()


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # unknown: as torch does


def silu(x: Tensor) -> Tensor:
    """`F.silu`. In fp32 its kernel takes eight times as long as sigmoid's on a CPU (torch 2.13)."""
    if x.device.type == "cpu" and x.dtype is torch.float32:
        return torch.sigmoid(x).mul_(x)
    return F.silu(x)
