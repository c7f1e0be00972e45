"""What a state would be had only those ranks staged it whose parts are left. Pure.

What each rank has of its own (a `PerRank`) goes with a rank that is lost, and nobody else has it. The others keep
theirs, under the numbers that they have in a job without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from storage.format.containers import Container, Path, encode_key
from storage.format.manifest import Manifest, TensorEntry, ValueEntry

E = TypeVar("E", TensorEntry, ValueEntry)


@dataclass(frozen=True)
class OfSurvivors:
    """The state of fewer ranks than have staged it, and the names of the parts that each rank had of its own."""

    manifest: Manifest
    names: tuple[str, ...]


def of_survivors(draft: Manifest, ranks: Sequence[int]) -> OfSurvivors | None:
    """The state of those ranks alone, the first of which is rank 0; None where nothing is lost with the others."""
    renumbering = _Renumbering(
        frozenset(container.path for container in draft.containers if container.kind == "per_rank"),
        {str(rank): str(number) for number, rank in enumerate(sorted(ranks))},
    )
    before = {key: entry.path for key, entry in draft.tensors.items()}
    before |= {key: entry.path for key, entry in draft.values.items()}
    paths = {key: renumbering.path(path) for key, path in before.items()}
    if None not in paths.values():
        return None
    names = {key: key if path == before[key] else _name_of(path) for key, path in paths.items() if path is not None}
    if len(set(names.values())) < len(names):
        return None  # who counts what is held finds what is missing
    changes = {
        "tensors": {names[key]: _moved(entry, paths[key]) for key, entry in draft.tensors.items() if key in names},
        "values": {names[key]: _moved(entry, paths[key]) for key, entry in draft.values.items() if key in names},
        "containers": tuple(filter(None, map(renumbering.container, draft.containers))),
        "items": draft.items.model_copy(update={"key": tuple(names[key] for key in draft.items.key)}),
    }
    return OfSurvivors(draft.model_copy(update=changes), tuple(sorted(map(_name_of, renumbering.own))))


@dataclass(frozen=True)
class _Renumbering:
    """`own`: the paths of what each rank has of its own. `numbers`: by the rank's number as text the new one."""

    own: frozenset[Path]
    numbers: Mapping[str, str]

    def path(self, path: Path) -> Path | None:
        """Where that is in the new state; None if it is a lost rank's."""
        found: list[str | int] = []
        for at, part in enumerate(path):
            number = self.numbers.get(str(part)) if path[:at] in self.own else part
            if number is None:
                return None
            found.append(number)
        return tuple(found)

    def container(self, container: Container) -> Container | None:
        """The container in the new state; None if it is a lost rank's."""
        path = self.path(container.path)
        if path is None:
            return None
        changes: dict[str, object] = {"path": path}
        if container.kind == "per_rank":
            names = [self.numbers[name] for name in container.names if name in self.numbers]
            changes |= {"names": tuple(names), "keys": tuple(encode_key(int(name)) for name in names)}
        return container.model_copy(update=changes)


def _moved(entry: E, path: Path | None) -> E:
    return entry.model_copy(update={"path": path})


def _name_of(path: Path) -> str:
    return ".".join(map(str, path))  # as `storage.state.tree` has it, which needs torch
