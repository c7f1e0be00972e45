"""Every private name of torch that elastic_moe uses: a release of torch that changes one is met here and nowhere else.

Each has a canary in tests/moe/test_torch_private.py that says what broke and where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


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
