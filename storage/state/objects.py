"""What a state's objects give to be saved, and take back: modules, optimizers, whatever has a `state_dict`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from storage.errors import UnsupportedValue
from storage.format.containers import Path
from storage.state.modules import load_module_state, module_state, shared_parameters
from storage.state.optimizers import NamedOptimizer
from storage.state.per_rank import PerRank, is_per_rank
from storage.state.tree import Flat, Unordered, flatten, is_object, name_of


class Objects:
    """The objects of one state, and the names of its modules' parameters.

    `given`: by path, those whose state was asked for.
    """

    def __init__(self, state: Mapping[Any, Any]) -> None:
        self.modules = dict(_modules((), state))
        self.given: dict[Path, Any] = {}

    def named(self, optimizer: Optimizer) -> NamedOptimizer:
        """The optimizer with its parameters' names."""
        return NamedOptimizer(optimizer, self.modules)

    def give(self, path: Path, value: Any) -> Any:
        """The state of an object; anything else as it is.

        Raises:
            UnsupportedValue: an object that looks as if it had a state and has none.
        """
        if is_per_rank(value):
            return value if isinstance(value, PerRank) else PerRank(value.state_dict())
        if not is_object(value):
            if isinstance(value, torch.utils.data.DataLoader):
                raise UnsupportedValue(
                    f"state {name_of(path)!r} is a DataLoader, which does not tell its position; keep torchdata's"
                    " StatefulDataLoader, or the epoch and the step as plain numbers"
                )
            return value
        self.given[path] = value
        if isinstance(value, nn.Module):
            return Unordered(module_state(value))
        if isinstance(value, Optimizer):
            return self.named(value).state()
        return value.state_dict()

    def unsynchronised(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The modules' parameters that every rank has whole."""
        for prefix, module in self.modules.items():
            for name, parameter in shared_parameters(module):
                yield f"{prefix}.{name}", parameter


def take(value: Any, objects: Objects, state: Any) -> None:
    """Give an object the state that `Objects.give` took from it, or one like it."""
    if isinstance(value, nn.Module):
        load_module_state(value, state)
    elif isinstance(value, Optimizer):
        objects.named(value).load(state)
    else:
        assert isinstance(value, Stateful)
        value.load_state_dict(state)


def open_state(state: Mapping[Any, Any], rank: int) -> tuple[Flat, Objects]:
    """The state taken apart, its keys in sorted order, and its objects.

    The order matters: a `state_dict()` may hold collectives, so all ranks must call them alike.

    Raises UnsupportedValue.
    """
    objects = Objects(state)
    return flatten({key: state[key] for key in sorted(state, key=str)}, objects.give, rank), objects


def _modules(path: Path, value: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield name_of(path), value
    elif isinstance(value, PerRank):
        yield from _modules(path, value.value)
    elif isinstance(value, Mapping) and len(path) < 8:
        for key, child in value.items():
            yield from _modules((*path, str(key)), child)
