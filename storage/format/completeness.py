"""Whether a manifest accounts for all that it names: every element, every value, every byte. Pure, without torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from storage.format.checksum import combine_crc32c
from storage.format.index import by_object
from storage.format.manifest import ItemEntry, Manifest


def gaps(manifest: Manifest) -> Iterator[str]:
    """Tensors whose shards do not make them up, and values that are not there."""
    num_elements: dict[str, int] = defaultdict(int)
    stored = set()
    for item in manifest.items.rows():
        stored.add(item.key)
        num_elements[item.key] += math.prod(item.sizes or ())
    for key, entry in manifest.tensors.items():
        if num_elements[key] != math.prod(entry.shape):
            yield f"tensor {key!r} has {num_elements[key]} of {math.prod(entry.shape)} elements"
    for key in manifest.values.keys() - stored:
        yield f"value {key!r} is not stored"


def strays(manifest: Manifest) -> Iterator[str]:
    """Where bytes of a data object belong to no item, or to several."""
    table = manifest.items
    rows_of = by_object(table.object, table.offset, len(manifest.objects))
    for entry, rows in zip(manifest.objects, rows_of, strict=True):
        starts = np.append(table.offset[rows], entry.size_bytes)
        ends = np.insert(table.offset[rows] + table.length[rows], 0, 0)
        for place in np.flatnonzero(starts != ends).tolist():
            yield f"{entry.name}: bytes {ends[place]} to {starts[place]} belong to no item"


def has_odd_sum(item: ItemEntry) -> bool:
    """Whether the checksum of the item as a whole is not that of its blocks, laid end to end. Raises Corrupt."""
    crc = 0
    for at, of_block in zip(range(0, item.length, item.block_size_bytes), item.blocks(), strict=True):
        crc = combine_crc32c(crc, of_block, min(item.block_size_bytes, item.length - at))
    return crc != item.crc32c
