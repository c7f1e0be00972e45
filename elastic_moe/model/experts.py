"""The routed experts of one layer: SwiGLU networks held as 3-D parameters.

Shape suffixes: R rows (a token once for each expert that it goes to), P source ranks, E experts held here,
D model dim, F expert dim.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elastic_moe.model.config import ModelConfig

log = logging.getLogger(__name__)

_GROUPED_STRIDE_BYTES = 16


def grouped_obstacle(device_type: str, dtype: torch.dtype, dims: tuple[int, ...]) -> str | None:
    """Why `F.grouped_mm` cannot compute these experts, None where it can.

    Its strides must be multiples of 16 bytes, and CUDA's kernel takes bf16 only (torch/nn/functional.py).
    """
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if device_type not in ("cpu", "cuda"):
        return f"grouped_mm has no kernel for {device_type}"
    if device_type == "cuda" and dtype is not torch.bfloat16:
        return f"grouped_mm on cuda takes bfloat16, not {dtype}"
    for dim in dims:
        if dim * dtype.itemsize % _GROUPED_STRIDE_BYTES:
            return f"dimension {dim} of {dtype} is not a multiple of {_GROUPED_STRIDE_BYTES} bytes"
    return None


@functools.cache
def uses_grouped(device_type: str, dtype: torch.dtype, dims: tuple[int, ...]) -> bool:
    """Whether these experts run in one kernel; where they do not, the log says why, once."""
    obstacle = grouped_obstacle(device_type, dtype, dims)
    if obstacle:
        log.info("experts run one by one: %s", obstacle)
    return obstacle is None


class Experts(nn.Module):
    """SwiGLU experts, `down(silu(gate x) * up x)`, over rows that are already sorted by expert.

    `exact` computes and accumulates so that the gradient does not depend on which ranks the rows came from:
    the parameters arrive as float64 copies, each source's rows get matrix products of their own in float32,
    and the sources' weight gradients are added in float64.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = (config.num_experts, config.expert_dim, config.dim)
        self.gate_EFD = nn.Parameter(torch.empty(shape))
        self.up_EFD = nn.Parameter(torch.empty(shape))
        self.down_EDF = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))
        self.exact = False

    def forward(self, x_RD: Tensor, counts_PE: Tensor) -> Tensor:
        """Rows in, rows out, in the same order.

        Args:
            x_RD: rows ordered by source, and by expert within a source.
            counts_PE: int64, on the CPU: rows of each source for each expert; they add up to R.
        """
        if not counts_PE.shape[1]:
            # No expert is held here. FSDP2 cannot reduce gradients of nothing, so the parameters get none; and that it
            # is called at all keeps FSDP2's order of gathers, which must be that of the other ranks.
            return x_RD.clone()
        weights = tuple(
            w.to_local() if isinstance(w, DTensor) else w for w in (self.gate_EFD, self.up_EFD, self.down_EDF)
        )
        if self.exact:
            rows_of_source = x_RD.split(counts_PE.sum(1).tolist())
            return torch.cat(
                [
                    self._swiglu(rows, counts, tuple(w.to(x_RD.dtype) for w in weights))
                    for rows, counts in zip(rows_of_source, counts_PE, strict=True)
                ]
            )
        if counts_PE.shape[0] == 1:
            return self._swiglu(x_RD, counts_PE[0], weights)
        order_R = expert_major_order(counts_PE).to(x_RD.device)
        y_RD = self._swiglu(x_RD[order_R], counts_PE.sum(0), weights)
        return y_RD[torch.argsort(order_R)]

    def _swiglu(self, x_RD: Tensor, counts_E: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        gate, up, down = weights
        grouped = uses_grouped(x_RD.device.type, x_RD.dtype, tuple(gate.shape[1:]))
        products = grouped_products if grouped else looped_products
        ends_E = counts_E.cumsum(0).to(torch.int32)
        hidden_RF = F.silu(products(x_RD, gate, ends_E)) * products(x_RD, up, ends_E)
        return products(hidden_RF, down, ends_E)


def expert_major_order(counts_PE: Tensor) -> Tensor:
    """The permutation, int64 (R,), that takes rows ordered by (source, expert) to (expert, source)."""
    num_sources, num_experts = counts_PE.shape
    expert_of_block = torch.arange(num_experts).repeat(num_sources)
    return torch.argsort(expert_of_block.repeat_interleave(counts_PE.flatten()), stable=True)


def grouped_products(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows times its matrix, one kernel for all experts: (R, I) to (R, O)."""
    if x_RI.shape[0] == 0:
        # The kernel wants a row; the product below keeps an empty result in the graph of both operands.
        return x_RI @ weight_EOI.sum(0).transpose(0, 1)
    return F.grouped_mm(x_RI, weight_EOI.transpose(-2, -1), offs=ends_E.to(x_RI.device))


def looped_products(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """The same as `grouped_products`, one expert after the other."""
    blocks = x_RI.tensor_split(ends_E.tolist()[:-1])
    return torch.cat([block @ weight.transpose(0, 1) for block, weight in zip(blocks, weight_EOI, strict=True)])
