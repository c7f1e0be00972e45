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

import fnmatch
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from storage.errors import UsageError, WrongModel
from storage.format.containers import Container, Path
from storage.format.dcp_metadata import torch_dtype
from storage.format.index import Entry, Index
from storage.state.modules import EXTRA_STATE, module_state
from storage.state.objects import Objects, take
from storage.state.optimizers import NamedOptimizer, is_sharded, like_parameter
from storage.state.per_rank import PerRank, is_per_rank
from storage.state.tree import Node, build, is_leaf, is_object, kind_of, name_of, names_of_keys, tree_of

Builder = Callable[[Mapping[str, Any]], Any]
"""Makes a part of the state of the leaves that were read, by name."""

_MISSING = object()
_MODULE, _OPTIMIZER, _REST = range(3)


@dataclass
class Fit:
    """What to read of one checkpoint for one state, and what does not fit.

    `wants`: by name of a leaf the tensor to fill, or None for a value. `vain`: what the state has and the checkpoint
    does not. `surplus`: leaves of which it is the other way round. `odd`: sentences about what is of another shape or
    kind. `resized`: parts of each rank's own, with the number of ranks that saved them.
    """

    wants: dict[str, Any] = field(default_factory=dict)
    vain: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    resized: dict[str, int] = field(default_factory=dict)
    loads: list[tuple[int, Path, Any, Builder]] = field(default_factory=list)
    build: Builder = lambda read: {}


class Ignored:
    """Names that are left alone, by patterns as of a shell; a pattern covers all that is below what it names."""

    def __init__(self, patterns: Collection[str] = ()) -> None:
        self._patterns = tuple(patterns)

    def __call__(self, name: str) -> bool:
        return any(
            fnmatch.fnmatchcase(name, pattern)
            or fnmatch.fnmatchcase(name + ".", pattern)
            or fnmatch.fnmatchcase(name, pattern + ".*")
            for pattern in self._patterns
        )


def fit(state: Mapping[Any, Any], index: Index, rank: int, ignored: Ignored, *, strict: bool = True) -> Fit:
    """Compare; nothing is changed yet. What is amiss is told by the result, `strict` or not.

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
    fitter = _Fitter(index.entries, objects, rank, ignored, strict, is_plain)
    children = fitter.strictly(tree, dict(sorted(state.items(), key=lambda item: str(item[0]))), ())
    fitter.found.build = lambda read: {key: made(read) for key, made in children}
    return fitter.found


def finish(found: Fit, state: Mapping[Any, Any], read: Mapping[str, Any]) -> dict[Any, Any]:
    """Give every object its state, and return the state's other values, all by key, once `wants` are read.

    Raises:
        UsageError: an object refuses what was saved.
    """
    objects = Objects(state)
    # whatever is amiss with any is found before one is changed
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


class _Fitter:
    def __init__(
        self,
        entries: Mapping[str, Entry],
        objects: Objects,
        rank: int,
        ignored: Ignored,
        strict: bool,
        is_plain: bool,
    ) -> None:
        self.found = Fit()
        self._entries = entries
        self._objects = objects
        self._rank = rank
        self._ignored = ignored
        self._strict = strict
        self._is_plain = is_plain

    # containers ---------------------------------------------------------------------------------------------------

    def strictly(
        self, node: Node, current: Mapping[Any, Any], path: Path, inner: Callable[..., Builder] | None = None
    ) -> list[tuple[Any, Builder]]:
        """Children of a dict of which every key must be on both sides; a key that is not keeps what it has."""
        fit_child = inner or self._fit
        self._learn_keys(node, current)
        saved = dict(node.items())
        children: list[tuple[Any, Builder]] = []
        for key, name in zip(current, names_of_keys(current), strict=True):
            below, value = (*path, name), current[key]
            if key in saved:
                children.append((key, fit_child(saved.pop(key), value, below)))
                continue
            if not self._ignored(name_of(below)) and not _is_void(value, self._objects):
                self.found.vain.append(name_of(below))
            children.append((key, _keep(value)))
        for child in saved.values():
            self.found.surplus += _names(child)
        return children

    def _fit(self, node: Node | str, current: Any, path: Path, opaque: bool = False) -> Builder:
        """How to make of `current` what was saved; `opaque` within what an object gave, whatever that may be."""
        if current is _MISSING and isinstance(node, Node) and node.kind == "per_rank":
            current = PerRank(None)  # of a list that was longer
        if is_per_rank(current):
            return self._fit_per_rank(node, current, path)
        if isinstance(node, Node) and node.kind == "per_rank":
            name = name_of(path)
            self.found.odd.append(f"{name!r} was saved by each rank for itself; wrap it in PerRank to restore it")
            return _keep(current)
        if is_object(current):
            return self._fit_object(node, current, path)
        if isinstance(node, str):
            return self._fit_leaf(node, current, opaque)
        return self._fit_container(node, current, path, opaque)

    def _fit_container(self, node: Node, current: Any, path: Path, opaque: bool) -> Builder:
        self._learn_keys(node, current)
        now = _children(current, node)
        saved = dict(node.items())
        counts = not opaque and isinstance(current, Mapping) and _has_tensors(current) and self._holds_tensors(node)
        children: list[tuple[Any, Builder]] = []
        for key, child in saved.items():
            if counts and key not in now and self._holds_tensors(child):
                self.found.surplus += _names(child)
                continue
            value = now.get(key, _MISSING)
            if isinstance(node, Node) and node.kind == "list" and not _is_like(value, child, self._entries):
                value = _MISSING
            children.append((key, self._fit(child, value, (*path, _name_of_key(key)), opaque)))
        for key, value in now.items():
            if key in saved:
                continue
            name = name_of((*path, _name_of_key(key)))
            if self._ignored(name):
                children.append((key, _keep(value)))
            elif counts and _has_tensors(value):
                self.found.vain.append(name)
                children.append((key, _keep(value)))
        # what an object gave may be its own, and is for it to change
        return _maker(node, children, None if opaque else current)

    def _learn_keys(self, node: Node, current: Any) -> None:
        """Take keys and kind from the state, by name as stock DCP does, where the checkpoint does not have them."""
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
                return _keep(current)
            made = self._fit(saved[self._rank], value, (*path, str(self._rank)))
        else:  # saved when it was the same for all
            made = self._fit(node, value, path)

        def put(read: Mapping[str, Any]) -> Any:
            result = made(read)
            if holder is not None:
                holder.value = result
            return current

        return put

    # leaves -------------------------------------------------------------------------------------------------------

    def _fit_leaf(self, name: str, current: Any, opaque: bool) -> Builder:
        entry, found = self._entries[name], self.found
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
        elif current is not _MISSING and current is not None and not opaque:
            found.odd.append(f"{name!r} is a {type(current).__name__}, the checkpoint has a tensor")
        return self._want(name, torch.empty(entry.shape, dtype=torch_dtype(entry.dtype)))

    def _want(self, name: str, destination: Any) -> Builder:
        self.found.wants[name] = destination
        return lambda read: read[name]

    # objects ------------------------------------------------------------------------------------------------------

    def _fit_object(self, node: Node | str, current: Any, path: Path) -> Builder:
        if isinstance(current, nn.Module):
            order, made = _MODULE, self._fit_module(node, current, path)
        elif isinstance(current, Optimizer):
            order, made = _OPTIMIZER, self._fit_optimizer(node, self._objects.named(current), path)
        else:
            order, made = _REST, self._fit(node, current.state_dict(), path, opaque=True)
        stateful = current.stateful if isinstance(current, _AsStateful) else current
        self.found.loads.append((order, path, stateful, made))
        return _keep(current)

    def _fit_module(self, node: Node | str, module: nn.Module, path: Path) -> Builder:
        if isinstance(node, str):
            self.found.odd.append(f"{name_of(path)!r} is a module, the checkpoint has one entry {node!r}")
            return _keep({})

        def inner(child: Node | str, value: Any, below: Path) -> Builder:
            # free to be of another shape each time
            is_extra = str(below[-1]).rpartition(".")[2] == EXTRA_STATE
            return self._fit(child, _MISSING if is_extra else value, below, opaque=is_extra)

        children = self.strictly(node, module_state(module), path, inner)
        return lambda read: {key: made(read) for key, made in children}

    def _fit_optimizer(self, node: Node | str, optimizer: NamedOptimizer, path: Path) -> Builder:
        saved = dict(node.items()) if isinstance(node, Node) else {}
        no_groups = Node("list") if self._ignored(name_of((*path, "param_groups"))) else None
        states, groups = saved.pop("state", Node()), saved.pop("param_groups", no_groups)
        if not isinstance(states, Node) or not isinstance(groups, Node):
            self.found.odd.append(f"{name_of(path)!r} is an optimizer, the checkpoint has none under that name")
            return _keep({})
        if optimizer.is_fsdp1:
            return self._fit(node, optimizer.state(), path)
        rest = [(key, self._fit(child, _MISSING, (*path, key), True)) for key, child in saved.items()]
        of_parameter = self._fit_states(states, optimizer, (*path, "state"))
        are_named = not _by_number(states, optimizer)
        of_group = self._fit_groups(groups, optimizer, (*path, "param_groups"), are_named)

        def made(read: Mapping[str, Any]) -> dict[str, Any]:
            by_number = [group(read) for group in of_group]
            known = {name: state(read) for name, state in of_parameter}
            return {**{key: child(read) for key, child in rest}, "state": known, "param_groups": by_number}

        return made

    def _fit_states(self, node: Node, optimizer: NamedOptimizer, path: Path) -> list[tuple[Any, Builder]]:
        """What each parameter's state becomes. In a fresh optimizer it is laid out as the parameter is."""
        renamed = _by_number(node, optimizer)
        children: list[tuple[Any, Builder]] = []
        for key, child in node.items():
            name = renamed.get(key, key)
            if name in optimizer.by_name:
                children.append((name, self._fit_state(child, optimizer, name, (*path, name))))
            elif isinstance(name, str):
                self.found.surplus += _names(child)
            else:  # what some optimizers keep beside their parameters' states
                children.append((key, self._fit(child, _MISSING, path, True)))
        saved = {name for name, _ in children}
        ignored = [name for name in optimizer.names if name not in saved and self._ignored(name_of((*path, name)))]
        return children + [(name, _keep(now)) for name in ignored if (now := optimizer.state_of(name))]

    def _fit_state(self, node: Node | str, optimizer: NamedOptimizer, name: str, path: Path) -> Builder:
        parameter, now = optimizer.by_name[name], optimizer.state_of(name)
        if not isinstance(node, Node):
            return self._fit_leaf(node, _MISSING, True)
        saved = dict(node.items())
        shapes = {key: self._entries[leaf].shape for key, leaf in saved.items() if isinstance(leaf, str)}
        if (
            is_sharded(parameter)
            and not optimizer.has_state()
            and not {tuple(parameter.shape), ()}.issuperset(shapes.values())
        ):
            optimizer.init_state()  # it alone knows how such a state is laid out
            now = optimizer.state_of(name)
        current = {}
        for key, leaf in saved.items():
            value = now.get(key, _MISSING)
            is_tensor = isinstance(leaf, str) and self._entries[leaf].is_tensor
            if is_tensor and not isinstance(value, torch.Tensor) and shapes[key] == tuple(parameter.shape):
                value = like_parameter(parameter, torch_dtype(self._entries[str(leaf)].dtype))
            current[key] = value
        children = [(key, self._fit(leaf, current[key], (*path, str(key)), True)) for key, leaf in saved.items()]
        return _maker(node, children, None)

    def _fit_groups(self, node: Node, optimizer: NamedOptimizer, path: Path, are_named: bool) -> list[Builder]:
        """Each group's settings as saved, by the names of its parameters, which are known once they are read."""
        saved = [self._fit(child, _MISSING, (*path, number), True) for number, child in node.items()]
        now, number = [], 0
        for group in optimizer.optimizer.param_groups:
            names = optimizer.names[number : number + len(group["params"])]
            number += len(names)
            now.append(({key: value for key, value in group.items() if key != "params"}, names))
        if saved and len(saved) != len(now):
            self.found.odd.append(
                f"{name_of(path)!r}: the optimizer has {len(now)} groups of parameters, the checkpoint {len(saved)}"
            )

        def settings(number: int) -> Builder:
            own, names = now[number]

            def made(read: Mapping[str, Any]) -> dict[str, Any]:
                found = _group_of([made(read) for made in saved], number, names)
                saved_names = found.get("params", names)
                is_told = self._strict and are_named and all(isinstance(name, str) for name in saved_names)
                if is_told and (other := set(names) ^ set(saved_names)):
                    raise WrongModel(
                        f"{name_of((*path, number))!r}: parameter {min(other)!r} is in this group of the optimizer, and"
                        " in another or none in the checkpoint, or the other way round (restore(..., strict=False)"
                        " takes each group's settings by its first parameter)"
                    )
                return {**own, **found, "params": names}

            return made

        return [settings(number) for number in range(len(now))]

    def _holds_tensors(self, node: Node | str) -> bool:
        leaves = [node] if isinstance(node, str) else node.leaves()
        return any(self._entries[name].is_tensor for name in leaves)


class _AsStateful:
    """A loader that is taken per rank, without being taken so again."""

    def __init__(self, stateful: Any) -> None:
        self.stateful = stateful

    def state_dict(self) -> Any:
        return self.stateful.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.stateful.load_state_dict(state)


def _group_of(saved: list[Any], number: int, names: list[str]) -> dict[str, Any]:
    """The saved group with these parameters; by its place if no parameter has a name that both know."""
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


def _children(current: Any, node: Node) -> dict[Any, Any]:
    """The children of a dict or list by key or number; none of anything that is not of the node's sort."""
    if node.kind == "list":
        return dict(enumerate(current)) if isinstance(current, list) else {}
    return dict(current) if isinstance(current, Mapping) else {}


def _is_like(value: Any, child: Node | str, entries: Mapping[str, Entry]) -> bool:
    """Whether what is in a list can take what was saved there; lists grow and shrink, and it may be something else."""
    if isinstance(child, Node):
        return not is_leaf(value)
    if entries[child].is_tensor:
        is_tensor = isinstance(value, torch.Tensor)
        return is_tensor and (isinstance(value, DTensor) or tuple(value.shape) == entries[child].shape)
    return not isinstance(value, torch.Tensor)


def _is_void(value: Any, objects: Objects) -> bool:
    """Whether there is nothing in it that could have been saved; stock DCP stores no empty dicts."""
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


def _names(child: Node | str) -> Iterator[str]:
    return iter([child]) if isinstance(child, str) else child.leaves()


def _name_of_key(key: Any) -> str | int:
    return key if type(key) is int else str(key)


def _keep(value: Any) -> Builder:
    return lambda read: value


def _maker(node: Node, children: list[tuple[Any, Builder]], current: Any) -> Builder:
    """A dict or list of the saved kind. One that is there already is filled, for others may refer to it."""

    def make(read: Mapping[str, Any]) -> Any:
        result = build(node, [(key, made(read)) for key, made in children])
        if type(current) is type(result) and getattr(current, "default_factory", None) is getattr(
            result, "default_factory", None
        ):
            if isinstance(current, list):
                current[:] = result
            else:
                current.clear()
                current.update(result)
            return current
        return result

    return make
