"""The routed experts of one layer: SwiGLU networks held as 3-D parameters.

Shape suffixes: R rows (a token once for each expert that it goes to), P source ranks, E experts held here,
D model dim, F expert dim.
"""

from __future__ import annotations

import functools
import logging
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.swiglu import EmptyLike, Weights, expert_rows

log = logging.getLogger(__name__)

_GROUPED_STRIDE_BYTES = 16

# On a CPU one kernel is a loop over the experts, in C++ for each product: below so many operations of one expert in one
# product that saves more than an expert's rows gain from staying in the cache, or from oneDNN. An estimate, no
# measured crossing: `python -m tests.bench.train --parts products` measures it (docs/benchmarks.md).
_APART_FROM_FLOPS = 4e6


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
    """Whether these experts can run in one kernel; where they cannot, the log says why, once."""
    obstacle = grouped_obstacle(device_type, dtype, dims)
    if obstacle:
        log.info("experts run one by one: %s", obstacle)
    return obstacle is None


class Loan(Protocol):
    """Experts of other ranks that some rows of this pass are computed with, its guests, and who gets this rank's."""

    @property
    def num_guests(self) -> int:
        """How many come here."""

    def __call__(self, x_RD: Tensor, weights: Weights) -> tuple[Tensor, Weights, Weights]:
        """Exchange weights: the rows and this rank's weights, to be computed with in place of those given, and the
        guests', in the order of the experts. Differentiable: guests' gradients go to their owners."""


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
        self.empty_like: EmptyLike = torch.empty_like  # gives the memory of the gradients of all weights

    def forward(self, x_RD: Tensor, counts_PE: Tensor, loan: Loan | None = None) -> Tensor:
        """Rows in, rows out, in the same order.

        Args:
            x_RD: rows ordered by source, and by expert within a source.
            counts_PE: int64: rows of each source for each expert; they add up to R. Where an accelerator runs all
                experts in one kernel they may lie there: the host need not wait for them.
            loan: experts that are lent and taken for this pass, the latter as further columns of `counts_PE`, which is
                on the CPU then. Not in exact mode.
        """
        if not counts_PE.shape[1] and loan is None:
            # No expert is held here. FSDP2 cannot reduce gradients of nothing, so the parameters get none; and that it
            # is called at all keeps FSDP2's order of gathers, which must be that of the other ranks.
            return x_RD.clone()
        gate, up, down = (
            w.to_local() if isinstance(w, DTensor) else w for w in (self.gate_EFD, self.up_EFD, self.down_EDF)
        )
        if loan is not None:
            return _beside_guests(x_RD, counts_PE, loan, (gate, up, down))
        if not self.exact:
            in_one = _goes_in_one(x_RD, gate)
            return expert_rows(x_RD, (gate, up, down), counts_PE, in_one=in_one, empty_like=self.empty_like)
        counts_PE = counts_PE.cpu()
        rows_of_source = x_RD.split(counts_PE.sum(1).tolist())
        return torch.cat(
            [
                _composed(rows, counts, (gate.to(x_RD.dtype), up.to(x_RD.dtype), down.to(x_RD.dtype)))
                for rows, counts in zip(rows_of_source, counts_PE, strict=True)
            ]
        )


def _beside_guests(x_RD: Tensor, counts_PE: Tensor, loan: Loan, weights: Weights) -> Tensor:
    """The rows of this rank's experts and of its guests."""
    x_RD, own, guests = loan(x_RD, weights)
    of_both = counts_PE.tensor_split([counts_PE.shape[1] - loan.num_guests], dim=1)
    if not loan.num_guests or not of_both[0].shape[1]:
        weights = guests if loan.num_guests else own
        # Without either, no row has come.
        return expert_rows(x_RD, weights, counts_PE, in_one=_goes_in_one(x_RD, weights[0])) if len(weights[0]) else x_RD
    sizes_P2 = torch.stack([counts.sum(1) for counts in of_both], dim=1)
    parts = x_RD.split(sizes_P2.flatten().tolist())
    found = []
    for i, (mine, counts) in enumerate(zip((own, guests), of_both, strict=True)):
        x = torch.cat(parts[i::2])
        y = expert_rows(x, mine, counts, in_one=_goes_in_one(x, mine[0]))
        found.append(y.split(sizes_P2[:, i].tolist()))
    return torch.cat([part for of_source in zip(*found, strict=True) for part in of_source])


def _goes_in_one(x_RD: Tensor, gate_EFD: Tensor) -> bool:
    """Whether all experts run in one kernel for each product, or one after the other in the products of their own."""
    num_experts, *dims = gate_EFD.shape
    flops = 2.0 * len(x_RD) / max(1, num_experts) * dims[0] * dims[1]
    if x_RD.device.type == "cpu" and flops >= _APART_FROM_FLOPS:
        return False
    return uses_grouped(x_RD.device.type, x_RD.dtype, tuple(dims))


def _composed(x_RD: Tensor, counts_E: Tensor, weights: Weights) -> Tensor:
    """The experts as autograd derives them: it adds up what float64 parameters get from each source in float64."""
    gate, up, down = weights
    products = (
        grouped_products if uses_grouped(x_RD.device.type, x_RD.dtype, tuple(gate.shape[1:])) else looped_products
    )
    ends_E = counts_E.cumsum(0).to(torch.int32)
    hidden_RF = F.silu(products(x_RD, gate, ends_E)) * products(x_RD, up, ends_E)
    return products(hidden_RF, down, ends_E)


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
