"""What is to be read of a checkpoint for a state, and how the state is made of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.format.containers import Path
from storage.state.tree import Node, build

Builder = Callable[[Mapping[str, Any]], Any]
"""Makes a part of the state of the leaves that were read, by name."""

MISSING = object()
"""In the place of what the state does not have."""


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


def leaf_names(child: Node | str) -> Iterator[str]:
    """The names of all leaves of a part of a checkpoint."""
    return iter([child]) if isinstance(child, str) else child.leaves()


def keep(value: Any) -> Builder:
    """Leaves what is there."""
    return lambda read: value


def maker(node: Node, children: list[tuple[Any, Builder]], current: Any) -> Builder:
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
