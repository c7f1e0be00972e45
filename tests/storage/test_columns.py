"""Items as columns: what is in the documents, and in the index, is what their rows say."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.format import layout
from storage.format.checksum import pack_crcs
from storage.format.columns import Boxes
from storage.format.index import of_manifest
from storage.format.manifest import (
    ItemEntry,
    ItemTable,
    ObjectEntry,
    Receipt,
    TensorEntry,
    ValueEntry,
    dump_manifest,
    dump_receipt,
    load_manifest,
    load_receipt,
)
from storage.run.attempt import Attempt, StateContents, build_manifest
from storage.run.job import Origin

ATTEMPT = "00000000-1111-2222-3333-444444444444"
BLOCK_SIZE_BYTES = 16384
SHAPES = {"scalar": (), "vector": (2,), "other": (300, 1 << 33), "another scalar": (), 'odd "key" é': (2,)}
CONTENTS = StateContents(
    tensors={key: TensorEntry(dtype="float32", shape=shape, path=(key, 3)) for key, shape in SHAPES.items()},
    values={"value": ValueEntry(path=("value",))},
)


@st.composite
def items(draw: st.DrawFn, number: int) -> list[ItemEntry]:
    """Some of object `number`, one after the other."""
    rows: list[ItemEntry] = []
    for key in draw(st.lists(st.sampled_from([*SHAPES, "value"]), max_size=6)):
        offsets = sizes = None
        if key in SHAPES:
            offsets = tuple(draw(st.integers(0, extent - 1)) for extent in SHAPES[key])
            sizes = tuple(draw(st.integers(0, extent - at)) for at, extent in zip(offsets, SHAPES[key], strict=True))
        length = draw(st.integers(1, 3 * BLOCK_SIZE_BYTES))
        crcs = draw(st.lists(st.integers(0, (1 << 32) - 1), min_size=4, max_size=4))
        rows.append(
            ItemEntry(
                key=key,
                offsets=offsets,
                sizes=sizes,
                object=number,
                offset=rows[-1].offset + rows[-1].length if rows else 0,
                length=length,
                raw_offset=draw(st.integers(0, length).filter(lambda at: not 0 < at < 64)),  # there it has its head
                crc32c=crcs[3],
                block_size_bytes=BLOCK_SIZE_BYTES,
                block_crcs=pack_crcs(crcs[: -(-length // BLOCK_SIZE_BYTES)]),
            )
        )
    return rows


ranks = st.lists(st.integers(0, 2).flatmap(lambda num: st.tuples(*map(items, range(num)))), min_size=1, max_size=3)


def receipt_of(rank: int, objects: tuple[list[ItemEntry], ...]) -> Receipt:
    sizes_bytes = [sum(row.length for row in rows) for rows in objects]
    return Receipt(
        rank=rank,
        attempt=ATTEMPT,
        objects=tuple(
            ObjectEntry(name=layout.data_name(ATTEMPT, rank, number), size_bytes=size_bytes, etag="")
            for number, size_bytes in enumerate(sizes_bytes)
        ),
        items=ItemTable.of(row for rows in objects for row in rows),
    )


@given(ranks)
@settings(deadline=None, max_examples=50)
def test_a_manifest_has_the_rows_of_its_receipts(objects_of_rank: list[tuple[list[ItemEntry], ...]]) -> None:
    receipts = [load_receipt(dump_receipt(receipt_of(*pair)), "receipt") for pair in enumerate(objects_of_rank)]
    every = [rows for objects in objects_of_rank for rows in objects]
    expected = [dataclasses.replace(row, object=number) for number, rows in enumerate(every) for row in rows]
    attempt = Attempt.of_step(3, ATTEMPT, len(receipts))
    manifest, metadata = build_manifest(attempt, Origin(), CONTENTS, receipts, 0.0)
    data = dump_manifest(manifest)
    assert list(manifest.items.rows()) == expected
    assert json.dumps(columns_of(expected), separators=(",", ":"), ensure_ascii=False).encode() in data
    again = load_manifest(data)
    assert again == manifest and list(again.items.rows()) == expected
    check_index(again, expected)
    check_stock(metadata, expected, [entry.name for entry in manifest.objects])


def columns_of(rows: list[ItemEntry]) -> dict[str, Any]:
    return {field.name: [getattr(row, field.name) for row in rows] for field in dataclasses.fields(ItemEntry)}


def check_index(manifest: Any, rows: list[ItemEntry]) -> None:
    """The index has the same rows, those of a key together."""
    index, found = of_manifest("", manifest), []
    columns = index.columns
    for key, entry in index.entries.items():
        for item in range(entry.first, entry.last):
            box = index.box(key, item) if entry.is_tensor else (None, None)
            numbers = (columns.object, columns.offset, columns.length, columns.raw_offset)
            crcs = tuple(index.crcs_of(np.array([item])).tolist())
            found.append((key, *box, *(int(column[item]) for column in numbers), crcs))
    order = list(index.entries)
    assert found == [
        (row.key, row.offsets, row.sizes, row.object, row.offset, row.length, row.raw_offset, row.blocks())
        for row in sorted(rows, key=lambda row: order.index(row.key))
    ]


def check_stock(metadata: bytes, rows: list[ItemEntry], names: list[str]) -> None:
    """So has stock DCP's `.metadata`, as its own classes unpickle it; of items at one place the last counts."""
    theirs = pickle.loads(metadata)
    places = {(row.key, row.offsets): (names[row.object], row.offset, row.length) for row in rows}
    assert {
        (index.fqn, None if index.offset is None else tuple(index.offset)): (
            info.relative_path,
            info.offset,
            info.length,
        )
        for index, info in theirs.storage_data.items()
    } == places
    for key, shape in SHAPES.items():
        stored = theirs.state_dict_metadata[key]
        assert tuple(stored.size) == shape
        boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks]
        assert boxes == [(row.offsets, row.sizes) for row in rows if row.key == key]


@given(st.lists(st.none() | st.lists(st.integers(0, (1 << 63) - 1), max_size=4).map(tuple), max_size=8))
def test_boxes_are_their_rows(rows: list[tuple[int, ...] | None]) -> None:
    boxes = Boxes.of(rows)
    assert list(boxes.rows()) == rows
    assert Boxes.join([Boxes.of(rows[:3]), Boxes.of(rows[3:])]) == boxes
    width = max((len(row) for row in rows if row), default=0)
    assert boxes.padded(7).tolist() == [[*(row or ()), *[7] * (width - len(row or ()))] for row in rows]


@pytest.mark.parametrize("number", [-1, 1 << 63])
def test_numbers_that_no_column_holds_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match=r"a number of more than 64 bits|a negative number"):
        Boxes.of([(1, number)])
    with pytest.raises(ValueError, match=r"a number of more than 64 bits|a negative number"):
        ItemTable(offset=[number])  # type: ignore[arg-type]
