"""Gradients over two meshes: when they are reduced, and their global norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from elastic_moe.model.decoder import Decoder
from elastic_moe.parallel.meshes import REPLICATE, Meshes
from elastic_moe.parallel.turns import turns_of

_PART = (
    1 << 20
)  # numbers that are squared at a time: in float64 all of a large gradient's would take four times its room


def begin_round(model: Decoder, *, last: bool, keep_gathered: bool = False, backward: bool = True) -> None:
    """Prepare one forward and backward pass of several that make a step.

    What the backward pass begins with stays gathered until then, as if it were gathered anew at once: what is outside
    the layers, and the last one.

    Args:
        model: what `parallelize` made.
        last: whether it is the last pass: only that one reduces gradients over ranks.
        keep_gathered: leave the parameters gathered from the first forward to the last backward pass of the step:
            one gather a step in place of two a round, for the memory of all that an expert-parallel rank computes with.
        backward: whether a backward pass follows at all. Where none does, nothing stays gathered that others change.
    """
    if keep_gathered and (turns := turns_of(model)) is not None:
        turns.stay()
    root = cast(FSDPModule, model)
    root.set_requires_gradient_sync(last)
    root.set_is_last_backward(last)
    root.set_reshard_after_forward(not keep_gathered)
    root.set_reshard_after_backward(last or not keep_gathered)
    if backward:
        for module in (model, *model.blocks[-1].modules()):
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False, recurse=False)


@torch.no_grad()
def clip_gradients(params: Iterable[nn.Parameter], meshes: Meshes, max_norm: float | None) -> float:
    """Scale all gradients so that their global L2 norm is at most `max_norm`; None only measures.

    One replica holds every parameter exactly once whatever the mesh that it is sharded over, so the squares are
    added locally, in float64, and over the replica's ranks: one all-reduce of one number, where
    `torch.nn.utils.clip_grad_norm_` fails on parameters of different meshes.

    Returns:
        The norm before clipping, the same on every rank.
    """
    grads = [_local(param.grad) for param in params if param.grad is not None]
    device = torch.device(meshes.dense.device_type)
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for grad in grads:
        for part in grad.flatten().split(_PART):
            squares += part.double().square().sum()
    meshes.sum_over_replica(squares)
    norm = float(squares.sqrt().item())
    if max_norm is not None and norm > max_norm:
        for grad in grads:
            grad.mul_(max_norm / norm)
    return norm


def _local(grad: Tensor) -> Tensor:
    assert isinstance(grad, DTensor), "every parameter is sharded by parallelize()"
    names = grad.device_mesh.mesh_dim_names or ()
    for name, placement in zip(names, grad.placements, strict=True):
        assert not isinstance(placement, Replicate) or name == REPLICATE, (
            f"a gradient repeated over {name} would be counted more than once"
        )
    return grad.to_local()
