"""How a checkpoint's tree meets a state: what is read into what, what is missing on either side.

    a module          every name of either must be in the other
    an optimizer      its parameters' names likewise; their state is what was saved, made where there is none yet
    the top of a state likewise
    a dict            where both hold tensors, every tensor of either must be in the other; else as saved
    a list, and what any other object gives: becomes what was saved
    PerRank           what the rank of this number saved

A tensor is read into the state's own memory where it is of the saved shape, else into new memory.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from storage.errors import UsageError
from storage.format.containers import Container, Path
from storage.format.dtypes import torch_dtype
from storage.format.index import Entry, Index
from storage.state.fit_optimizer import OptimizerFit
from storage.state.modules import module_state
from storage.state.objects import Objects, take
from storage.state.per_rank import PerRank, is_per_rank
from storage.state.tree import Node, is_leaf, is_object, kind_of, name_of, names_of_keys, tree_of
from storage.state.wants import MISSING, Builder, Fit, Ignored, keep, leaf_names, maker
from storage.torch_private import EXTRA_STATE


class _Order(enum.IntEnum):
    """The order in which objects take their states: an optimizer's names are those of parameters that are there."""

    MODULE = 0
    OPTIMIZER = 1
    REST = 2


def fit(state: Mapping[Any, Any], index: Index, rank: int, ignored: Ignored, *, strict: bool = True) -> Fit:
    """Compare a state with a checkpoint, and change nothing yet. The result lists what does not fit, `strict` or not.

    Raises:
        Corrupt: the checkpoint's paths contradict each other.
    """
    names = [name for name in index.entries if not ignored(name)]
    containers = [
        _without(container, ignored) for container in index.containers if not ignored(name_of(container.path))
    ]
    tree = tree_of({name: index.entries[name].path for name in names}, containers)
    objects = Objects(state)
    is_plain = not index.containers  # of stock DCP, or of ours before it had them: keys are known as text only
    fitter = _StateFitter(index.entries, objects, rank, ignored, strict=strict, is_plain=is_plain)
    children = fitter.strictly(tree, dict(sorted(state.items(), key=lambda item: str(item[0]))), ())
    fitter.found.build = lambda read: {key: made(read) for key, made in children}
    return fitter.found


def finish(found: Fit, state: Mapping[Any, Any], read: Mapping[str, Any]) -> dict[Any, Any]:
    """Give every object its state, and return the state's other values, all by key, once `wants` are read.

    Raises:
        UsageError: an object refuses what was saved.
    """
    objects = Objects(state)
    # what is wrong with any of them is found before one is changed
    ready = [(path, value, made(read)) for _, path, value, made in sorted(found.loads, key=lambda load: load[0])]
    failure: UsageError | None = None
    for path, value, given in ready:
        try:
            take(value, objects, given)
        except Exception as error:  # noqa: BLE001 - raised below: a `load_state_dict` may hold collectives
            kind, reason = type(value).__qualname__, f"{type(error).__name__}: {error}"
            text = f"state {name_of(path)!r}: {kind}.load_state_dict refuses what was saved: {reason}"
            failure = failure or UsageError(text)
            failure.__cause__ = failure.__cause__ or error
    if failure is not None:
        raise failure
    return dict(found.build(read))


class _StateFitter:
    """Walks a checkpoint's tree and a state together. `is_plain`: the checkpoint does not tell its keys' types."""

    def __init__(
        self,
        entries: Mapping[str, Entry],
        objects: Objects,
        rank: int,
        ignored: Ignored,
        *,
        strict: bool,
        is_plain: bool,
    ) -> None:
        self.found = Fit()
        self.entries = entries
        self._objects = objects
        self._rank = rank
        self.ignored = ignored
        self.strict = strict
        self._is_plain = is_plain

    # containers ---------------------------------------------------------------------------------------------------

    def strictly(
        self, node: Node, current: Mapping[Any, Any], path: Path, inner: Callable[..., Builder] | None = None
    ) -> list[tuple[Any, Builder]]:
        """How to make the children of a dict whose keys must be on both sides; one that is not keeps its value."""
        fit_child = inner or self.fit
        self._learn_keys(node, current)
        saved = dict(node.items())
        children: list[tuple[Any, Builder]] = []
        for key, name in zip(current, names_of_keys(current), strict=True):
            below, value = (*path, name), current[key]
            if key in saved:
                children.append((key, fit_child(saved.pop(key), value, below)))
                continue
            if not self.ignored(name_of(below)) and not _is_void(value, self._objects):
                self.found.vain.append(name_of(below))
            children.append((key, keep(value)))
        for child in saved.values():
            self.found.surplus += leaf_names(child)
        return children

    def fit(self, node: Node | str, current: Any, path: Path, *, opaque: bool = False) -> Builder:
        """How to make what was saved out of `current`.

        `opaque`: it is part of what an object gave of itself, and may be anything.
        """
        if current is MISSING and isinstance(node, Node) and node.kind == "per_rank":
            current = PerRank(None)  # of a list that was longer
        if is_per_rank(current):
            return self._fit_per_rank(node, current, path)
        if isinstance(node, Node) and node.kind == "per_rank":
            name = name_of(path)
            self.found.odd.append(f"{name!r} was saved by each rank for itself; wrap it in PerRank to restore it")
            return keep(current)
        if is_object(current):
            return self._fit_object(node, current, path)
        if isinstance(node, str):
            return self.fit_leaf(node, current, opaque=opaque)
        return self._fit_container(node, current, path, opaque=opaque)

    def _fit_container(self, node: Node, current: Any, path: Path, *, opaque: bool) -> Builder:
        kind = "list" if node.kind == "list" else "dict"
        if not opaque and (found := _tensor_kind(current)) not in ("", kind):  # a dict in its place would fill none
            self.found.odd.append(f"{name_of(path)!r} is a {found}, the checkpoint has a {kind}")
            return keep(current)
        self._learn_keys(node, current)
        now = _children(current, node)
        saved = dict(node.items())
        counts = not opaque and isinstance(current, Mapping) and _has_tensors(current) and self._holds_tensors(node)
        children: list[tuple[Any, Builder]] = []
        for key, child in saved.items():
            if counts and key not in now and self._holds_tensors(child):
                self.found.surplus += leaf_names(child)
                continue
            value = now.get(key, MISSING)
            if isinstance(node, Node) and node.kind == "list" and not _is_like(value, child, self.entries):
                value = MISSING
            children.append((key, self.fit(child, value, (*path, _name_of_key(key)), opaque=opaque)))
        for key, value in now.items():
            if key in saved:
                continue
            name = name_of((*path, _name_of_key(key)))
            if self.ignored(name):
                children.append((key, keep(value)))
            elif counts and _has_tensors(value):
                self.found.vain.append(name)
                children.append((key, keep(value)))
        # an object may have given its own dict, which only the object may change
        return maker(node, children, None if opaque else current)

    def _learn_keys(self, node: Node, current: Any) -> None:
        """Take a dict's keys and kind from the state where the checkpoint has none, by name as stock DCP does."""
        if self._is_plain and node.kind == "dict" and not node.keys and isinstance(current, Mapping):
            names = names_of_keys(current)
            node.keys = {name: key for name, key in zip(names, current, strict=True) if name in node.children}
            node.kind = kind_of(current) or "dict"
            factory = getattr(current, "default_factory", None)
            node.factory = None if factory is None else getattr(factory, "__name__", None)

    def _fit_per_rank(self, node: Node | str, current: Any, path: Path) -> Builder:
        holder = current if isinstance(current, PerRank) else None
        value = current.value if holder is not None else _AsStateful(current)
        if isinstance(node, Node) and node.kind == "per_rank":
            saved = dict(node.items())
            self.found.resized[name_of(path)] = len(saved)
            if self._rank not in saved:
                return keep(current)
            made = self.fit(saved[self._rank], value, (*path, str(self._rank)))
        else:  # it was saved by a script in which all ranks had the same
            made = self.fit(node, value, path)

        def put(read: Mapping[str, Any]) -> Any:
            result = made(read)
            if holder is not None:
                holder.value = result
            return current

        return put

    # leaves -------------------------------------------------------------------------------------------------------

    def fit_leaf(self, name: str, current: Any, *, opaque: bool) -> Builder:
        """How to make what was saved under `name` out of `current`; see `fit`."""
        entry, found = self.entries[name], self.found
        if not entry.is_tensor:
            if isinstance(current, torch.Tensor) and not opaque:
                found.odd.append(f"{name!r} is a tensor, the checkpoint has a value")
            found.wants[name] = None
            return lambda read: read[name]
        if isinstance(current, torch.Tensor):
            if tuple(current.shape) == entry.shape:
                return self._want(name, current)
            if not opaque or isinstance(current, DTensor):
                found.odd.append(f"{name!r} has shape {list(current.shape)}, the checkpoint {list(entry.shape)}")
        elif current is not MISSING and current is not None and not opaque:
            found.odd.append(f"{name!r} is a {type(current).__name__}, the checkpoint has a tensor")
        return self._want(name, torch.empty(entry.shape, dtype=torch_dtype(entry.dtype)))

    def _want(self, name: str, destination: Any) -> Builder:
        self.found.wants[name] = destination
        return lambda read: read[name]

    # objects ------------------------------------------------------------------------------------------------------

    def _fit_object(self, node: Node | str, current: Any, path: Path) -> Builder:
        if isinstance(current, nn.Module):
            order, made = _Order.MODULE, self._fit_module(node, current, path)
        elif isinstance(current, Optimizer):
            order, made = _Order.OPTIMIZER, OptimizerFit(self, self._objects.named(current), path).fit(node)
        else:
            order, made = _Order.REST, self.fit(node, current.state_dict(), path, opaque=True)
        stateful = current.stateful if isinstance(current, _AsStateful) else current
        self.found.loads.append((order, path, stateful, made))
        return keep(current)

    def _fit_module(self, node: Node | str, module: nn.Module, path: Path) -> Builder:
        if isinstance(node, str):
            self.found.odd.append(f"{name_of(path)!r} is a module, the checkpoint has one entry {node!r}")
            return keep({})

        def inner(child: Node | str, value: Any, below: Path) -> Builder:
            # extra state may have another shape each time
            is_extra = str(below[-1]).rpartition(".")[2] == EXTRA_STATE
            return self.fit(child, MISSING if is_extra else value, below, opaque=is_extra)

        children = self.strictly(node, module_state(module), path, inner)
        return lambda read: {key: made(read) for key, made in children}

    def _holds_tensors(self, node: Node | str) -> bool:
        leaves = [node] if isinstance(node, str) else node.leaves()
        return any(self.entries[name].is_tensor for name in leaves)


class _AsStateful:
    """A loader that counts as per rank by itself, wrapped so that it is not taken for one once more."""

    def __init__(self, stateful: Any) -> None:
        self.stateful = stateful

    def state_dict(self) -> Any:
        return self.stateful.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.stateful.load_state_dict(state)


def _children(current: Any, node: Node) -> dict[Any, Any]:
    """The children of a dict or list by key or number; none where the node is a list and the value a dict, or so."""
    if node.kind == "list":
        return dict(enumerate(current)) if isinstance(current, list) else {}
    return dict(current) if isinstance(current, Mapping) else {}


def _is_like(value: Any, child: Node | str, entries: Mapping[str, Entry]) -> bool:
    """Whether an entry of a list can take what was saved in its place: lists grow and shrink, and it may be another."""
    if isinstance(child, Node):
        return not is_leaf(value)
    if entries[child].is_tensor:
        is_tensor = isinstance(value, torch.Tensor)
        return is_tensor and (isinstance(value, DTensor) or tuple(value.shape) == entries[child].shape)
    return not isinstance(value, torch.Tensor)


def _is_void(value: Any, objects: Objects) -> bool:
    """Whether a checkpoint of stock DCP could have nothing of it: that stores no empty dicts."""
    given = objects.give((), value)
    if isinstance(given, Mapping):
        return all(_is_void(child, objects) for child in given.values())
    return isinstance(given, PerRank) and _is_void(given.value, objects)


def _has_tensors(value: Any) -> bool:
    if isinstance(value, torch.Tensor) or is_object(value):
        return True
    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    return isinstance(value, list) and any(map(_has_tensors, value))


def _tensor_kind(value: Any) -> str:
    """What holds the tensors of a value that is one, or a dict or list with some; "" of any other."""
    if not _has_tensors(value):
        return ""
    return "tensor" if isinstance(value, torch.Tensor) else "list" if isinstance(value, list) else "dict"


def _without(container: Container, ignored: Ignored) -> Container:
    """The container without the keys of what is ignored."""
    pairs = [
        (name, key)
        for name, key in zip(container.names, container.keys, strict=False)
        if not ignored(name_of((*container.path, name)))
    ]
    if len(pairs) == len(container.names):
        return container
    return container.model_copy(update={"names": tuple(n for n, _ in pairs), "keys": tuple(k for _, k in pairs)})


def _name_of_key(key: Any) -> str | int:
    return key if type(key) is int else str(key)
