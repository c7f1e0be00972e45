"""SwiGLU experts, `down(silu(gate x) * up x)`, with a backward pass of their own.

Autograd's would hold what can be computed again in one pass, add what a product can add, and go over all rows of all
experts with each small operation; here an expert's rows stay in the cache from one to the next.

Shape suffixes: R rows, P source ranks, E experts held here, D model dim, F expert dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elastic_moe.model.blocks import Blocks, DeviceBlocks
from elastic_moe.model.products import product, product_back, product_weight, silu, uses_onednn


class Kept(NamedTuple):
    """What the backward pass of some rows needs."""

    x_RD: Tensor
    gate_RF: Tensor
    up_RF: Tensor
    active_RF: Tensor
    """silu of the gate."""


Weights = tuple[Tensor, Tensor, Tensor]
"""Gate (F, D), up (F, D) and down (D, F) of one expert, or (E, ...) of all."""

EmptyLike = Callable[[Tensor], Tensor]


def swiglu(x_RD: Tensor, weights: Weights, ends_E: Tensor | None) -> tuple[Tensor, Kept]:
    """One expert's rows through it; with `ends_E` each expert's through its own."""
    gate, up, down = weights
    gate_RF, up_RF = product(x_RD, gate, ends_E), product(x_RD, up, ends_E)
    active_RF = silu(gate_RF)
    return product(active_RF * up_RF, down, ends_E), Kept(x_RD, gate_RF, up_RF, active_RF)


def swiglu_back(
    grad_RD: Tensor, kept: Kept, weights: Weights, ends_E: Tensor | None, out: Weights | None
) -> tuple[Tensor, Weights]:
    """The gradients of the rows and of the weights; the latter in `out` where that is given, which is one expert's."""
    gate, up, down = weights
    out_gate, out_up, out_down = out or (None, None, None)
    d_down = product_weight(grad_RD, kept.active_RF * kept.up_RF, ends_E, out_down)
    d_hidden_RF = product_back(grad_RD, down, ends_E)
    d_up_RF = d_hidden_RF * kept.active_RF
    d_gate_RF = torch.ops.aten.silu_backward(d_hidden_RF.mul_(kept.up_RF), kept.gate_RF)
    d_x_RD = product_back(d_gate_RF, gate, ends_E).add_(product_back(d_up_RF, up, ends_E))
    d_gate = product_weight(d_gate_RF, kept.x_RD, ends_E, out_gate)
    d_up = product_weight(d_up_RF, kept.x_RD, ends_E, out_up)
    return d_x_RD, (d_gate, d_up, d_down)


class ExpertRows(torch.autograd.Function):
    """All rows through their experts, in one kernel a product or one expert after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        blocks: Blocks | DeviceBlocks,
        empty_like: EmptyLike,
    ) -> Tensor:
        weights = (gate_EFD, up_EFD, down_EDF)
        ctx.blocks, ctx.empty_like = blocks, empty_like
        if not len(x_RD):
            ctx.save_for_backward(*weights)
            return x_RD.new_empty(x_RD.shape)
        if isinstance(blocks, Blocks) and not blocks.in_one:
            found = [
                swiglu(x, of_expert, None) for x, of_expert in zip(blocks.by_expert(x_RD), _each(weights), strict=True)
            ]
            ctx.save_for_backward(*weights, *(tensor for _, kept in found for tensor in kept))
            return blocks.back([y for y, _ in found])
        y_RD, kept = swiglu(blocks.together(x_RD), weights, blocks.ends_E)
        ctx.save_for_backward(*weights, *kept)
        return blocks.back_together(y_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, down, *rest = ctx.saved_tensors
        weights = (gate, up, down)
        if not rest:
            return (torch.empty_like(grad_RD), *(ctx.empty_like(weight).zero_() for weight in weights), None, None)
        blocks, grad_RD = ctx.blocks, grad_RD.contiguous()
        if isinstance(blocks, Blocks) and not blocks.in_one:
            grads = (ctx.empty_like(gate), ctx.empty_like(up), ctx.empty_like(down))
            kept = [Kept(*rest[at : at + len(Kept._fields)]) for at in range(0, len(rest), len(Kept._fields))]
            d_x = [
                swiglu_back(d_y, of_rows, of_expert, None, out)[0]
                for d_y, of_rows, of_expert, out in zip(
                    blocks.by_expert(grad_RD), kept, _each(weights), _each(grads), strict=True
                )
            ]
            return (blocks.back(d_x), *grads, None, None)
        d_x_RD, grads = swiglu_back(blocks.together(grad_RD), Kept(*rest), weights, blocks.ends_E, None)
        return (blocks.back_together(d_x_RD), *grads, None, None)


def _each(weights: Weights) -> Iterator[Weights]:
    """Each expert's three matrices."""
    return zip(*(weight.unbind() for weight in weights), strict=True)


def fills(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the numbers of rows are rounded up: where oneDNN makes code for each of them."""
    return device_type == "cpu" and (dtype is torch.bfloat16 or uses_onednn(device_type, dtype))


def expert_rows(
    x_RD: Tensor, weights: Weights, counts_PE: Tensor, *, in_one: bool, empty_like: EmptyLike = torch.empty_like
) -> Tensor:
    """Rows ordered by source, and by expert within a source, through their experts.

    Args:
        empty_like: gives the memory of the weights' gradients.
    """
    blocks: Blocks | DeviceBlocks
    if x_RD.device.type == "cpu" or not in_one:
        blocks = Blocks(counts_PE.tolist(), fills=fills(x_RD.device.type, x_RD.dtype), in_one=in_one)
    else:
        blocks = DeviceBlocks(counts_PE.to(x_RD.device, non_blocking=True), len(x_RD))
    out: Tensor = ExpertRows.apply(x_RD, *weights, blocks, empty_like)
    return out
