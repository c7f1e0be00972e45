"""How an optimizer's saved state meets an optimizer, which may never have made a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from storage.errors import WrongModel
from storage.format.containers import Path
from storage.format.dtypes import torch_dtype
from storage.format.index import Entry
from storage.state.optimizers import NamedOptimizer, is_sharded, like_parameter
from storage.state.tree import Node, name_of
from storage.state.wants import MISSING, Builder, Fit, Ignored, keep, leaf_names, maker


class Fitter(Protocol):
    """The part of `storage.state.fit` that fits everything below an optimizer's own dicts."""

    found: Fit
    entries: Mapping[str, Entry]
    ignored: Ignored
    strict: bool

    def fit(self, node: Node | str, current: Any, path: Path, *, opaque: bool = False) -> Builder:
        """How to make what was saved out of `current`."""

    def fit_leaf(self, name: str, current: Any, *, opaque: bool) -> Builder:
        """The same for a leaf."""


class OptimizerFit:
    """How one optimizer, at one path of the state, meets what was saved there."""

    def __init__(self, fitter: Fitter, optimizer: NamedOptimizer, path: Path) -> None:
        self._fitter = fitter
        self._optimizer = optimizer
        self._path = path

    def fit(self, node: Node | str) -> Builder:
        """How to make the state that `NamedOptimizer.load` takes."""
        optimizer, path = self._optimizer, self._path
        saved = dict(node.items()) if isinstance(node, Node) else {}
        no_groups = Node("list") if self._fitter.ignored(name_of((*path, "param_groups"))) else None
        states, groups = saved.pop("state", Node()), saved.pop("param_groups", no_groups)
        if not isinstance(states, Node) or not isinstance(groups, Node):
            self._fitter.found.odd.append(f"{name_of(path)!r} is an optimizer, the checkpoint has none under that name")
            return keep({})
        if optimizer.is_fsdp1:
            return self._fitter.fit(node, optimizer.state(), path)
        rest = [(key, self._fitter.fit(child, MISSING, (*path, key), opaque=True)) for key, child in saved.items()]
        of_parameter = self._fit_states(states)
        are_named = not _by_number(states, optimizer)
        of_group = self._fit_groups(groups, are_named=are_named)

        def made(read: Mapping[str, Any]) -> dict[str, Any]:
            by_number = [group(read) for group in of_group]
            known = {name: state(read) for name, state in of_parameter}
            return {**{key: child(read) for key, child in rest}, "state": known, "param_groups": by_number}

        return made

    def _fit_states(self, node: Node) -> list[tuple[Any, Builder]]:
        """How to make each parameter's state, by name. In a fresh optimizer it is laid out as the parameter is."""
        optimizer, path = self._optimizer, (*self._path, "state")
        renamed = _by_number(node, optimizer)
        children: list[tuple[Any, Builder]] = []
        for key, child in node.items():
            name = renamed.get(key, key)
            if name in optimizer.by_name:
                children.append((name, self._fit_state(child, name, (*path, name))))
            elif isinstance(name, str):
                self._fitter.found.surplus += leaf_names(child)
            else:  # what some optimizers keep beside their parameters' states
                children.append((key, self._fitter.fit(child, MISSING, path, opaque=True)))
        saved = {name for name, _ in children}
        ignored = [
            name for name in optimizer.names if name not in saved and self._fitter.ignored(name_of((*path, name)))
        ]
        return children + [(name, keep(now)) for name in ignored if (now := optimizer.state_of(name))]

    def _fit_state(self, node: Node | str, name: str, path: Path) -> Builder:
        optimizer, entries = self._optimizer, self._fitter.entries
        parameter, now = optimizer.by_name[name], optimizer.state_of(name)
        if not isinstance(node, Node):
            return self._fitter.fit_leaf(node, MISSING, opaque=True)
        saved = dict(node.items())
        shapes = {key: entries[leaf].shape for key, leaf in saved.items() if isinstance(leaf, str)}
        if (
            is_sharded(parameter)
            and not optimizer.has_state()
            and not {tuple(parameter.shape), ()}.issuperset(shapes.values())
        ):
            optimizer.init_state()  # it alone knows how such a state is laid out
            now = optimizer.state_of(name)
        current = {}
        for key, leaf in saved.items():
            value = now.get(key, MISSING)
            is_tensor = isinstance(leaf, str) and entries[leaf].is_tensor
            if is_tensor and not isinstance(value, torch.Tensor) and shapes[key] == tuple(parameter.shape):
                value = like_parameter(parameter, torch_dtype(entries[str(leaf)].dtype))
            current[key] = value
        children = [
            (key, self._fitter.fit(leaf, current[key], (*path, str(key)), opaque=True)) for key, leaf in saved.items()
        ]
        return maker(node, children, None)

    def _fit_groups(self, node: Node, *, are_named: bool) -> list[Builder]:
        """How to make each group. The saved one is found by its parameters' names, so once they are read."""
        optimizer, path = self._optimizer, (*self._path, "param_groups")
        saved = [self._fitter.fit(child, MISSING, (*path, number), opaque=True) for number, child in node.items()]
        now, number = [], 0
        for group in optimizer.optimizer.param_groups:
            names = optimizer.names[number : number + len(group["params"])]
            number += len(names)
            now.append(({key: value for key, value in group.items() if key != "params"}, names))
        if saved and len(saved) != len(now):
            self._fitter.found.odd.append(
                f"{name_of(path)!r}: the optimizer has {len(now)} groups of parameters, the checkpoint {len(saved)}"
            )

        def settings(number: int) -> Builder:
            own, names = now[number]

            def made(read: Mapping[str, Any]) -> dict[str, Any]:
                found = _group_of([made(read) for made in saved], number, names)
                saved_names = found.get("params", names)
                is_told = self._fitter.strict and are_named and all(isinstance(name, str) for name in saved_names)
                if is_told and (other := set(names) ^ set(saved_names)):
                    raise WrongModel(
                        f"{name_of((*path, number))!r}: parameter {min(other)!r} is in this group of the optimizer, and"
                        " in another or none in the checkpoint, or the other way round (restore(..., strict=False)"
                        " takes each group's settings by its first parameter)"
                    )
                return {**own, **found, "params": names}

            return made

        return [settings(number) for number in range(len(now))]


def _group_of(saved: list[Any], number: int, names: list[str]) -> dict[str, Any]:
    """The saved group that has the first of these parameters; the one in the same place, where none has."""
    for group in saved:
        if names and names[0] in group.get("params", ()):
            return dict(group)
    return dict(saved[number]) if number < len(saved) else {}


def _by_number(node: Node, optimizer: NamedOptimizer) -> dict[Any, str]:
    """Names for the numbers under which an optimizer's own `state_dict` has its parameters' states."""
    names, keys = optimizer.names, [key for key, _ in node.items()]
    if optimizer.by_name.keys() >= set(keys):
        return {}
    numbers = [int(key) for key in keys if type(key) is int or (isinstance(key, str) and key.isdecimal())]
    if not keys or len(numbers) != len(keys) or max(numbers) >= len(names):
        return {}
    return {key: names[number] for key, number in zip(keys, numbers, strict=True)}
