"""Carry a read plan out: requests in parallel, checksums before any byte counts as read."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from storage.errors import Cause, Corrupt, NotFound
from storage.format.checksum import crc32c
from storage.format.index import Columns, Index
from storage.format.zips import RunningSum, check_zip
from storage.loading.readplan import Part, Segment
from storage.stores.objects import ObjectStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traffic:
    """What reading cost: of the store, and of the other ranks."""

    num_requests: int = 0
    fetched_bytes: int = 0
    received_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.num_requests + other.num_requests,
            self.fetched_bytes + other.fetched_bytes,
            self.received_bytes + other.received_bytes,
        )


class Pins:
    """Which version of each object a reader has met first; it wants no other one from then on. Thread-safe.

    Parts that are asked for before the first answer is there are asked for unpinned, and compared when they come.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._etags: dict[str, str] = {}

    def of(self, key: str) -> str | None:
        """The etag to ask for; None as long as none is known."""
        with self._lock:
            return self._etags.get(key)

    def met(self, key: str, etag: str) -> None:
        """Bytes of that version have come; "" says nothing. Raises Corrupt if it is not the first one."""
        if etag:
            with self._lock:
                first = self._etags.setdefault(key, etag)
            if etag != first:
                raise Corrupt(f"{key} changed while it was read", key)


@dataclass(frozen=True)
class Source:
    """A checkpoint's data objects. `sums`: of the long items of stock DCP, by item.

    All that is read of one object through one `pins` is of one version of it, where the store tells versions apart.
    """

    store: ObjectStore
    index: Index
    sums: Mapping[int, RunningSum] = field(default_factory=dict)
    pins: Pins = field(default_factory=Pins)

    def fetch(self, part: Part, memories: Sequence[memoryview]) -> None:
        """Fill the memory of each of the part's segments, and verify it.

        Damage counts when it is read twice: the way to here may have flipped a bit. Raises Corrupt.
        """
        self._read(part, memories)
        try:
            self.verify(part, memories)
        except Corrupt as error:
            self._read(part, memories)
            self.verify(part, memories)
            self.store.retries.add(Cause.DAMAGED, 0.0)
            log.warning("read again, %s is whole; the first time: %s", self._key(part), error)

    def _read(self, part: Part, memories: Sequence[memoryview]) -> None:
        views, end = [], part.start
        for segment, memory in zip(part.segments, memories, strict=True):
            views += [scratch(segment.start - end), memory]
            end = segment.stop
        views.append(scratch(part.stop - end))
        self._read_into(self._key(part), part.start, [view for view in views if view.nbytes])

    def verify(self, part: Part, memories: Sequence[memoryview]) -> None:
        """Compare the segments with their checksums, or add them to the sums of their items. Raises Corrupt.

        The sums are for the end, when all parts have come: which of them was damaged, nobody can tell.
        """
        key = self._key(part)
        self.add_to_sums(part, memories)
        for segment, memory in zip(part.segments, memories, strict=True):
            if self.index.is_long(segment.item):
                continue  # verified as a whole, by its sum or by what takes it
            if self.index.is_stock:
                with blaming(key):
                    check_zip(memory, f"{key} at byte {segment.start}")
            else:
                _verify(self.index.columns, segment, memory, key)

    def add_to_sums(self, part: Part, memories: Sequence[memoryview]) -> None:
        """Add the segments of long items of stock DCP to the sums of those."""
        for segment, memory in zip(part.segments, memories, strict=True):
            if segment.item in self.sums:
                self.sums[segment.item].add(segment.item_start, memory)

    def read(self, item: int, start: int, size_bytes: int) -> memoryview:
        """Bytes of the item's object from `start` on, unverified. Raises Corrupt."""
        memory = scratch(size_bytes)
        key = self.index.prefix + self.index.objects[int(self.index.columns.object[item])].name
        self._read_into(key, start, [memory])
        return memory

    def _read_into(self, key: str, start: int, views: Sequence[memoryview]) -> None:
        with blaming(key):
            self.pins.met(key, self.store.read_into(key, start, views, if_match=self.pins.of(key)))

    def _key(self, part: Part) -> str:
        return self.index.prefix + self.index.objects[part.object].name


@contextlib.contextmanager
def blaming(key: str) -> Iterator[None]:
    """Damage found inside is damage of the data object `key`, and so is its absence. Raises Corrupt."""
    try:
        yield
    except NotFound:
        raise Corrupt(f"{key} is missing", key) from None
    except Corrupt as error:
        raise Corrupt(str(error), key) from error


def scratch(size_bytes: int) -> memoryview:
    """Memory of nobody else's."""
    return memoryview(np.empty(size_bytes, np.uint8))  # type: ignore[arg-type]


def _verify(columns: Columns, segment: Segment, memory: memoryview, name: str) -> None:
    size, first = int(columns.block_size_bytes[segment.item]), int(columns.first_crc[segment.item])
    expected = columns.crcs[first + segment.first_block : first + segment.last_block].tolist()
    for index, crc in enumerate(expected):
        if crc32c(memory[index * size : (index + 1) * size]) != crc:
            raise Corrupt(f"{name} is damaged: checksum at byte {segment.start + index * size} does not match", name)
