"""A copy of another node's part on its way in: each object is compared with the papers' checksums when it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from storage.errors import Corrupt
from storage.format.manifest import ItemEntry
from storage.held.inventory import HeldObject, HeldPart, Memory
from storage.held.papers import PartPapers
from storage.verified.verifiers import BlockSums, BlockVerifier

Allocate = Callable[[int], Memory]
"""Memory of so many bytes. Raises MemoryError or OSError where there is none."""


class CopyBuffer:
    """Memory for the objects of one part, one after the other."""

    def __init__(self, papers: PartPapers, of_node: str, allocate: Allocate) -> None:
        self._papers = papers
        self._of_node = of_node
        self._memory = allocate(papers.label.size_bytes)
        self._items: list[list[ItemEntry]] = [[] for _ in papers.receipt.objects]
        for item in papers.receipt.items.rows():
            self._items[item.object].append(item)

    def objects(self) -> Iterator[memoryview]:
        """The memory of each object, to be filled before the next is asked for. Raises Corrupt if one is wrong."""
        at = 0
        for entry, items in zip(self._papers.receipt.objects, self._items, strict=True):
            view = self._memory.memory[at : at + entry.size_bytes]
            yield view
            check_object(entry.name, view, items)
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


def check_object(name: str, data: memoryview, items: list[ItemEntry]) -> None:
    """Compare the bytes of an object with the checksums of its items, which make it up. Raises Corrupt."""
    end = 0
    for item in sorted(items, key=lambda item: item.offset):
        stop = item.offset + item.length
        if item.offset != end or stop > data.nbytes:
            raise Corrupt(f"{name}: bytes {end} to {item.offset} belong to no item", name)
        starts = range(item.offset, stop, item.block_size_bytes)
        sums = BlockSums(starts, stop, np.array(item.blocks(), np.uint32))
        BlockVerifier(name, sums).take(item.offset, data[item.offset : stop])
        end = stop
    if end != data.nbytes:
        raise Corrupt(f"{name}: bytes {end} to {data.nbytes} belong to no item", name)
