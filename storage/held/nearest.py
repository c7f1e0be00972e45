"""A store whose data objects are read from memory where a node holds them, the nearest first, and else from behind it.

What comes from memory is verified as what comes from the store is, by whoever reads. A source that fails, or whose
bytes turn out to be damaged (`doubt`), is told and left out, and the next one is read.
"""

from __future__ import annotations

import bisect
import enum
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from storage.errors import NotFound, StorageError
from storage.format import layout
from storage.held.choice import Twins
from storage.held.inventory import PartKey
from storage.stores.buffers import size_of, split
from storage.stores.objects import Capability, ObjectStore
from storage.stores.wrapper import StoreWrapper


class Nearness(enum.StrEnum):
    """Where a byte came from, the nearest first."""

    OWN = "own"
    """The memory of this node."""
    PEER = "peer"
    """Another node's."""
    STORE = "store"


_BITE_BYTES = 4 * 1024 * 1024
_NUM_READERS_MAX = 4  # from there on threads only take turns
_TURN_BYTES = 4 * 1024 * 1024


class ByteSource(Protocol):
    """The memory of one node, as seen from a rank. Thread-safe."""

    @property
    def nearness(self) -> Nearness:
        """How near it is."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def read_into(self, part: PartKey, name: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers with bytes of the object of that part; `name` is relative to its step's folder.

        Raises:
            NotFound: the node does not hold it any more.
            StorageError: of any other kind: nothing comes from that node.
        """


Tell = Callable[[ByteSource, str], None]
"""Hears of a source that is left out from now on, and why."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where some bytes lie: in an object, from an offset on."""

    part: PartKey
    name: str
    offset: int


class Places:
    """Under which names the bytes of objects are held. Pure.

    An object is held under its own name, and what of it has twins under theirs as well.
    """

    def __init__(self, twins: Iterable[Twins] = ()) -> None:
        self._twins: dict[str, list[Twins]] = defaultdict(list)
        for row in sorted(twins, key=lambda row: (row.name, row.start)):
            self._twins[row.name].append(row)

    def of(self, name: str, start: int, stop: int) -> Iterator[tuple[int, list[_Place]]]:
        """Cut [start, stop) of an object where others hold it too: by piece its end, and its places."""
        rows = self._twins.get(name, [])
        at = start
        number = max(bisect.bisect_right(rows, start, key=lambda row: row.start) - 1, 0)
        while at < stop:
            while number < len(rows) and rows[number].start + rows[number].length <= at:
                number += 1
            row = rows[number] if number < len(rows) else None
            own = list(_place(name, at))
            if row is None or row.start >= stop:
                yield stop, own
                return
            if row.start > at:
                yield row.start, own
                at = row.start
                continue
            end = min(stop, row.start + row.length)
            shifted = [(other, offset + at - row.start) for other, offset in row.others]
            yield end, [*own, *(place for other in shifted for place in _place(*other))]
            at = end


def _place(name: str, offset: int) -> Iterator[_Place]:
    part = layout.parse_data_name(name)
    if part is not None:
        yield _Place(part, name, offset)


@dataclass(frozen=True, slots=True)
class Reach:
    """Where else a checkpoint is that nodes hold, and who else reads it.

    `is_stored`: the store has it as well; else nothing is asked of that. `is_everywhere`: every node of the job holds
    all of it; all ranks must be told the same. `num_ranks_here`: so many ranks of this host read at once.
    """

    is_stored: bool
    is_everywhere: bool = False
    num_ranks_here: int = 1


class NearestStore(StoreWrapper):
    """`store`, with the data objects below `prefix` read from the nearest of the nodes that hold them.

    Args:
        store: what everything else is read from.
        prefix: the checkpoint's folder.
        holders: by part the nodes that hold it, the nearest first.
        places: under which names bytes are held.
        tell: hears of sources that are left out.
        reach: where else it is, and who else reads it.
    """

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        holders: Mapping[PartKey, Sequence[ByteSource]],
        places: Places,
        tell: Tell,
        reach: Reach,
    ) -> None:
        super().__init__(store)
        self._prefix = prefix
        self._holders = holders
        self._places = places
        self._tell = tell
        self._reach = reach
        self._lock = threading.Lock()
        self._lost: set[int] = set()  # sources by id: nothing comes from them
        self._left_out: set[tuple[int, PartKey]] = set()  # what of a source is gone, or damaged
        self._bytes: Counter[Nearness] = Counter()
        self._last = threading.local()

    @property
    def num_bytes_by(self) -> Mapping[Nearness, int]:
        """How many bytes have come from where."""
        with self._lock:
            return dict(self._bytes)

    def can(self, capability: Capability) -> bool:
        """See `ObjectStore.can`. What a node holds is its host's cache."""
        if capability in (Capability.HOST_CACHE, Capability.ON_EVERY_HOST) and self._reach.is_everywhere:
            return True
        return self._store.can(capability)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        """See `ObjectStore.read_into`. It tells the version only of what comes from the store as a whole."""
        size_bytes, etag = size_of(buffers), ""
        served: set[tuple[ByteSource, PartKey]] = set()
        self._last.served = {key: served}
        name = key.removeprefix(self._prefix)
        if not key.startswith(self._prefix) or layout.parse_data_name(name) is None:
            return self._store.read_into(key, offset, buffers, if_match=if_match)
        at, rest = offset, list(buffers)
        for stop, places in self._places.of(name, offset, offset + size_bytes):
            piece, rest = split(rest, stop - at)
            found = self._read_near(places, piece)
            if found is None:
                etag = self._read_far(key, at, piece, if_match)
            else:
                served.add(found)
            at = stop
        return "" if served else etag

    def bite_bytes(self, key: str) -> int | None:
        """See `ObjectStore.bite_bytes`: small ones out of memory."""
        return self._store.bite_bytes(key) if self._nearest(key) is None else _BITE_BYTES

    def num_readers(self, key: str) -> int | None:
        """See `ObjectStore.num_readers`. Of this node's memory each rank has its share of the processors."""
        nearest, num_cpus = self._nearest(key), len(os.sched_getaffinity(0))
        if nearest is None:
            return self._store.num_readers(key)
        num_free = num_cpus // self._reach.num_ranks_here if nearest.nearness is Nearness.OWN else num_cpus
        return max(1, min(num_free, _NUM_READERS_MAX))

    def _nearest(self, key: str) -> ByteSource | None:
        places = next(iter(self._places.of(key.removeprefix(self._prefix), 0, 1)), (0, []))[1]
        return next((source for source, _ in self._options(places) if not self._is_lost(source)), None)

    def doubt(self, key: str, reason: str) -> bool:
        """See `ObjectStore.doubt`."""
        served: Collection[tuple[ByteSource, PartKey]] = getattr(self._last, "served", {}).pop(key, ())
        for source, part in served:
            self._leave_out(source, part, reason)
        return bool(served) or self._store.doubt(key, reason)

    def _read_near(self, places: Sequence[_Place], buffers: Sequence[memoryview]) -> tuple[ByteSource, PartKey] | None:
        """Fill the buffers from the nearest source that can, and return it with what was read of it."""
        for source, place in self._options(places):
            with self._lock:
                if id(source) in self._lost or (id(source), place.part) in self._left_out:
                    continue
            try:
                source.read_into(place.part, place.name, place.offset, buffers)
            except NotFound as error:
                self._leave_out(source, place.part, str(error))
            except StorageError as error:
                self._lose(source, str(error))
            else:
                with self._lock:
                    self._bytes[source.nearness] += size_of(buffers)
                return source, place.part
        return None

    def _options(self, places: Sequence[_Place]) -> list[tuple[ByteSource, _Place]]:
        """Who has those bytes, and where, the nearest first; of several other nodes they take turns to be the first."""
        found = [(source, place) for place in places for source in self._holders.get(place.part, ())]
        own = [option for option in found if option[0].nearness is Nearness.OWN]
        others = [option for option in found if option[0].nearness is not Nearness.OWN]
        turn = places[0].offset // _TURN_BYTES % len(others) if others else 0
        return [*own, *others[turn:], *others[:turn]]

    def _is_lost(self, source: ByteSource) -> bool:
        with self._lock:
            return id(source) in self._lost

    def _read_far(self, key: str, offset: int, buffers: Sequence[memoryview], if_match: str | None) -> str:
        if not self._reach.is_stored:
            raise NotFound(f"{key} was only in the memory of nodes, and none of them has it any more")
        etag = self._store.read_into(key, offset, buffers, if_match=if_match)
        with self._lock:
            self._bytes[Nearness.STORE] += size_of(buffers)
        return etag

    def _leave_out(self, source: ByteSource, part: PartKey, reason: str) -> None:
        with self._lock:
            is_news = (id(source), part) not in self._left_out
            self._left_out.add((id(source), part))
        if is_news:
            self._tell(source, reason)

    def _lose(self, source: ByteSource, reason: str) -> None:
        with self._lock:
            is_news = id(source) not in self._lost
            self._lost.add(id(source))
        if is_news:
            self._tell(source, reason)
