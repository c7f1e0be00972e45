"""Every private name of torch that elastic_moe uses: a release of torch that changes one is met here and nowhere else.

Each has a canary in tests/moe/test_torch_private.py that says what broke and where it is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.fsdp import FSDPModule


def exchange_rows(
    x_RD: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Send the first `send_splits[0]` rows to rank 0 of the group, the next to rank 1, ...; return what was received.

    Differentiable: the gradients of the received rows travel back to where the rows came from. Splits may be 0; torch's
    public `all_to_all_single` has no gradient.
    """
    out: Tensor = all_to_all_single_autograd(x_RD, list(receive_splits), list(send_splits), group)
    return out


def onednn_linear(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """`x @ weight.T` by oneDNN, (R, O), which torch takes for fp32 only where a model is compiled. Not differentiable.

    The operands may lie transposed. A new shape costs half a millisecond.
    """
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, None, "none", [], "")
    return out


def gather_into(unit: FSDPModule, place: Callable[[int, int, torch.dtype], Tensor]) -> None:
    """Have the parameters of an FSDP2 unit gathered into memory that `place` gives, once for each of them.

    FSDP2 would have memory of its own for each, and free it whenever they are sharded again. Call it before the first
    gather; FSDP2 makes what is here at the first one.

    Args:
        place: takes the number of the parameter in the unit, and the count and dtype of the numbers that are gathered.
    """
    state: Any = unit._get_fsdp_state()
    params = [param for group in state._fsdp_param_groups for param in group.fsdp_params]
    for index, param in enumerate(params):
        param.init_all_gather_outputs = functools.partial(_init_outputs, param, functools.partial(place, index))
        param.free_unsharded_param = _keep


def _init_outputs(
    param: Any,
    place: Callable[[int, torch.dtype], Tensor],
    nums: Sequence[int],
    dtypes: Sequence[torch.dtype],
    world_size: int,
    device: torch.device,
) -> None:
    if not param.all_gather_outputs:
        param.all_gather_outputs = [place(num * world_size, dtype) for num, dtype in zip(nums, dtypes, strict=True)]


def _keep() -> None:
    """What is gathered stays where it is, until something else is gathered there."""
