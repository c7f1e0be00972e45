"""A checkpoint's data objects, read in parts: checksums before any byte counts as read."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from storage.errors import Corrupt, NotFound
from storage.format.index import Index
from storage.stores.objects import ObjectStore
from storage.verified.readplan import ItemPlace, Part, bites
from storage.verified.twice import read_verified
from storage.verified.verifiers import (
    BlockSums,
    BlockVerifier,
    ObjectVerifier,
    StreamedZipVerifier,
    Verifier,
    ZipVerifier,
)

if TYPE_CHECKING:
    from storage.format.stock import Layout  # needs torch

log = logging.getLogger(__name__)

_Map = Callable[[Callable[[int], "Layout | None"], Iterable[int]], Iterable["Layout | None"]]

_NUM_SHOWN = 3


class InsteadOf(Protocol):
    """Gives memory to read into in place of some, which holds what was read once the context has ended well.

    `in_place`: it must be that memory itself.
    """

    def __call__(
        self, memories: Sequence[memoryview], *, in_place: bool = False
    ) -> AbstractContextManager[Sequence[memoryview]]: ...


def _as_they_are(
    memories: Sequence[memoryview], *, in_place: bool = False
) -> AbstractContextManager[Sequence[memoryview]]:
    return contextlib.nullcontext(memories)


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
    """A checkpoint's data objects, and a verifier for each item.

    `layouts`: of the items that can be judged only as a whole, what was seen of where their tensors lie (`looked_at`).
    All that is read of one object through one `pins` is of one version of it, where the store tells versions apart.
    """

    store: ObjectStore
    index: Index
    layouts: Mapping[int, Layout | None] = field(default_factory=dict)
    pins: Pins = field(default_factory=Pins)
    _joint: dict[int, Verifier] = field(default_factory=dict)

    def joint(self, items: Sequence[int]) -> list[int]:
        """Those of the items that can be judged only as a whole: of several blocks, none of which has a checksum."""
        columns, rows = self.index.columns, np.asarray(items, np.int64)
        is_long = columns.length[rows] > columns.block_size_bytes[rows]
        return rows[is_long & (columns.num_crcs[rows] == 0)].tolist()  # type: ignore[no-any-return]

    def looked_at(self, items: Sequence[int], run: _Map) -> tuple[Source, Traffic]:
        """The same source, once both ends of those of the items were looked at that can be judged only as a whole: they
        say where a tensor's bytes lie, so that it need not be in memory as a whole.

        `run` is `map`, or one that calls on several threads. Raises Corrupt: one's object is missing or ends before it.
        And what the store raises.
        """
        joint = self.joint(items)
        if not joint:
            return self, Traffic()
        from storage.format.stock import END_SIZE_BYTES

        layouts = dict(zip(joint, run(self._look, joint), strict=True))
        cost = Traffic(2 * len(joint), 2 * END_SIZE_BYTES * len(joint))
        return dataclasses.replace(self, layouts=layouts, _joint={}), cost

    def _look(self, item: int) -> Layout | None:
        from storage.format.stock import look

        columns, offset = self.index.columns, int(self.index.columns.offset[item])
        layout = look(lambda start, size: self.read(item, offset + start, size), int(columns.length[item]))
        if layout is not None and layout.sizes == tuple(columns.sizes[item, : len(layout.sizes)].tolist()):
            return layout
        log.warning(
            "%s at byte %d is no plain tensor; all of it is read into memory", self.index.object_of(item), offset
        )
        return None

    def verifier(self, item: int) -> Verifier:
        """What the item's bytes must be. One that judges an item as a whole is the same whenever it is asked for."""
        if item not in self.layouts:
            return self._verifier(item)
        return self._joint.get(item) or self._joint.setdefault(item, self._verifier(item))

    def _verifier(self, item: int) -> Verifier:
        columns, key = self.index.columns, self.index.object_of(item)
        start, num_crcs = int(columns.offset[item]), int(columns.num_crcs[item])
        stop = start + int(columns.length[item])
        if num_crcs:
            first = int(self.index.first_crc[item])
            starts = range(start, stop, int(columns.block_size_bytes[item]))
            return BlockVerifier(key, BlockSums(starts, stop, columns.crcs[first : first + num_crcs]))
        layout = self.layouts.get(item)
        if layout is not None:
            return StreamedZipVerifier(key, start + layout.start, start + layout.stop, layout.crc32)
        return ZipVerifier(key, start, stop, is_joint=item in self.layouts)

    def object_verifier(self, number: int) -> ObjectVerifier:
        """What the bytes of data object `number` must be, in whatever parts they come. Raises Corrupt."""
        items = self.index.items_by_object()[number].tolist()
        source, _ = self.looked_at(items, map)
        found: list[tuple[int, int, Verifier]] = []
        for item in items:
            place, verifier = self.place(item), source.verifier(item)
            stop = place.offset + place.length
            if isinstance(verifier, ZipVerifier):  # may lie in several parts, however short it is
                verifier = ZipVerifier(self.index.object_of(item), place.offset, stop, is_joint=True)
            found.append((place.offset, stop, verifier))
        return ObjectVerifier(found)

    def place(self, item: int) -> ItemPlace:
        """Where the item lies, as plans know it."""
        columns = self.index.columns
        rows = (columns.object, columns.offset, columns.length, columns.block_size_bytes)
        return ItemPlace(*(int(column[item]) for column in rows))

    def fetch(self, part: Part, memories: Sequence[memoryview], instead_of: InsteadOf = _as_they_are) -> None:
        """Fill the memory of each of the part's segments, and verify it as far as its items' bytes have come.

        `instead_of`: gives the memory to read into. Raises Corrupt: something is missing, or damaged when it is read
        twice.
        """
        key = self._key(part)

        def read() -> None:
            size_bytes = self.store.bite_bytes(key)
            if size_bytes is None:
                self._fill(part, memories, instead_of)
                return
            for bite, places in bites(part, self._block_size_bytes, size_bytes):
                self._fill(bite, [memories[number][start:stop] for number, start, stop in places], instead_of)

        read_verified(self.store, key, read)

    def _fill(self, part: Part, memories: Sequence[memoryview], instead_of: InsteadOf) -> None:
        is_joint = any(segment.item in self.layouts for segment in part.segments)  # looked at until all has come
        with instead_of(memories, in_place=is_joint) as views:
            self._read(part, views)
            self.verify(part, views)

    def _block_size_bytes(self, item: int) -> int:
        return int(self.index.columns.block_size_bytes[item])

    def _read(self, part: Part, memories: Sequence[memoryview]) -> None:
        views, end = [], part.start
        for segment, memory in zip(part.segments, memories, strict=True):
            views += [scratch(segment.start - end), memory]
            end = segment.stop
        views.append(scratch(part.stop - end))
        self._read_into(self._key(part), part.start, [view for view in views if view.nbytes])

    def verify(self, part: Part, memories: Sequence[memoryview], *, is_trusted: bool = False) -> None:
        """Give the segments to their items' verifiers. Raises Corrupt, which names some of what is damaged.

        `is_trusted`: another rank has found them whole; only what is judged as a whole has to be seen here, too.
        """
        damaged: list[tuple[int, Corrupt]] = []
        for segment, memory in zip(part.segments, memories, strict=True):
            verifier = self.verifier(segment.item)
            try:
                if verifier.is_joint or not is_trusted:
                    verifier.take(segment.start, memory)
            except Corrupt as error:
                damaged.append((segment.item, error))
        if damaged:
            shown = "; ".join(f"{error} (in {self.index.key_of(item)!r})" for item, error in damaged[:_NUM_SHOWN])
            more = f"; and {len(damaged) - _NUM_SHOWN} more" if len(damaged) > _NUM_SHOWN else ""
            raise Corrupt(shown + more, self._key(part))

    def read(self, item: int, start: int, size_bytes: int) -> memoryview:
        """Bytes of the item's object from `start` on, unverified. Raises Corrupt."""
        memory = scratch(size_bytes)
        self._read_into(self.index.object_of(item), start, [memory])
        return memory

    def _read_into(self, key: str, start: int, views: Sequence[memoryview]) -> None:
        with blaming(key):
            self.pins.met(key, self.store.read_into(key, start, views, if_match=self.pins.of(key)))

    def key_of(self, number: int) -> str:
        """The key of data object `number`."""
        return self.index.prefix + self.index.objects[number].name

    def _key(self, part: Part) -> str:
        return self.key_of(part.object)


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
    """Fresh memory of so many bytes."""
    return memoryview(np.empty(size_bytes, np.uint8))  # type: ignore[arg-type]
