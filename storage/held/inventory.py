"""What one node holds in memory: parts of the newest states, and when the memory of an older one is free.

A node cannot know which state is whole everywhere. But a save begins only after all ranks have agreed on it, so no rank
is two saves ahead of another, and of two states that a node's ranks have all staged one is whole on all nodes.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from storage.errors import NotFound
from storage.held.papers import PartLabel, PartPapers
from storage.stores.buffers import Buffer, views_of

NUM_STATES = 2
_NUM_UNFINISHED = 2
"""States that some rank of a node has staged and another has not: more are never under way, so those have failed."""
_NUM_HELD_MAX = 4
"""Of one rank, so that of the five slots that it has one is always free."""

Age = tuple[int, int]
"""See `PartLabel.age`."""
PartKey = tuple[str, int]
"""The attempt, and the rank whose part it is."""


class HeldObject:
    """The bytes of a data object in memory, in pieces that lie anywhere."""

    def __init__(self, pieces: Sequence[Buffer]) -> None:
        self.pieces = tuple(views_of(pieces))
        self._starts = list(itertools.accumulate((piece.nbytes for piece in self.pieces), initial=0))

    @property
    def size_bytes(self) -> int:
        """The length of the object."""
        return self._starts[-1]

    def views(self, offset: int, length: int) -> list[memoryview]:
        """Bytes [offset, offset + length), as far as the object has them; nothing is copied."""
        found, stop = [], offset + length
        for number in range(max(bisect.bisect_right(self._starts, offset) - 1, 0), len(self.pieces)):
            start = self._starts[number]
            if start >= stop:
                break
            found.append(self.pieces[number][max(0, offset - start) : stop - start])
        return [view for view in found if view.nbytes]


class Memory(Protocol):
    """Memory that another process of this host can map by its descriptor, such as `storage.arena.slot.Slot`."""

    @property
    def fd(self) -> int:
        """The file behind it."""

    @property
    def memory(self) -> memoryview:
        """Its bytes."""

    def close(self) -> None:
        """Let it go."""


def _nothing() -> None:
    """Free no memory."""


@dataclass(frozen=True)
class HeldPart:
    """A part with its bytes: `objects` by the names in its receipt.

    `of_node`: whose ranks have staged it; "" for this node's own. `memories`: in which the pieces of its objects lie,
    but for short ones. `release` is called once, from any thread, when nobody reads the objects any more: their memory
    is free. `is_copied`: whether each node has its part of that state copied to another one.
    """

    papers: PartPapers
    objects: Mapping[str, HeldObject]
    of_node: str = ""
    memories: tuple[Memory, ...] = ()
    release: Callable[[], None] = field(default=_nothing, compare=False)
    is_copied: bool = True

    @property
    def label(self) -> PartLabel:
        """Its label."""
        return self.papers.label

    @property
    def key(self) -> PartKey:
        """What it is found by."""
        return self.label.attempt, self.label.rank


@dataclass
class _Shelf:
    part: HeldPart
    num_readers: int = 0
    is_dropped: bool = False


class Inventory:
    """The parts that a node holds. Thread-safe.

    Of its own ranks, and of each node that it has copies of, it holds the parts of the newest `num_states` states that
    all of those ranks have staged, and of as many of those that are copied; and of two newer ones that some of them
    have staged: of four in all. What is older than a state that all have staged will not be staged by the others any
    more, since each stages in order. Of two states that are copied the older one has copies on all nodes: not before
    that is a newer one staged that is to be copied.

    A copy that is older than the own states goes as well, be it of a node that is gone or has another buddy by now: the
    own parts that would make a state with it are gone.
    """

    def __init__(self, num_states: int = NUM_STATES) -> None:
        self._num_states = num_states
        self._lock = threading.Lock()
        self._shelves: dict[PartKey, _Shelf] = {}

    def add(self, part: HeldPart) -> None:
        """Take a part in; what is too old by now is dropped."""
        with self._lock:
            freed = self._drop([part.key])
            self._shelves[part.key] = _Shelf(part)
            freed += self._drop(self._superseded(part.of_node))
            freed += self._drop(self._outlived())
        _release(freed)

    def labels(self) -> list[PartLabel]:
        """Of all parts, the newest first."""
        with self._lock:
            labels = [shelf.part.label for shelf in self._shelves.values()]
        return sorted(labels, key=lambda label: (label.age, label.attempt, label.rank), reverse=True)

    @property
    def copied_bytes(self) -> int:
        """The bytes of all that is held of other nodes."""
        with self._lock:
            return sum(s.part.label.size_bytes for s in self._shelves.values() if s.part.of_node)

    def own_labels(self) -> list[PartLabel]:
        """Of the parts of this node's own ranks, the newest first."""
        with self._lock:
            own = {key for key, shelf in self._shelves.items() if not shelf.part.of_node}
        return [label for label in self.labels() if (label.attempt, label.rank) in own]

    @contextlib.contextmanager
    def reading(self, attempt: str, rank: int) -> Iterator[HeldPart]:
        """The part; its memory is not freed inside. Raises NotFound."""
        with self._lock:
            shelf = self._shelves.get((attempt, rank))
            if shelf is None:
                raise NotFound(f"the part of rank {rank} in attempt {attempt} is not held here")
            shelf.num_readers += 1
        try:
            yield shelf.part
        finally:
            with self._lock:
                shelf.num_readers -= 1
                is_free = shelf.is_dropped and not shelf.num_readers
            _release([shelf] if is_free else [])

    def make_room(self, rank: int) -> bool:
        """Drop the oldest of this node's own parts of that rank, if it has several: whether it did.

        For a rank that is about to stage a newer state and has no memory left for it.
        """
        with self._lock:
            parts = [shelf.part for shelf in self._shelves.values() if not shelf.part.of_node]
            of_rank = sorted((part for part in parts if part.label.rank == rank), key=lambda part: part.label.age)
            freed = self._drop([of_rank[0].key] if len(of_rank) > 1 else [])
            found = len(of_rank) > 1
        _release(freed)
        return found

    def prepare(self, label: PartLabel, of_node: str) -> None:
        """Drop, before a copy of that node's part is received, what it will supersede: so no three are in memory."""
        with self._lock:
            of_rank = sorted(
                (
                    shelf.part
                    for shelf in self._shelves.values()
                    if shelf.part.of_node == of_node and shelf.part.label.rank == label.rank
                ),
                key=lambda part: part.label.age,
            )
            freed = self._drop([part.key for part in of_rank[: max(0, len(of_rank) - self._num_states + 1)]])
        _release(freed)

    def drop(self, attempts: Collection[str] | None = None) -> int:
        """Drop the parts of those attempts, or all; how many there were."""
        with self._lock:
            keys = [key for key in self._shelves if attempts is None or key[0] in attempts]
            freed = self._drop(keys)
        _release(freed)
        return len(keys)

    def _superseded(self, of_node: str) -> list[PartKey]:
        """The parts that newer ones of that node have made superfluous."""
        parts = self._parts_of(of_node)
        whole, ages = _whole(parts)
        under_way = [age for age in ages if not whole or age > whole[0]][:_NUM_UNFINISHED]
        kept = {*under_way, *self._kept(parts, whole)[: _NUM_HELD_MAX - len(under_way)]}
        return [part.key for part in parts if part.label.age not in kept]

    def _kept(self, parts: Sequence[HeldPart], whole: Sequence[Age]) -> list[Age]:
        """Of whole states those that are held, what is needed most first."""
        is_copied = {part.label.age: part.is_copied for part in parts}
        copied = [age for age in whole if is_copied[age]][: self._num_states]
        return list(dict.fromkeys([*whole[:1], *copied, *whole[: self._num_states]]))

    def _outlived(self) -> list[PartKey]:
        """The copies of states of which this node's own part is gone."""
        own = self._parts_of("")
        kept = self._kept(own, _whole(own)[0])
        if len(kept) < self._num_states:
            return []
        parts = (shelf.part for shelf in self._shelves.values())
        return [part.key for part in parts if part.of_node and part.label.age < min(kept)]

    def _parts_of(self, of_node: str) -> list[HeldPart]:
        return [shelf.part for shelf in self._shelves.values() if shelf.part.of_node == of_node]

    def _drop(self, keys: Collection[PartKey]) -> list[_Shelf]:
        """Take the parts out; those whose memory nobody reads are the caller's to release, outside of the lock."""
        freed = []
        for key in keys:
            shelf = self._shelves.pop(key, None)
            if shelf is not None:
                shelf.is_dropped = True
                if not shelf.num_readers:
                    freed.append(shelf)
        return freed


def _whole(parts: Sequence[HeldPart]) -> tuple[list[Age], list[Age]]:
    """Of one node's parts, the ages of states that all its ranks have staged, and of all; the newest first."""
    ranks = defaultdict(set)
    for part in parts:
        ranks[part.label.age].add(part.label.rank)
    ages = sorted(ranks, reverse=True)
    newest = ages[0][0] if ages else 0
    expected = {part.label.rank for part in parts if part.label.generation == newest}
    return [age for age in ages if age[0] < newest or ranks[age] >= expected], ages


def _release(shelves: Sequence[_Shelf]) -> None:
    for shelf in shelves:
        shelf.part.release()
