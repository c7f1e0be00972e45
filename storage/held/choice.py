"""Which state in memory is the one to go on from, and what it is made of. Pure.

The parts that nodes hold of one attempt make a state if together they have every byte of it. What a rank has staged of
its own for a save is all needed; of states of which every rank has staged all that it holds, replicas make up for ranks
that are gone, and one copy of each chunk is taken and the others are its twins.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from storage.errors import Corrupt
from storage.format import layout
from storage.format.completeness import gaps
from storage.format.manifest import ItemTable, Manifest
from storage.held.papers import PartLabel, PartPapers
from storage.held.survivors import of_survivors
from storage.run.attempt import draft_manifest


@dataclass(frozen=True)
class StoredState:
    """The newest checkpoint of the store."""

    step: int
    generation: int = 0
    attempt: str = ""

    @property
    def age(self) -> tuple[int, int]:
        """See `PartLabel.age`."""
        return self.generation, self.step


@dataclass(frozen=True)
class HeldState:
    """A state of which some nodes hold parts: by rank the nodes that do, each in the order of `offers`.

    `contents_of`: the ranks whose papers say what all of it is.
    """

    label: PartLabel
    holders: Mapping[int, tuple[int, ...]]
    contents_of: tuple[int, ...]

    @property
    def missing(self) -> list[int]:
        """The ranks of whose parts nobody holds one."""
        return [rank for rank in range(self.label.world_size) if rank not in self.holders]

    @property
    def why_not(self) -> str:
        """Why it can be known without its papers that bytes are missing; "" if it cannot."""
        if not self.contents_of:
            return "nobody holds what it is made of"
        if self.missing and not self.label.is_all:
            ranks = ", ".join(map(str, self.missing[:8])) + (" and more" if len(self.missing) > 8 else "")
            return f"nobody holds the part of rank{'s' if len(self.missing) > 1 else ''} {ranks}"
        return ""


def held_states(offers: Sequence[Sequence[PartLabel]], lineage: str) -> list[HeldState]:
    """The states of `lineage` that the nodes hold parts of, newest first.

    `offers`: by node, what it holds of the run. Parts of one attempt that contradict each other about it, as only those
    of a broken node can, are left out: those that come later.
    """
    labels: dict[str, PartLabel] = {}
    holders: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    contents: dict[str, set[int]] = defaultdict(set)
    for node, offered in enumerate(offers):
        for label in offered:
            if label.lineage != lineage or not is_same_state(labels.setdefault(label.attempt, label), label):
                continue
            holders[label.attempt][label.rank].append(node)
            if label.has_contents:
                contents[label.attempt].add(label.rank)
    found = [
        HeldState(label, {rank: tuple(nodes) for rank, nodes in holders[id].items()}, tuple(sorted(contents[id])))
        for id, label in labels.items()
    ]
    return sorted(found, key=lambda state: (state.label.age, state.label.attempt), reverse=True)


def is_same_state(one: PartLabel, other: PartLabel) -> bool:
    """Whether two labels say the same of the state that they are parts of."""
    of_part = {"rank": 0, "size_bytes": 0, "has_contents": False, "run": ""}
    return one.model_copy(update=of_part) == other.model_copy(update=of_part)


def worth_a_look(states: Sequence[HeldState], stored: StoredState | None, *, unhealthy: bool) -> list[HeldState]:
    """Those that are newer than what the store has, newest first.

    A state of an earlier generation than the stored one's is of a history that was not gone on from, and one of the
    stored one's own attempt is that checkpoint.
    """
    return [
        state
        for state in states
        if (unhealthy or state.label.healthy)
        and (stored is None or (state.label.generation >= stored.generation and state.label.step > stored.step))
    ]


@dataclass(frozen=True)
class Twins:
    """The same bytes at several places: `length` of them at `start` of object `name`, and at those of `others`."""

    name: str
    start: int
    length: int
    others: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class DifferingCopies:
    """Ranks whose copies of a piece of the state are others than those of `others`; `name` is the piece's.

    `is_decided`: the others are the majority, and theirs is taken. Else it is the lowest rank's.
    """

    name: str
    ranks: tuple[int, ...]
    others: tuple[int, ...]
    is_decided: bool


@dataclass(frozen=True)
class JoinedState:
    """A state of which every byte is held: its index as a manifest, what of it has other names as well, and which of
    those are not the same.

    `lost`: the names of what each rank had of its own, where it is not there any more of all of them.
    """

    manifest: Manifest
    twins: tuple[Twins, ...] = ()
    differing: tuple[DifferingCopies, ...] = ()
    lost: tuple[str, ...] = ()


def join(papers: Sequence[PartPapers], num_ranks: int | None = None) -> JoinedState:
    """The state that those parts of one attempt make, in the order of their ranks.

    What lost ranks had of their own (`PerRank`) may be missing of a state of which replicas make up for them, where
    there are so few ranks now, `num_ranks`, that each gets what one of the others had: as from a checkpoint that is
    restored on fewer ranks.

    Raises:
        Corrupt: bytes are missing; the message says which.
    """
    parts = sorted(papers, key=lambda part: part.label.rank)
    of_all = next((part for part in parts if part.contents is not None), None)
    if of_all is None or of_all.contents is None:
        raise Corrupt("nobody holds what it is made of")
    label, receipts = of_all.label, [part.receipt for part in parts]
    draft = draft_manifest(
        label.of_attempt,
        of_all.origin,
        of_all.contents.contents,
        receipts,
        of_all.created_unix_s,
        healthy=label.healthy,
    )
    lost: tuple[str, ...] = ()
    if label.is_all and len(parts) < label.world_size:
        draft, lost = _without_lost(draft, [part.label.rank for part in parts], num_ranks or label.world_size)
    joined = replace(_without_twins(draft), lost=lost) if label.is_all else JoinedState(draft)
    for gap in itertools.islice(gaps(joined.manifest), 1):
        raise Corrupt(gap)
    return joined


def _without_lost(draft: Manifest, ranks: Sequence[int], num_ranks: int) -> tuple[Manifest, tuple[str, ...]]:
    """The manifest as those ranks alone would have it, and the names of what the lost ones had of their own.

    Raises Corrupt: somebody would get nothing.
    """
    left = of_survivors(draft, ranks)
    if left is None:
        return draft, ()
    if num_ranks > len(ranks):
        names, there = ", ".join(map(repr, left.names)), f"{len(ranks)} of {draft.world_size}"
        raise Corrupt(f"what each rank had of its own ({names}) is left of {there}, and there are {num_ranks} now")
    return left.manifest, left.names


def _without_twins(draft: Manifest) -> JoinedState:
    """The manifest with one of each chunk's copies. One that is not the same, byte for byte, is no twin of it.

    Of tensors' copies that differ it is the majority's, as one that differs alone is most likely wrong; else, and of
    values, which ranks may have each of its own, the first.
    """
    table = draft.items
    copies: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for number, item in enumerate(table.rows()):
        copies[item.key, item.offsets].append(number)
    twins, taken, differing = [], [], []
    for rows in copies.values():
        sums = {row: _sum_of(table, row) for row in rows}
        most, num = Counter(sums.values()).most_common(1)[0]
        is_tensor = bool(table.offsets.num_dims[rows[0]] >= 0)
        is_decided = is_tensor and 2 * num > len(rows)
        alike = [row for row in rows if sums[row] == (most if is_decided else sums[rows[0]])]
        taken.append(alike[0])
        if alike[1:]:
            others = tuple((_name_of(draft, row), int(table.offset[row])) for row in alike[1:])
            start, length = int(table.offset[alike[0]]), int(table.length[alike[0]])
            twins.append(Twins(_name_of(draft, alike[0]), start, length, others))
        if is_tensor and len(alike) < len(rows):
            odd = tuple(_rank_of(draft, row) for row in rows if row not in alike)
            others_of = tuple(_rank_of(draft, row) for row in alike)
            differing.append(DifferingCopies(table.key[alike[0]], odd, others_of, is_decided))
    if len(taken) < len(table):
        draft = draft.model_copy(update={"items": _rows_of(table, taken)})
    return JoinedState(draft, tuple(twins), tuple(differing))


def _name_of(draft: Manifest, row: int) -> str:
    return draft.objects[int(draft.items.object[row])].name


def _rank_of(draft: Manifest, row: int) -> int:
    part = layout.parse_data_name(_name_of(draft, row))
    return -1 if part is None else part[1]


def _sum_of(table: ItemTable, row: int) -> tuple[int, int, str]:
    return int(table.length[row]), int(table.crc32c[row]), table.block_crcs[row]


def _rows_of(table: ItemTable, rows: Sequence[int]) -> ItemTable:
    kept = set(rows)
    return ItemTable.of(item for number, item in enumerate(table.rows()) if number in kept)
