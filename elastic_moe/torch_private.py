"""Every private name of torch that elastic_moe uses: a release of torch that changes one is met here and nowhere else.

Each has a canary in tests/moe/test_torch_private.py that says what broke and where it is used.
"""

from __future__ import annotations

import functools
import getpass
import os
import re
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

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


def group_timeout_s(group: dist.ProcessGroup) -> float:
    """For how long collectives of a group on the CPU wait for a rank that does not come.

    torch's default where its backend does not tell: torch asks only its own to.
    """
    options = getattr(group._get_backend(torch.device("cpu")), "options", None)
    found = getattr(options, "_timeout", None) or dist.default_pg_timeout
    return float(found.total_seconds())


def compile_backward_at_once() -> None:
    """Have torch.compile make the graph of a backward pass with that of its forward pass, where its failure is caught.

    It would be made within the first backward pass, of which nothing can be called again. For the whole process.
    """
    from torch._functorch import config

    config.force_non_lazy_backward_lowering = True


COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compile_caches() -> list[str]:
    """The folder in which torch.compile keeps what it has made, and the one in which it keeps headers.

    Without torch's own functions: to import them makes the folder, and fails for good where it cannot be made.
    """
    try:
        user = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):
        user = f"uid_{os.getuid()}"
    default = os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))
    return list(dict.fromkeys((os.path.abspath(os.environ.get(COMPILE_CACHE, default)), default)))


def forget_compiled() -> None:
    """Have torch.compile look anew for what it keeps in its cache, and make again what it has failed to make."""
    from torch._inductor.utils import clear_caches

    clear_caches()


class Seat(Protocol):
    """Memory that an FSDP2 unit is gathered into."""

    def place(self, index: int, num: int, dtype: torch.dtype) -> Tensor:
        """Where that parameter of the unit lies, so many numbers; asked once for each of them."""

    def take(self) -> None:
        """Hear that a parameter of the unit is about to be gathered. What it raises keeps it from being."""

    def leave(self) -> None:
        """Hear that a parameter of the unit is sharded again."""


def gather_into(unit: FSDPModule, seat: Seat) -> None:
    """Have the parameters of an FSDP2 unit gathered into memory that is given to it, which stays what it was after.

    FSDP2 would have memory of its own for each, and free it whenever they are sharded again. Call it before the first
    gather; FSDP2 makes what is here at the first one.
    """
    state: Any = unit._get_fsdp_state()
    params = [param for group in state._fsdp_param_groups for param in group.fsdp_params]
    for index, param in enumerate(params):
        param.init_all_gather_outputs = functools.partial(_init_outputs, param, index, seat)
        param.free_unsharded_param = seat.leave


def _init_outputs(
    param: Any,
    index: int,
    seat: Seat,
    nums: Sequence[int],
    dtypes: Sequence[torch.dtype],
    world_size: int,
    device: torch.device,
) -> None:
    seat.take()  # FSDP2 comes here right before it writes what was gathered, each time
    if not param.all_gather_outputs:
        outputs = zip(nums, dtypes, strict=True)
        param.all_gather_outputs = [seat.place(index, num * world_size, dtype) for num, dtype in outputs]
