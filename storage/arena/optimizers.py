"""Which tensors change in an optimizer's step and nowhere else, and a call before each step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from storage.torch_private import shards_of

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


class OptimizerWatch:
    """Sees every optimizer of this process that steps, of whatever class that derives from torch's.

    Args:
        before_step: a method, called on the thread of each step before that changes anything. It keeps its object not
            alive, and does nothing once that is gone.
    """

    def __init__(self, before_step: Callable[[], object]) -> None:
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        seen, method = self._seen, weakref.WeakMethod(before_step)

        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            seen.add(optimizer)
            if (call := method()) is not None:
                call()

        self._end = weakref.finalize(self, register_optimizer_step_pre_hook(hook).remove)

    def close(self) -> None:
        """See no more; closing twice is harmless."""
        self._end()

    def storages(self) -> set[int]:
        """The addresses of the memory that the optimizers seen so far have: parameters and their state."""
        found: set[int] = set()
        for optimizer in list(self._seen):
            for tensor in _tensors_of(optimizer):
                if type(tensor) in _PLAIN:  # most of them; a save waits for this
                    found.add(tensor.untyped_storage().data_ptr())
                    continue
                for local in _local(tensor):
                    found.add(local.untyped_storage().data_ptr())
        found.discard(0)
        return found


def _tensors_of(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in list(optimizer.state.values()):
        if isinstance(state, dict):
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _local(tensor: torch.Tensor) -> list[torch.Tensor]:
    if (shards := shards_of(tensor)) is not None:
        return shards
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return [tensor.to_local()]
    return [tensor]
