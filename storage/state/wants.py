"""What a state wants of a checkpoint, and how the state is made of what was read."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.format.containers import Path
from storage.state.tree import Node, build

Builder = Callable[[Mapping[str, Any]], Any]
"""Makes a part of the state out of the leaves that were read, which it gets by name."""

MISSING = object()
"""Stands for what the state does not have."""


@dataclass
class Fit:
    """What to read of one checkpoint for one state, and what does not fit.

    `wants`: by the name of a leaf, the tensor to fill, or None for a value. `vain`: names that the state has and the
    checkpoint has not. `surplus`: names that the checkpoint has and the state has not. `odd`: sentences about entries
    of another shape or kind. `resized`: the parts in a PerRank, with the number of ranks that saved them. `loads`: the
    objects to be given a state, with how to make it, and in which order. `build`: how to make the rest of the state.
    """

    wants: dict[str, Any] = field(default_factory=dict)
    vain: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    resized: dict[str, int] = field(default_factory=dict)
    loads: list[tuple[int, Path, Any, Builder]] = field(default_factory=list)
    build: Builder = lambda read: {}


class Ignored:
    """Tells which names are left alone, by patterns as a shell has them; one covers all that is below what it names."""

    def __init__(self, patterns: Collection[str] = ()) -> None:
        self._patterns = tuple(patterns)

    def __call__(self, name: str) -> bool:
        return any(
            fnmatch.fnmatchcase(name, pattern)
            or fnmatch.fnmatchcase(name + ".", pattern)
            or fnmatch.fnmatchcase(name, pattern + ".*")
            for pattern in self._patterns
        )


def leaf_names(child: Node | str) -> Iterator[str]:
    """The names of all leaves of a part of a checkpoint."""
    return iter([child]) if isinstance(child, str) else child.leaves()


def keep(value: Any) -> Builder:
    """A builder that leaves `value` in its place."""
    return lambda read: value


def maker(node: Node, children: list[tuple[Any, Builder]], current: Any) -> Builder:
    """A builder of a dict or list of the saved kind. One that is there already is filled: others may refer to it."""

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
