"""AdamW over parameters of two meshes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from elastic_moe.pool import map_memory
from elastic_moe.trainer.config import OptimConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")
_ALIGNMENT = 16  # numbers, a cache line's


def build_optimizer(model: nn.Module, optim: OptimConfig, *, exact: bool = False) -> AdamW:
    """AdamW with its state already there, zeros, so that a checkpoint can be loaded into it.

    Groups by role: the experts, other matrices, and what does not decay: norms, biases, and routers, whose logits a
    decay would pull together. Within one group all parameters are on one mesh, which the fused kernel needs.

    Args:
        exact: do without the fused kernel, which rounds an element by its place in the tensor: another way of
            sharding would change the last bit.
    """
    experts: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if param.ndim == 1 or ".router." in name:
            undecayed.append(param)
        else:
            (experts if ".experts." in name else matrices).append(param)
    groups = [
        {"params": experts, "weight_decay": optim.weight_decay},
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=not exact)
    params = list(model.parameters())
    zeros = _zeros_like([param for param in params for _ in _MOMENTS])
    for param in params:
        optimizer.state[param] = {
            "step": torch.zeros((), dtype=torch.float32, device="cpu" if exact else param.device),
            **{moment: next(zeros) for moment in _MOMENTS},
        }
    return optimizer


@torch.no_grad()
def _zeros_like(params: list[nn.Parameter]) -> Iterator[Tensor]:
    """Zeros of the kind of each parameter.

    On a CPU in one mapping, whose pages the system makes when they are first written: a restore or the first step
    writes them all, and needs no pass over them before.
    """
    shards = [param.to_local() if isinstance(param, DTensor) else param for param in params]
    if any(shard.device.type != "cpu" or shard.dtype is not torch.float32 for shard in shards):
        yield from map(torch.zeros_like, params)
        return
    starts = [0]
    for shard in shards:
        starts.append(starts[-1] + -(-shard.numel() // _ALIGNMENT) * _ALIGNMENT)
    mapped = map_memory(starts[-1] * 4)
    for param, shard, start in zip(params, shards, starts, strict=False):
        zeros = torch.empty(0)  # a buffer of nothing is refused
        if shard.numel():
            zeros = torch.frombuffer(mapped, dtype=torch.float32, count=shard.numel(), offset=4 * start)
        zeros = zeros.view(shard.shape)
        if isinstance(param, DTensor):
            place = param.device_mesh, param.placements
            zeros = DTensor.from_local(zeros, *place, run_check=False, shape=param.shape, stride=param.stride())
        yield zeros


def moments(model: nn.Module, optimizer: AdamW) -> dict[str, dict[str, Tensor]]:
    """AdamW's two moments by the names of their parameters, the very tensors that the optimizer updates."""
    return {
        moment: {name: optimizer.state[param][moment] for name, param in model.named_parameters()}
        for moment in _MOMENTS
    }


def set_step(optimizer: AdamW, step: int) -> None:
    """Say how many steps the moments have seen. All parameters step together, so it is the trainer's own count."""
    for state in optimizer.state.values():
        state["step"].fill_(step)


def set_learning_rate(optimizer: AdamW, lr: float) -> None:
    """The rate of the next `optimizer.step()`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
