"""The checksums that a copy compares with: all of them, and in little memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from storage.errors import Corrupt
from storage.format.checksum import block_size_bytes, pack_crcs
from storage.format.manifest import ItemEntry, ItemTable, Manifest, ObjectEntry, TensorEntry
from storage.transfer.copyplan import Checksums


def manifest_of(lengths: list[list[int]], sizes_bytes: list[int] | None = None) -> Manifest:
    """Of objects with items of these lengths, recorded from the last item to the first."""
    rng, items = np.random.default_rng(7), []
    for number, own in enumerate(lengths):
        offset = 0
        for index, length in enumerate(own):
            block = block_size_bytes(length)
            crcs = pack_crcs([int(crc) for crc in rng.integers(0, 1 << 32, -(-length // block))])
            items.append(ItemEntry(f"{number}-{index}", (0,), (1,), number, offset, length, 0, 0, block, crcs))
            offset += length
    sizes = sizes_bytes or [sum(own) for own in lengths]
    return Manifest(
        step=1,
        attempt="a" * 8,
        created_unix_s=0.0,
        world_size=1,
        generation=0,
        lineage="",
        mesh=None,
        metadata_size_bytes=0,
        metadata_crc32c=0,
        objects=tuple(
            ObjectEntry(name=f"attempt-aaaaaaaa/__0_{number}.distcp", size_bytes=size, etag="")
            for number, size in enumerate(sizes)
        ),
        tensors={item.key: TensorEntry(dtype="uint8", shape=(1,), path=(item.key,)) for item in items},
        values={},
        items=ItemTable.of(reversed(items)),
    )


def test_blocks_are_those_of_the_items() -> None:
    manifest = manifest_of([[100_000, 7, 16 * 1024], [1], [], [40_000_000, 123_456]])
    checksums = Checksums(manifest)
    for number in range(len(manifest.objects)):
        expected = []
        for item in sorted(manifest.items.rows(), key=lambda item: item.offset):
            if item.object == number:
                starts = range(item.offset, item.offset + item.length, item.block_size_bytes)
                expected += list(zip(starts, item.blocks(), strict=True))
        found = checksums.blocks(number)
        assert list(zip(found.starts.tolist(), found.crcs.tolist(), strict=True)) == expected
        edges = [*(start for start, _ in expected), found.stop]
        assert not expected or found.within(0, found.stop) == (0, edges, [crc for _, crc in expected])


def test_bytes_that_belong_to_no_item_are_told() -> None:
    with pytest.raises(Corrupt, match=r"__0_0\.distcp: bytes 107 to 200 belong to no item"):
        Checksums(manifest_of([[100, 7], [5]], [200, 5]))
    manifest = manifest_of([[100, 7, 5]])
    hole = [item for item in manifest.items.rows() if item.length != 7]
    with pytest.raises(Corrupt, match="bytes 100 to 107 belong to no item"):
        Checksums(manifest.model_copy(update={"items": ItemTable.of(hole)}))


def test_too_few_checksums_of_an_item_are_told() -> None:
    manifest = manifest_of([[100_000]])
    (item,) = manifest.items.rows()
    short = ItemEntry(item.key, (0,), (1,), 0, 0, 100_000, 0, 0, item.block_size_bytes, pack_crcs([1, 2]))
    checksums = Checksums(manifest.model_copy(update={"items": ItemTable.of([short])}))
    with pytest.raises(Corrupt, match="block checksums of an item do not fit its length"):
        checksums.blocks(0)


def test_checksums_of_many_small_blocks_take_little_memory() -> None:
    """2 GiB in items of 8 MiB, 131072 blocks: as two lists of Python's they took 10 MiB."""
    manifest = manifest_of([[8 << 20] * 64] * 4)
    tracemalloc.start()
    try:
        checksums = Checksums(manifest)
        blocks = [checksums.blocks(number) for number in range(4)]
        held_bytes = tracemalloc.get_traced_memory()[0]
        assert sum(len(of.starts) for of in blocks) == 131072
        assert held_bytes < 13 * 131072
        del blocks
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
