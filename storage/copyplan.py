"""What is copied of a checkpoint, and how its bytes are checked while they pass. Pure but for a lock."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storage.checksum import combine, crc32c
from storage.errors import Corrupt, NoCheckpoint
from storage.manifest import ItemEntry, Manifest


@dataclass(frozen=True)
class Blocks:
    """Blocks that make up an object without gaps: where each starts, and its CRC32C."""

    size_bytes: int
    starts: Sequence[int]
    crcs: Sequence[int]

    def span(self, index: int) -> tuple[int, int]:
        """Where a block starts and ends."""
        last = index + 1 == len(self.starts)
        return self.starts[index], self.size_bytes if last else self.starts[index + 1]


@dataclass(frozen=True)
class DataObject:
    """One object to copy; `name` is below the checkpoint's folder. Without `blocks` nothing says what it must hold."""

    name: str
    size_bytes: int
    blocks: Blocks | None


def objects_of(manifest: Manifest) -> list[DataObject]:
    """The data objects with the checksums of every byte of them.

    Raises:
        Corrupt: the manifest does not cover a byte, or its checksums do not fit each other.
    """
    items: list[list[ItemEntry]] = [[] for _ in manifest.objects]
    for item in manifest.items.rows():
        items[item.object].append(item)
    return [
        DataObject(entry.name, entry.size_bytes, _blocks(entry.name, entry.size_bytes, own))
        for entry, own in zip(manifest.objects, items, strict=True)
    ]


def _blocks(name: str, size_bytes: int, items: Sequence[ItemEntry]) -> Blocks:
    starts: list[int] = []
    crcs: list[int] = []
    end = 0
    for item in sorted(items, key=lambda item: item.offset):
        if item.offset != end:
            raise Corrupt(f"{name}: bytes {end} to {item.offset} belong to no item")
        whole = 0
        for number, crc in enumerate(item.blocks()):
            start = number * item.block_size_bytes
            starts.append(item.offset + start)
            crcs.append(crc)
            whole = combine(whole, crc, min(item.block_size_bytes, item.length - start))
        if whole != item.crc32c:
            raise Corrupt(f"{name}: the checksums of {item.key!r} do not fit each other")
        end = item.offset + item.length
    if end != size_bytes:
        raise Corrupt(f"{name}: bytes {end} to {size_bytes} belong to no item")
    return Blocks(size_bytes, starts, crcs)


def choose(steps: Sequence[int], where: str, step: int | None, last: int | None) -> list[int]:
    """Which of the committed `steps` (newest first) to copy: one, the newest `last`, or all. Raises NoCheckpoint."""
    if step is not None and step not in steps:
        raise NoCheckpoint(f"step {step} is not committed in {where}; there are: {', '.join(map(str, steps))}")
    if step is not None:
        return [step]
    return list(steps[:last])


class BlockCheck:
    """Compares the parts of one object with the checksums of its blocks. Thread-safe; the parts come in any order.

    A block that lies in several parts is compared when the last of them has come. A part may come again.
    """

    def __init__(self, key: str, blocks: Blocks) -> None:
        self._key = key
        self._blocks = blocks
        self._lock = threading.Lock()
        self._pieces: dict[int, dict[int, tuple[int, int]]] = {}

    def take(self, offset: int, part: memoryview) -> None:
        """Look at the bytes from `offset` on. Raises Corrupt."""
        for index, low, high in self._touched(offset, offset + part.nbytes):
            start, stop = self._blocks.span(index)
            crc = crc32c(part[low - offset : high - offset])
            whole = crc if (low, high) == (start, stop) else self._joined(index, low, high, crc)
            if whole not in (None, self._blocks.crcs[index]):
                raise Corrupt(f"{self._key} is damaged: checksum at byte {start} does not match", self._key)

    def _touched(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Blocks that have bytes in [start, stop), each with which."""
        index = bisect_right(self._blocks.starts, start) - 1
        while start < stop:
            end = min(self._blocks.span(index)[1], stop)
            yield index, start, end
            start, index = end, index + 1

    def _joined(self, index: int, low: int, high: int, crc: int) -> int | None:
        """The block's CRC32C once all of its pieces are there."""
        at, stop = self._blocks.span(index)
        with self._lock:
            pieces = self._pieces.setdefault(index, {})
            pieces[low] = (high - low, crc)
            whole = 0
            while at in pieces:
                length, piece = pieces[at]
                whole = combine(whole, piece, length)
                at += length
            return whole if at == stop else None
