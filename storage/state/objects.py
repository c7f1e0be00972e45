"""What a state's objects give to be saved, and take back: modules, optimizers, whatever has a `state_dict`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
from storage.state.tree import PLAIN_TYPES, Flat, Unordered, flatten, is_leaf, is_object, name_of, names_of_keys

_DEPTH_MAX = 8


class Objects:
    """The objects of one state: asks them for their states, and knows the names of the modules' parameters.

    `given`: by path, the objects that have given their state.
    """

    def __init__(self, state: Mapping[Any, Any]) -> None:
        found = list(_modules((), state, is_own=False))
        self.modules = {name: module for name, module, _ in found}
        self._shared = {name for name, _, is_own in found if not is_own}
        self.given: dict[Path, Any] = {}
        self._states: dict[Path, Any] = {}

    def collect(self, state: Mapping[Any, Any]) -> None:
        """Ask every object for its state, in the order of the state, before any of it is used.

        A `state_dict` may hold collectives: an error on this rank must not keep it from those that other ranks are in.

        Raises:
            Exception: the first error of any object, once all were asked.
        """
        failure: Exception | None = None
        for path, value in _objects((), state):
            try:
                self._states[path] = self.give(path, value)
            except Exception as error:  # noqa: BLE001 - raised below
                failure = failure or error
        if failure is not None:
            raise failure

    def named(self, optimizer: Optimizer) -> NamedOptimizer:
        """The optimizer with its parameters' names."""
        return NamedOptimizer(optimizer, self.modules)

    def give(self, path: Path, value: Any) -> Any:
        """The state that an object gives; anything else unchanged.

        Raises:
            UnsupportedValue: an object that looks as if it had a state and has none.
        """
        if isinstance(value, torch.Tensor):
            return value
        if path in self._states:
            return self._states[path]
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
        """The names and values of the modules' parameters that every rank holds whole."""
        for prefix in self._shared:
            module = self.modules[prefix]
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


class OpenedOnce(Mapping[Any, Any]):
    """A state that nobody changes for now: it is taken apart once, for all who look at it meanwhile."""

    def __init__(self, state: Mapping[Any, Any]) -> None:
        self._state = state
        self._opened: tuple[Flat, Objects] | None = None

    def __getitem__(self, key: Any) -> Any:
        return self._state[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def opened(self, rank: int) -> tuple[Flat, Objects]:
        """See `open_state`."""
        if self._opened is None:
            self._opened = _open(self._state, rank)
        return self._opened


def opened_once(state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The state, for several who look at it in turn; what is none is left to them to refuse."""
    return OpenedOnce(state) if isinstance(state, Mapping) else state


def open_state(state: Mapping[Any, Any], rank: int) -> tuple[Flat, Objects]:
    """Take a state apart, in the sorted order of its keys; the leaves, and the objects that gave some of them.

    The order matters: a `state_dict()` may hold collectives, so all ranks must call them alike.

    Raises UnsupportedValue.
    """
    return state.opened(rank) if isinstance(state, OpenedOnce) else _open(state, rank)


def _open(state: Mapping[Any, Any], rank: int) -> tuple[Flat, Objects]:
    ordered = {key: state[key] for key in sorted(state, key=str)}
    objects = Objects(ordered)
    objects.collect(ordered)
    return flatten(ordered, objects.give, rank), objects


def _modules(path: Path, value: Any, *, is_own: bool) -> Iterator[tuple[str, nn.Module, bool]]:
    """The modules below a value: name, module, and whether it is in a PerRank, so that each rank has another."""
    if isinstance(value, nn.Module):
        yield name_of(path), value, is_own
    elif isinstance(value, PerRank):
        yield from _modules(path, value.value, is_own=True)
    else:
        for name, child in _children(path, value):
            yield from _modules((*path, name), child, is_own=is_own)


def _objects(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    """The objects below a value, by path, without those in a PerRank: only this rank calls those."""
    if is_object(value) and not isinstance(value, PerRank):
        yield path, value
    else:
        for name, child in _children(path, value):
            yield from _objects((*path, name), child)


def _children(path: Path, value: Any) -> Iterator[tuple[str | int, Any]]:
    """What is in a dict or list, by name or number, but for what is most of it and has nothing below."""
    if len(path) >= _DEPTH_MAX:
        return
    found: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, Mapping):
        if all(isinstance(child, torch.Tensor) or type(child) in PLAIN_TYPES for child in value.values()):
            return
        found = zip(names_of_keys(value), value.values(), strict=True)
    elif isinstance(value, list) and not is_leaf(value):
        found = enumerate(value)
    for name, child in found:
        if not isinstance(child, torch.Tensor) and type(child) not in PLAIN_TYPES:
            yield name, child
