"""A part in the memory of this node, read by another process: it maps that memory, and copies what it needs.

The process that holds the part sends descriptors: of the memories, and before them of one with a sealed document that
says where the pieces of each object lie. What is overwritten while it is read is found by its checksums, as any damage.
"""

from __future__ import annotations

import bisect
import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Sequence

import numpy as np

from storage.errors import Corrupt, NotFound, StorageError, Transient
from storage.format.columns import IntColumn
from storage.format.sealed import Document, seal, unseal
from storage.held.inventory import HeldObject, HeldPart, PartKey
from storage.held.nearest import Nearness

_KIND = "pieces"


class MappedObject(Document):
    """Where the pieces of an object lie: each in a memory, or (-1) among the `inline` bytes that come with this."""

    name: str
    memory: IntColumn
    offset: IntColumn
    length: IntColumn


class PartMap(Document):
    """Where the objects of a part lie. Memory 0 is the `inline` text, those that are sent have the numbers after it."""

    objects: tuple[MappedObject, ...]
    inline_bytes: int


def descriptors_of(part: HeldPart) -> list[int]:
    """New descriptors, the caller's to close: of a document with its short pieces, and of the part's memories."""
    bases = [(_address(memory.memory), memory.memory.nbytes) for memory in part.memories]
    order = sorted(range(len(bases)), key=lambda number: bases[number])
    starts = [bases[number][0] for number in order]
    inline = bytearray()
    objects = []
    for name, held in part.objects.items():
        rows = []
        for piece in held.pieces:
            address = _address(piece)
            at = bisect.bisect_right(starts, address) - 1
            number = order[at] if at >= 0 else -1
            if number >= 0 and address + piece.nbytes <= sum(bases[number]):
                rows.append((number + 1, address - bases[number][0], piece.nbytes))
            else:
                rows.append((0, len(inline), piece.nbytes))
                inline += piece
        numbers, offsets, lengths = zip(*rows, strict=True) if rows else ((), (), ())
        objects.append(
            MappedObject.model_validate({"name": name, "memory": numbers, "offset": offsets, "length": lengths})
        )
    document = seal(_KIND, PartMap(objects=tuple(objects), inline_bytes=len(inline)))
    with contextlib.ExitStack() as on_failure:
        found = [os.memfd_create("elastic-moe-pieces", os.MFD_CLOEXEC)]
        on_failure.callback(_close_all, found)
        with open(found[0], "wb", closefd=False) as file:
            file.write(len(document).to_bytes(8, "little") + document + bytes(inline))
        for memory in part.memories:
            found.append(os.dup(memory.fd))  # noqa: PERF401 - what is made is closed if the next fails
        on_failure.pop_all()
    return found


class MappedPart:
    """The objects of a part, out of descriptors as `descriptors_of` makes them, which are closed. Raises Corrupt."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._maps: list[mmap.mmap] = []
        try:
            first, *others = (self._map(fd) for fd in descriptors)
            size = int.from_bytes(first[:8], "little")
            document = unseal(_KIND, PartMap, bytes(first[8 : 8 + size]), "where a part lies")
            self._memories = [first[8 + size :], *others]
            self.objects = {row.name: HeldObject(self._pieces(row)) for row in document.objects}
        finally:
            _close_all(descriptors)

    def _map(self, fd: int) -> memoryview:
        self._maps.append(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
        return memoryview(self._maps[-1])

    def _pieces(self, row: MappedObject) -> list[memoryview]:
        found = []
        for number, offset, length in zip(row.memory.tolist(), row.offset.tolist(), row.length.tolist(), strict=True):
            if number >= len(self._memories) or offset + length > self._memories[number].nbytes:
                raise Corrupt(f"{row.name} lies outside of the memory that was sent")
            found.append(self._memories[number][offset : offset + length])
        return found


class OwnMemory:
    """This node's memory as a source of bytes: parts are mapped when they are first asked for. Thread-safe.

    `ask`: descriptors of a part from the process that holds it. Raises NotFound, Transient.
    """

    nearness = Nearness.OWN

    def __init__(self, node: str, ask: Callable[[PartKey], Sequence[int]]) -> None:
        self.name = node
        self._ask = ask
        self._lock = threading.Lock()
        self._parts: dict[PartKey, MappedPart | StorageError] = {}

    def read_into(self, part: PartKey, name: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """See `ByteSource.read_into`."""
        held = self._part(part).objects.get(name)
        length = sum(buffer.nbytes for buffer in buffers)
        if held is None or offset + length > held.size_bytes:
            raise NotFound(f"{self.name} does not hold those bytes of {name}")
        copy(held.views(offset, length), buffers)

    def _part(self, key: PartKey) -> MappedPart:
        with self._lock:
            if key not in self._parts:
                try:
                    self._parts[key] = MappedPart(self._ask(key))
                except StorageError as error:
                    self._parts[key] = error
                except OSError as error:
                    self._parts[key] = Transient(f"the memory of {self.name} cannot be mapped: {error}")
            found = self._parts[key]
        if isinstance(found, StorageError):
            raise found
        return found


def copy(views: Sequence[memoryview], buffers: Sequence[memoryview]) -> None:
    """Copy the views, laid end to end, into the buffers, which are as long together. Other threads run meanwhile."""
    rest = list(buffers)[::-1]
    into = 0
    for view in views:
        at = 0
        while at < view.nbytes:
            length = min(view.nbytes - at, rest[-1].nbytes - into)
            np.copyto(np.frombuffer(rest[-1], np.uint8, length, into), np.frombuffer(view, np.uint8, length, at))
            at, into = at + length, into + length
            if into == rest[-1].nbytes:
                rest.pop()
                into = 0


def _close_all(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data) if view.nbytes else 0
