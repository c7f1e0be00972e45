"""What the job remembers of its failures, kept in the round so that it outlives any leader. Plain data.

Ages are seconds at the moment the round was formed. Whoever leads adds the time since it first saw that round, by its
own clock; clocks of different hosts are never compared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

_MAX_MARKS = 64
_MAX_EXCLUSIONS = 32


class MarkKind(StrEnum):
    """What a node is remembered for."""

    STRIKE = "strike"  # a failure for which the node is to blame
    DEPARTURE = "departure"  # it took part in a round and was lost, or left


@dataclass(frozen=True)
class Mark:
    """Something that happened to a node. `node` is what stays the same when its agent is started anew."""

    node: str
    kind: MarkKind
    reason: str
    age_s: float = 0.0


@dataclass(frozen=True)
class Exclusion:
    """A node that takes no part for a time; kept when that is over, because the next time is longer."""

    node: str
    reason: str
    for_s: float
    times: int = 1
    active: bool = True
    age_s: float = 0.0


@dataclass(frozen=True)
class History:
    """`best_step`: the highest step that a generation that failed had completed; `worked`: some generation got past
    its start; `in_row`: failures since the last progress; `program_place`, `program_step`: of the last program error
    since then; `waived`: nodes that this round would leave out if it could do without them.
    """

    best_step: int = -1
    worked: bool = False
    in_row: int = 0
    program_place: str = ""
    program_step: int = -1
    marks: tuple[Mark, ...] = ()
    exclusions: tuple[Exclusion, ...] = ()
    waived: tuple[str, ...] = ()

    def to_fields(self) -> dict[str, Any]:
        """Return what JSON holds: what differs from an empty history, because every node reads it with the round."""
        empty = asdict(History())
        return {name: value for name, value in asdict(self).items() if value != empty[name]}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> History:
        """Read what `to_fields` made of one."""
        marks = tuple(Mark(**{**mark, "kind": MarkKind(mark["kind"])}) for mark in fields.get("marks", ()))
        exclusions = tuple(Exclusion(**exclusion) for exclusion in fields.get("exclusions", ()))
        waived = tuple(fields.get("waived", ()))
        return cls(**{**fields, "marks": marks, "exclusions": exclusions, "waived": waived})

    def excluded(self, node: str) -> Exclusion | None:
        """Return the exclusion that keeps a node out, if one does."""
        return next((e for e in self.exclusions if e.node == node and e.active), None)

    def aged(self, by_s: float) -> History:
        """Return the same history as it is `by_s` later."""
        return replace(
            self,
            marks=tuple(replace(mark, age_s=mark.age_s + by_s) for mark in self.marks[-_MAX_MARKS:]),
            exclusions=tuple(replace(e, age_s=e.age_s + by_s) for e in self.exclusions[-_MAX_EXCLUSIONS:]),
        )
