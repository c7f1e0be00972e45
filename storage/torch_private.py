"""Every private name of torch that `storage` relies on: a torch that changes one is met here and nowhere else.

Each has a canary in tests/storage/test_torch_private.py that says what broke and where it is used. Importing this file
imports nothing of torch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

# names in files, as (module, name) of a pickle ----------------------------------------------------------------------

REBUILD_TENSOR_V2 = ("torch._utils", "_rebuild_tensor_v2")
"""Makes a tensor of its storage, in what `torch.save` wrote."""
REBUILD_TENSOR_V3 = ("torch._utils", "_rebuild_tensor_v3")
"""The same for dtypes that have no class of storages."""
REBUILD_PARAMETER = ("torch._utils", "_rebuild_parameter")
"""Makes an `nn.Parameter` of a tensor."""
GET_LAYOUT = ("torch.serialization", "_get_layout")
"""Makes a `torch.layout` of its name."""
STORAGE_INFO = ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
"""The class that says in DCP's metadata where an item lies."""
MEMORY_FORMAT = ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")
"""The enum of memory formats in DCP's metadata."""
CONTIGUOUS_FORMAT = 0
"""The value in `MEMORY_FORMAT` of contiguous tensors."""
STRIDED = "torch.strided"
"""What `GET_LAYOUT` takes for a dense tensor's layout."""
STATE_DICT_VERSIONS = "_metadata"
"""The attribute of a module's `state_dict` with the versions of its modules."""

# names in modules and optimizers ------------------------------------------------------------------------------------

EXTRA_STATE = "_extra_state"
"""The last part of the name under which `nn.Module.get_extra_state` gets into a `state_dict`."""
COMPILED_MODULE = "_orig_mod"
"""The attribute in which `torch.compile` keeps the module that it wraps."""
FSDP1_MODULE = "_fsdp_wrapped_module"
"""The attribute in which `FullyShardedDataParallel` keeps the module that it wraps."""
CHECKPOINTED_MODULE = "_checkpoint_wrapped_module"
"""The attribute in which activation checkpointing keeps the module that it wraps."""
_FSDP1_FLATTENED = "_fsdp_flattened"

# names in a state ---------------------------------------------------------------------------------------------------

MAKES_WRITE_ITEMS = "__create_write_items__"
"""The method of what tells DCP's planner by itself how it is written, as a DTensor does."""

# names of threads ---------------------------------------------------------------------------------------------------

ASYNC_SAVE_THREAD = "AsyncCheckpointExecutor"
"""How the names of the threads begin in which `dcp.async_save` saves."""
ASYNC_SAVE_PROCESS = "_checkpointing_subprocess"
"""The function that runs in the process in which it does."""


def is_flattened_by_fsdp1(parameter: torch.Tensor) -> bool:
    """Whether `FullyShardedDataParallel` has made the parameter, of several of the user's."""
    return bool(getattr(parameter, _FSDP1_FLATTENED, False))


def is_without_memory(tensor: torch.Tensor) -> bool:
    """Whether it is of zeros that autograd only notes down."""
    return tensor._is_zerotensor()


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target, on the same device, in one call, during which other threads run."""
    import torch

    with torch.no_grad():
        torch._foreach_copy_(targets, sources)


def version_of(tensor: torch.Tensor) -> int | None:
    """How many changes torch has counted of the memory that the tensor looks at; None where it counts none."""
    return None if tensor.is_inference() else tensor._version


def shards_of(value: object) -> list[torch.Tensor] | None:
    """This rank's tensors of a `ShardedTensor`; None of anything else."""
    return [shard.tensor for shard in value.local_shards()] if isinstance(value, _sharded_tensor()) else None


@functools.cache  # it is asked for with each tensor of each save
def _sharded_tensor() -> type[ShardedTensor]:
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor

    return ShardedTensor


def local_chunks(tensor: torch.Tensor) -> Sequence[ChunkStorageMetadata]:
    """Which boxes this rank has of a tensor, a DTensor or a `ShardedTensor`, as DCP plans them."""
    from torch.distributed.checkpoint.planner_helpers import _create_chunk_list

    return _create_chunk_list(tensor)


def timeout_s_of(group: dist.ProcessGroup | None, device: torch.device) -> float | None:
    """For how long the collectives of a group wait for a rank that does not come; None of a backend that tells nothing
    of it: torch asks only its own to."""
    import torch.distributed as dist

    backend = (group or dist.group.WORLD)._get_backend(device)  # type: ignore[union-attr]
    found = getattr(getattr(backend, "options", None), "_timeout", None)
    return None if found is None else float(found.total_seconds())


def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Have it make the state that it has after a first step, by a step that changes nothing."""
    from torch.distributed.checkpoint.state_dict import _init_optim_state

    _init_optim_state(optimizer)


def ranks_of_dcp(value: object) -> tuple[bool, dist.ProcessGroup | None] | None:
    """Whether DCP's object for its collectives makes any, and in which group; None for any other object."""
    from torch.distributed.checkpoint.utils import _DistWrapper

    return (value.use_dist, value.group) if isinstance(value, _DistWrapper) else None
