"""What is copied of a checkpoint, and how its bytes are checked while they pass. Pure but for a lock."""

from __future__ import annotations

import base64
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.errors import Corrupt, NoCheckpoint
from storage.format.checksum import combine_crc32c, crc32c
from storage.format.manifest import Manifest


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks that make up an object without gaps: where each starts, ascending, and its CRC32C."""

    size_bytes: int
    starts: npt.NDArray[np.int64]
    crcs: npt.NDArray[np.uint32]

    def span(self, index: int) -> tuple[int, int]:
        """Where a block starts and ends."""
        last = index + 1 == len(self.starts)
        return int(self.starts[index]), self.size_bytes if last else int(self.starts[index + 1])


@dataclass(frozen=True)
class DataObject:
    """One object to copy; `name` is below the checkpoint's folder."""

    name: str
    size_bytes: int


class Checksums:
    """What a manifest says of the bytes of each data object.

    The blocks of an object are made when they are asked for: of small items they take 12 bytes for each 16 KiB.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Raises Corrupt: a byte of an object belongs to no item, or to several."""
        table = self._items = manifest.items
        self._objects = manifest.objects
        order = np.lexsort((table.offset, table.object))
        bounds = np.searchsorted(table.object[order], np.arange(len(manifest.objects) + 1))
        self._rows = [order[low:high] for low, high in itertools.pairwise(bounds.tolist())]
        for entry, rows in zip(manifest.objects, self._rows, strict=True):
            ends = table.offset[rows] + table.length[rows]
            starts = np.append(table.offset[rows], entry.size_bytes)
            expected = np.insert(ends, 0, 0)
            if (wrong := np.flatnonzero(starts != expected)).size:
                end, start = int(expected[wrong[0]]), int(starts[wrong[0]])
                raise Corrupt(f"{entry.name}: bytes {end} to {start} belong to no item")

    def blocks(self, number: int) -> Blocks:
        """Of the manifest's object of that number. Raises Corrupt: there are too many for an item, or too few."""
        table, rows, entry = self._items, self._rows[number], self._objects[number]
        sizes = table.block_size_bytes[rows]
        counts = -(-table.length[rows] // sizes)
        packed = [base64.b64decode(table.block_crcs[row]) for row in rows.tolist()]
        if [len(crcs) for crcs in packed] != (4 * counts).tolist():
            raise Corrupt(f"{entry.name}: the block checksums of an item do not fit its length")
        firsts = np.cumsum(counts) - counts
        numbers = np.arange(int(counts.sum())) - np.repeat(firsts, counts)
        starts = np.repeat(table.offset[rows], counts) + numbers * np.repeat(sizes, counts)
        return Blocks(entry.size_bytes, starts, np.frombuffer(b"".join(packed), "<u4"))


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
            if whole not in (None, int(self._blocks.crcs[index])):
                raise Corrupt(f"{self._key} is damaged: checksum at byte {start} does not match", self._key)

    def _touched(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Blocks that have bytes in [start, stop), each with which."""
        index = int(np.searchsorted(self._blocks.starts, start, side="right")) - 1
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
                whole = combine_crc32c(whole, piece, length)
                at += length
            return whole if at == stop else None
