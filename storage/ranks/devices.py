"""Where the tensors of a collective have to lie.

`torch.accelerator.current_accelerator()` names what torch was built for, be it there or not: PyPI's torch is built for
CUDA, on a laptop too. Nothing else here asks it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def collective_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """A device whose tensors `group` (None: the default one) can reduce and send: the CPU wherever it can do that.

    The kinds of device that the group has a backend for decide. The backend's name tells nothing: it is "undefined"
    where `init_process_group()` was left to choose, and "cpu:gloo,cuda:nccl" is two.
    """
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    if "cpu" in kinds or not torch.accelerator.is_available():
        return torch.device("cpu")
    bound = (group or dist.group.WORLD).bound_device_id  # type: ignore[union-attr]
    return bound if bound is not None else torch.device(kinds[0])
