"""A part in the memory of this node, read by another process: it is sent descriptors of that memory.

The process that holds the part sends descriptors: of the memories, and before them of one with a sealed document that
says where the pieces of each object lie. What is overwritten while it is read is found by its checksums, as any damage.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from storage.arena.memory_file import memory_of
from storage.errors import Corrupt, NotFound, StorageError, Transient
from storage.format.columns import IntColumn
from storage.format.sealed import Document, seal, unseal
from storage.held.inventory import HeldObject, HeldPart, Memory, PartKey
from storage.held.nearest import Nearness
from storage.stores.buffers import address_of, size_of, skip, split

_NUM_VIEWS_AT_ONCE = 512  # of a preadv: IOV_MAX is 1024
_KIND = "pieces"


class PlacedObject(Document):
    """Where the pieces of an object lie: each in a memory, of which number 0 is the `inline` bytes."""

    name: str
    memory: IntColumn
    offset: IntColumn
    length: IntColumn


class PartMap(Document):
    """Where the objects of a part lie. Memory 0 is the `inline` text, those that are sent have the numbers after it."""

    objects: tuple[PlacedObject, ...]
    inline_bytes: int


def descriptors_of(part: HeldPart) -> list[int]:
    """New descriptors, the caller's to close: of a document with its short pieces, and of the part's memories."""
    bases = [(address_of(memory.memory), memory.memory.nbytes) for memory in part.memories]
    order = sorted(range(len(bases)), key=lambda number: bases[number])
    starts = [bases[number][0] for number in order]
    inline = bytearray()
    objects = []
    for name, held in part.objects.items():
        rows = []
        for piece in held.pieces:
            address = address_of(piece)
            at = bisect.bisect_right(starts, address) - 1
            number = order[at] if at >= 0 else -1
            if number >= 0 and address + piece.nbytes <= sum(bases[number]):
                rows.append((number + 1, address - bases[number][0], piece.nbytes))
            else:
                rows.append((0, len(inline), piece.nbytes))
                inline += piece
        numbers, offsets, lengths = zip(*rows, strict=True) if rows else ((), (), ())
        objects.append(
            PlacedObject.model_validate({"name": name, "memory": numbers, "offset": offsets, "length": lengths})
        )
    document = seal(_KIND, PartMap(objects=tuple(objects), inline_bytes=len(inline)))
    with contextlib.ExitStack() as on_failure:
        found = [memory_of("elastic-moe-pieces", len(document).to_bytes(8, "little") + document + bytes(inline))]
        on_failure.callback(_close_all, found)
        for memory in part.memories:
            found.append(os.dup(memory.fd))  # noqa: PERF401 - what is made is closed if the next fails
        on_failure.pop_all()
    return found


def objects_from(
    descriptors: Sequence[int], open_memory: Callable[[int], Memory]
) -> tuple[dict[str, HeldObject], tuple[Memory, ...]]:
    """What `descriptors_of` was made of, by who holds it from here on: the objects, and the memories that they lie in.

    `open_memory`: over a descriptor, which is its own then. Raises Corrupt, ValueError, OSError: all are closed.
    """
    with contextlib.ExitStack() as on_failure:
        left = list(descriptors)
        on_failure.callback(lambda: _close_all(left))
        if not left:
            raise Corrupt("nothing was sent of where a part lies")
        data = os.pread(left[0], os.fstat(left[0]).st_size, 0)
        begin = 8 + int.from_bytes(data[:8], "little")
        document = unseal(_KIND, PartMap, data[8:begin], "where a part lies")
        os.close(left.pop(0))
        memories: list[Memory] = []
        while left:
            memories.append(open_memory(left.pop(0)))
            on_failure.callback(memories[-1].close)
        places = [memoryview(data)[begin:], *(memory.memory for memory in memories)]
        rooms, found = [place.nbytes for place in places], dict[str, HeldObject]()
        for row in document.objects:
            pieces = _Pieces.of(row, rooms)
            spans = zip(pieces.memories, pieces.offsets, itertools.pairwise(pieces.starts), strict=True)
            found[row.name] = HeldObject([places[m][at : at + stop - start] for m, at, (start, stop) in spans])
        on_failure.pop_all()
    return found, tuple(memories)


class OwnPart:
    """The objects of a part, read through descriptors as `descriptors_of` makes them, which are its own from here on.

    Nothing is mapped: the kernel copies faster than it enters page by page into this process's tables, and memory that
    its holder has made smaller is a short read and no SIGBUS.

    Raises:
        Corrupt: they are no part's.
    """

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._fds = list(descriptors)
        self.close = weakref.finalize(self, _close_all, self._fds)
        try:
            sizes = [os.fstat(fd).st_size for fd in self._fds]
            length = min(int.from_bytes(os.pread(self._fds[0], 8, 0), "little"), sizes[0])
            document = unseal(_KIND, PartMap, os.pread(self._fds[0], length, 8), "where a part lies")
            self._begins = [8 + length, *(0 for _ in sizes[1:])]  # of the memories, in their files
            rooms = [size - begin for size, begin in zip(sizes, self._begins, strict=True)]
            self._objects = {row.name: _Pieces.of(row, rooms) for row in document.objects}
        except BaseException:
            self.close()
            raise

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers with bytes of an object. Other threads run meanwhile. Raises NotFound, OSError."""
        found, stop = self._objects.get(name), offset + size_of(buffers)
        if found is None or stop > found.starts[-1]:
            raise NotFound(f"bytes {offset} to {stop} of {name} are not held")
        number, at, rest = max(bisect.bisect_right(found.starts, offset) - 1, 0), offset, list(buffers)
        while at < stop:
            end = min(stop, found.starts[number + 1])
            views, rest = split(rest, end - at)
            memory = found.memories[number]
            place = self._begins[memory] + found.offsets[number] + at - found.starts[number]
            self._fill(self._fds[memory], place, views)
            at, number = end, number + 1

    def _fill(self, fd: int, place: int, views: list[memoryview]) -> None:
        while views:
            num_bytes = os.preadv(fd, views[:_NUM_VIEWS_AT_ONCE], place)
            if not num_bytes:
                raise NotFound("the memory that was sent has become shorter")
            views, place = skip(views, num_bytes), place + num_bytes


@dataclass(frozen=True)
class _Pieces:
    """Where an object lies: piece i of it begins at `starts[i]`, and at `offsets[i]` of memory number `memories[i]`."""

    starts: list[int]
    memories: list[int]
    offsets: list[int]

    @classmethod
    def of(cls, row: PlacedObject, rooms: Sequence[int]) -> _Pieces:
        """What the document says, if it is within memories of those sizes. Raises Corrupt."""
        memories, offsets, lengths = row.memory.tolist(), row.offset.tolist(), row.length.tolist()
        for memory, offset, length in zip(memories, offsets, lengths, strict=True):
            if not 0 <= memory < len(rooms) or offset < 0 or length < 0 or offset + length > rooms[memory]:
                raise Corrupt(f"{row.name} lies outside of the memory that was sent")
        return cls(list(itertools.accumulate(lengths, initial=0)), memories, offsets)


class OwnMemory:
    """This node's memory as a source of bytes: a part's descriptors are asked for with its first byte. Thread-safe.

    `ask`: descriptors of a part from the process that holds it. Raises NotFound, Transient.
    """

    nearness = Nearness.OWN

    def __init__(self, node: str, ask: Callable[[PartKey], Sequence[int]]) -> None:
        self.name = node
        self._ask = ask
        self._lock = threading.Lock()
        self._parts: dict[PartKey, OwnPart | StorageError] = {}

    def read_into(self, part: PartKey, name: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """See `ByteSource.read_into`."""
        try:
            self._part(part).read_into(name, offset, buffers)
        except OSError as error:
            raise Transient(f"the memory of {self.name} cannot be read: {error}") from None

    def close(self) -> None:
        """Let go of the memory; nobody reads any more. Closing twice is harmless."""
        with self._lock:
            parts, self._parts = list(self._parts.values()), {}
        for part in parts:
            if isinstance(part, OwnPart):
                part.close()

    def _part(self, key: PartKey) -> OwnPart:
        with self._lock:
            if key not in self._parts:
                try:
                    self._parts[key] = OwnPart(self._ask(key))
                except StorageError as error:
                    self._parts[key] = error
                except OSError as error:
                    self._parts[key] = Transient(f"the memory of {self.name} cannot be read: {error}")
            found = self._parts[key]
        if isinstance(found, StorageError):
            raise found
        return found


def _close_all(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)
