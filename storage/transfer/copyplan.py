"""What is copied of a checkpoint, and what its bytes must be. Pure."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storage.errors import Corrupt, NoCheckpoint
from storage.format.completeness import strays
from storage.format.index import by_object
from storage.format.manifest import Manifest
from storage.verified.verifiers import BlockSums


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
        for problem in strays(manifest):
            raise Corrupt(problem)
        self._rows = by_object(table.object, table.offset, len(manifest.objects))

    def blocks(self, number: int) -> BlockSums:
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
        return BlockSums(starts, entry.size_bytes, np.frombuffer(b"".join(packed), "<u4"))


def choose(steps: Sequence[int], where: str, step: int | None, last: int | None) -> list[int]:
    """Which of the committed `steps` (newest first) to copy: one, the newest `last`, or all. Raises NoCheckpoint."""
    if step is not None and step not in steps:
        raise NoCheckpoint(f"step {step} is not committed in {where}; there are: {', '.join(map(str, steps))}")
    if step is not None:
        return [step]
    return list(steps[:last])
