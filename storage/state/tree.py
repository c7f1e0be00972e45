"""A nested state as leaves with names, and names as a nested state again.

Names and what counts as a leaf are DCP's (`flatten_state_dict`), so that stock DCP reads what is saved: dicts are
entered, lists are if a tensor or a dict is in them, anything else is a leaf. What DCP forgets, the types and the order
of keys, kinds of dicts, and empty ones, goes into `Container`s.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

from storage.errors import Corrupt, UnsupportedValue
from storage.format.containers import Container, Kind, Path, check_key, decode_key, encode_key
from storage.state.per_rank import PerRank

_KINDS: dict[type, Kind] = {
    dict: "dict",
    OrderedDict: "OrderedDict",
    Counter: "Counter",
    defaultdict: "defaultdict",
    list: "list",
}
_TYPES: dict[str, type] = {name: kind for kind, name in _KINDS.items()}
_FACTORIES = {kind.__name__: kind for kind in (int, float, complex, bool, str, bytes, list, dict, set, tuple)}
PLAIN_TYPES = frozenset({int, float, str, bool, bytes, type(None)})
"""The types of most entries of long lists: known to be leaves, so that nobody has to look twice at each."""
_DEPTH_MAX = 64
_NUM_MISSING_MAX = 1024


class _Listed(enum.IntEnum):
    """The order in which a checkpoint lists a state: its tensors, its values, then what has neither."""

    TENSOR = 0
    VALUE = 1
    NOTHING = 2


class Unordered(dict[str, Any]):
    """A dict of names whose order means nothing, so that it is not stored."""


@dataclass
class Flat:
    """A state taken apart. `leaves` and `paths` have the same names, in the order of the state.

    `lengths`: of the lists that every rank has, by name.
    """

    leaves: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    containers: list[Container] = field(default_factory=list)
    lengths: dict[str, int] = field(default_factory=dict)


def kind_of(value: Any) -> Kind | None:
    """The name that a checkpoint has for a dict's or list's type; None for a type that could not be built again."""
    return _KINDS.get(type(value))


def name_of(path: Path) -> str:
    """The name of what is at `path`, as in DCP."""
    return ".".join(map(str, path))


def is_object(value: Any) -> bool:
    """Whether a value is asked for its state, and given it back: it has a `state_dict`, or is a PerRank."""
    kind = type(value)
    if isinstance(value, (torch.Tensor, type)) or kind in PLAIN_TYPES or kind in _KINDS:
        return False  # most there is; a protocol is slow to ask
    return isinstance(value, (Stateful, PerRank, torch.optim.Optimizer))


def is_leaf(value: Any, depth: int = 0) -> bool:
    """Whether a value is stored as one: DCP would not take it apart, and it holds no object where DCP looks for none.

    Raises UnsupportedValue for lists without an end.
    """
    if type(value) in PLAIN_TYPES:
        return True
    if isinstance(value, Mapping) or is_object(value):
        return False
    if isinstance(value, list):
        if depth > _DEPTH_MAX:
            raise UnsupportedValue(f"a list in the state is nested {_DEPTH_MAX} deep, or holds itself")
        return all(
            type(entry) in PLAIN_TYPES or (not isinstance(entry, torch.Tensor) and is_leaf(entry, depth + 1))
            for entry in value
        )
    return True


def names_of_keys(keys: Collection[Hashable]) -> list[str]:
    """The part of a path for each key of one dict: `str(key)`, unless another key of the dict has the same."""
    taken = {key for key in keys if isinstance(key, str)}
    names = []
    for key in keys:
        name = str(key) if not isinstance(key, int) or key.bit_length() < 4096 else hex(key)  # is refused
        if not isinstance(key, str):
            while name in taken:
                name += f"({type(key).__name__})"
            taken.add(name)
        names.append(name)
    return names


def flatten(state: Any, expand: Callable[[Path, Any], Any], rank: int) -> Flat:
    """Take `state` apart.

    Args:
        expand: called with the path and the value of everything that is met but tensors; what it returns is taken
            instead. Of an object it returns a plain state.
        rank: this process's; a `PerRank` has its value under it.

    Raises:
        UnsupportedValue: a dict of a kind or with a key that could not be built again; one that holds itself.
    """
    flat = Flat()
    _Flattener(flat, expand, rank).visit((), state)
    return flat


class _Flattener:
    def __init__(self, flat: Flat, expand: Callable[[Path, Any], Any], rank: int) -> None:
        self._flat = flat
        self._expand = expand
        self._rank = rank
        self._is_own = False

    def visit(self, path: Path, original: Any) -> _Listed:
        """Take apart what is at `path`; returns what of it a checkpoint lists first."""
        if len(path) > _DEPTH_MAX:
            raise UnsupportedValue(f"state {name_of(path[:3])!r} is nested {_DEPTH_MAX} deep, or holds itself")
        if isinstance(original, torch.Tensor):  # most there is, and a save waits for this
            self._add(path, original)
            return _Listed.TENSOR
        value = self._expand(path, original)
        is_given = value is not original  # by an object, whose business the kind of dict is
        if isinstance(value, PerRank):
            number = str(self._rank)
            keys = (encode_key(self._rank),)
            self._flat.containers.append(Container(path=path, kind="per_rank", keys=keys, names=(number,)))
            was_own, self._is_own = self._is_own, True
            try:
                return self.visit((*path, number), value.value)
            finally:
                self._is_own = was_own
        if isinstance(value, Mapping):
            return self._visit_mapping(path, value, is_given=is_given or not path)
        if is_leaf(value):
            self._add(path, value)
            return _Listed.TENSOR if isinstance(value, torch.Tensor) else _Listed.VALUE
        if type(value) is not list:
            raise UnsupportedValue(
                f"state {name_of(path)!r} is a {type(value).__qualname__} with tensors or dicts; keep a plain list"
            )
        if not self._is_own:
            self._flat.lengths[f"{name_of(path)}[]"] = len(value)
        return min([self.visit((*path, number), entry) for number, entry in enumerate(value)])

    def _visit_mapping(self, path: Path, value: Mapping[Any, Any], *, is_given: bool) -> _Listed:
        kind = kind_of(value) or ("dict" if is_given else None)
        if kind is None:
            raise UnsupportedValue(
                f"state {name_of(path)!r} is a {type(value).__qualname__}, a dict that could not be built again; keep a"
                " plain dict"
            )
        factory = getattr(value, "default_factory", None) if kind == "defaultdict" else None
        if factory is not None and _FACTORIES.get(getattr(factory, "__name__", "")) is not factory:
            raise UnsupportedValue(
                f"state {name_of(path)!r} is a defaultdict with a factory that cannot be stored; keep a plain dict,"
                f" or one of {', '.join(_FACTORIES)} as factory"
            )
        try:
            for key in value:
                check_key(key)
        except UnsupportedValue as error:
            raise UnsupportedValue(
                f"state {name_of(path)!r} is a dict with {error}; keys may be str, int, float, bool, None, bytes, and"
                " tuples of these"
            ) from None
        names = names_of_keys(value)
        place = len(self._flat.containers)
        firsts = [self.visit((*path, name), child) for name, child in zip(names, value.values(), strict=True)]
        is_in_order = isinstance(value, Unordered) or firsts == sorted(firsts)
        is_plain = kind == "dict" and is_in_order and all(type(key) is str for key in value)
        # that of the root says that this checkpoint has them, as ours of version 1 and stock DCP's have not
        if not value or not is_plain or not path:
            container = Container(
                path=path,
                kind=kind,
                keys=tuple(map(encode_key, value)),
                names=tuple(names),
                factory=None if factory is None else factory.__name__,
            )
            self._flat.containers.insert(place, container)
        return min(firsts, default=_Listed.NOTHING)

    def _add(self, path: Path, value: Any) -> None:
        name = name_of(path)
        if name in self._flat.leaves:
            raise UnsupportedValue(f"two entries of the state have the name {name!r}; rename a key with a dot in it")
        self._flat.leaves[name] = value
        self._flat.paths[name] = path


def join_containers(of_rank: Collection[Collection[Container]]) -> tuple[Container, ...]:
    """The containers of all ranks as those of one state, in which a dict has all keys that any rank has.

    Raises:
        ValueError: ranks have different kinds of dicts at one place.
    """
    joined: dict[Path, Container] = {}
    for container in (container for containers in of_rank for container in containers):
        known = joined.setdefault(container.path, container)
        if known is container or known == container:
            continue
        if (known.kind, known.factory) != (container.kind, container.factory):
            raise ValueError(f"ranks hold different things under {name_of(container.path)!r}")
        pairs = dict(zip(known.names, known.keys, strict=True)) | dict(
            zip(container.names, container.keys, strict=True)
        )
        joined[container.path] = known.model_copy(update={"keys": tuple(pairs.values()), "names": tuple(pairs)})
    return tuple(joined.values())


@dataclass
class Node:
    """A dict or list of a saved state. `children` are by the name (dict) or number (list) that paths have.

    A child is a Node, or the name of a leaf.
    """

    kind: Kind = "dict"
    children: dict[str | int, Node | str] = field(default_factory=dict)
    keys: dict[str | int, Hashable] = field(default_factory=dict)
    factory: str | None = None

    def items(self) -> Iterator[tuple[Any, Node | str]]:
        """Each child with its key."""
        for name, child in self.children.items():
            yield self.keys.get(name, name), child

    def leaves(self) -> Iterator[str]:
        """The names of all leaves below."""
        for child in self.children.values():
            if isinstance(child, Node):
                yield from child.leaves()
            else:
                yield child


def tree_of(paths: Mapping[str, Path], containers: Collection[Container]) -> Node:
    """The nested state that a checkpoint holds. Raises Corrupt where paths contradict each other."""
    root = Node()
    for name, path in paths.items():
        if not path:
            raise Corrupt(f"{name!r} has no path")
        node = _enter(root, path[:-1])
        _settle(node, path[-1])
        if node.children.setdefault(path[-1], name) != name:
            raise Corrupt(f"two entries are at the path of {name!r}")
    if len({container.path for container in containers}) != len(containers):
        raise Corrupt("a dict is described twice")
    for container in containers:
        node = _enter(root, container.path)
        has_numbers = any(not isinstance(child, str) for child in node.children)
        if node.children and has_numbers != (container.kind == "list"):
            raise Corrupt(f"{name_of(container.path)!r} is described as a {container.kind}, which it is not")
        node.kind, node.factory = container.kind, container.factory
        node.keys = dict(zip(container.names, map(decode_key, container.keys), strict=False))
        if not len(container.keys) == len(container.names) == len(node.keys) == len(set(node.keys.values())):
            raise Corrupt(f"{name_of(container.path)!r} has not a name for each key")
        order: dict[str | int, Node | str] = {}
        for child in container.names:
            # an empty dict in it is a container of its own, which may come later
            order[child] = node.children.get(child, Node())
        node.children = order | {name: child for name, child in node.children.items() if name not in order}
    return root


def _enter(node: Node, path: Path) -> Node:
    if len(path) > _DEPTH_MAX + 1:
        raise Corrupt("a path is too long")
    for part in path:
        _settle(node, part)
        child = node.children.setdefault(part, Node())
        if not isinstance(child, Node):
            raise Corrupt(f"{child!r} is an entry, and others are below it")
        node = child
    return node


def _settle(node: Node, part: str | int) -> None:
    """Take a node that has no children yet for a list, if its first child has a number."""
    if not node.children and not isinstance(part, str):
        node.kind = "list"
    if isinstance(part, str) == (node.kind == "list"):
        raise Corrupt(f"{part!r} is both in a list and in a dict")


def build(node: Node, children: list[tuple[Any, Any]]) -> Any:
    """The dict or list of `node`'s kind with these children. Raises Corrupt for a list with large holes."""
    if node.kind == "list":
        places = dict(children)
        length = max(places, default=-1) + 1
        if length > len(places) + _NUM_MISSING_MAX or min(places, default=0) < 0:
            raise Corrupt(f"a list of {length} has only {len(places)} entries")
        # stock DCP stores no empty dicts
        return [places.get(number, {}) for number in range(length)]
    if node.kind == "per_rank":
        raise Corrupt("what each rank has of its own is in the place of something else")
    if node.kind == "defaultdict":
        return defaultdict(_FACTORIES.get(node.factory or ""), children)
    return _TYPES.get(node.kind, dict)(dict(children)) if node.kind == "Counter" else _TYPES[node.kind](children)
