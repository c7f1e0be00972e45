"""A copy of another node's part on its way in: what comes is compared with the papers' checksums as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from storage.errors import Corrupt
from storage.format.manifest import ItemEntry, ObjectEntry
from storage.held.inventory import HeldObject, HeldPart, Memory
from storage.held.papers import PartPapers
from storage.stores.objects import parts_of_size
from storage.verified.verifiers import BlockSums, BlockVerifier

_BITE_BYTES = 64 * 1024 * 1024
"""So much memory is made, or compared, while whoever sends has to wait: a fraction of the time it would wait for."""


class CopyMemory(Memory, Protocol):
    """Memory that is made piece by piece."""

    def populate(self, begin: int, stop: int) -> None:
        """Make it, from one of its bytes to the other. Raises MemoryError."""


Allocate = Callable[[int], CopyMemory]
"""Memory of so many bytes, none of which is made. Raises MemoryError or OSError where there is none."""


class CopyBuffer:
    """Memory for the objects of one part, one after the other. Raises Corrupt if its papers contradict themselves."""

    def __init__(self, papers: PartPapers, of_node: str, allocate: Allocate) -> None:
        self._papers = papers
        self._of_node = of_node
        items: list[list[ItemEntry]] = [[] for _ in papers.receipt.objects]
        for item in papers.receipt.items.rows():
            items[item.object].append(item)
        rows = zip(papers.receipt.objects, items, strict=True)
        self._verifiers = [verifier_of(entry, of_entry) for entry, of_entry in rows]
        self._memory = allocate(papers.label.size_bytes)

    def bites(self) -> Iterator[memoryview]:
        """The memory of what comes next, to be filled before more is asked for. Raises Corrupt, MemoryError."""
        at = 0
        for entry, verifier in zip(self._papers.receipt.objects, self._verifiers, strict=True):
            for start, length in parts_of_size(entry.size_bytes, _BITE_BYTES):
                begin = at + start
                self._memory.populate(begin, begin + length)
                view = self._memory.memory[begin : begin + length]
                yield view
                verifier.take(start, view)
            at += entry.size_bytes

    def part(self) -> HeldPart:
        """The part, once all its objects are there."""
        found, at = {}, 0
        for entry in self._papers.receipt.objects:
            found[entry.name] = HeldObject([self._memory.memory[at : at + entry.size_bytes]])
            at += entry.size_bytes
        return HeldPart(self._papers, found, self._of_node, (self._memory,), self._memory.close)

    def close(self) -> None:
        """Free the memory of a copy that did not become a part."""
        self._memory.close()


def verifier_of(entry: ObjectEntry, items: Sequence[ItemEntry]) -> BlockVerifier:
    """What compares the bytes of an object with the checksums of its items. Raises Corrupt unless these make it up."""
    name, end = entry.name, 0
    starts, crcs = [np.zeros(0, np.int64)], [np.zeros(0, np.uint32)]
    for item in sorted(items, key=lambda item: item.offset):
        if item.offset != end or item.length < 0:
            raise Corrupt(f"{name}: bytes {end} to {item.offset} belong to no item", name)
        end += item.length
        crcs.append(np.array(item.blocks(), np.uint32))
        starts.append(item.offset + item.block_size_bytes * np.arange(len(crcs[-1]), dtype=np.int64))
    if end != entry.size_bytes:
        raise Corrupt(f"{name}: bytes {end} to {entry.size_bytes} belong to no item", name)
    return BlockVerifier(name, BlockSums(np.concatenate(starts), end, np.concatenate(crcs)))
