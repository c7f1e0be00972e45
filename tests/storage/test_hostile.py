"""What comes from a store may have been written by anybody, or by a bit that flipped: it costs what its bytes cost."""

from __future__ import annotations

import dataclasses
import pickle
import pickletools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from storage.errors import Corrupt
from storage.format import opcodes
from storage.format.columns import Boxes
from storage.format.dcp_metadata import check_sizes, load_metadata
from storage.format.opcodes import Record, harmless
from tests.storage import hostile_cases

TIME_MAX_S = 2.0


def test_metadata_that_was_made_to_cost_costs_nothing() -> None:
    # in a process of its own: before, some of these took all memory, and one ended the interpreter
    ran = subprocess.run(
        [sys.executable, "-m", hostile_cases.__name__], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert float(ran.stdout) < TIME_MAX_S, ran.stderr


_words = st.binary(max_size=40) | st.sampled_from(
    [b"r" * 30, b"X\xff\xff\xff\x7f" * 5, b"J" * 255, b"." * 100, b"\n" * 9]
)
_tokens = st.one_of(
    st.sampled_from([b"(", b")", b"]", b"}", b"N", b"\x94", b"\x81", b"R", b"b", b"s", b"u", b"\x88"]),
    st.binary(min_size=1, max_size=1).map(lambda data: b"K" + data),
    st.binary(min_size=4, max_size=4).map(lambda data: b"J" + data),
    st.integers(0, 40).map(lambda place: b"j" + place.to_bytes(4, "little")),
    _words.map(lambda word: b"C" + bytes([len(word)]) + word),
    _words.map(lambda word: b"B" + len(word).to_bytes(4, "little") + word),
    st.just(b"X" + (3000).to_bytes(4, "little") + b"r" * 3000),
    st.just(b"ctorch\nSize\n"),
    st.just(b"\x95" + bytes(8)),
)


@given(st.lists(_tokens, max_size=30), st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_opcodes_are_found_where_they_are(tokens: list[bytes], times: int) -> None:
    data = b"\x80\x04" + b"".join(tokens) * times + b"."
    marks = opcodes._marks(data)
    assert [at for at, mark in enumerate(marks) if mark] == [at for _, _, at in pickletools.genops(data)]


def test_dicts_become_lists_and_states_are_appended() -> None:
    for state in ({"a": 1}, {f"key {n}": n for n in range(2500)}):
        for protocol in (2, 4, 5):
            found = pickle.loads(harmless(pickle.dumps([state, "text", 1 << 70, 2.5, None], protocol)))
            pairs = [found[0][0]] if len(state) == 1 else zip(found[0][::2], found[0][1::2], strict=True)
            assert dict(pairs) == state
            assert found[1:] == ["text", 1 << 70, 2.5, None]
    with pytest.raises(TypeError):
        Record([1])  # type: ignore[call-arg]


def test_one_long_row_makes_no_gigabytes_of_short_ones() -> None:
    rows = [(1, 2)] * 400_000
    assert Boxes.of(rows).padded(0).shape == (400_000, 2)
    with pytest.raises(Corrupt, match="64 dimensions"):
        Boxes.of([*rows, (1,) * 64]).padded(0)


def sharded(*boxes: tuple[tuple[int, int], tuple[int, int]], places: list[tuple[int, int]] | None = None) -> bytes:
    """Stock metadata of one tensor of 8 x 4 in those shards, each of which lies at its place of (offset, length)."""
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
    where = places or [(100 * number, 100) for number in range(len(boxes))]
    storage = {
        MetadataIndex("key", chunk.offsets, number): _StorageInfo("__0_0.distcp", *place)
        for number, (chunk, place) in enumerate(zip(chunks, where, strict=True))
    }
    tensor = TensorStorageMetadata(TensorProperties(), torch.Size((8, 4)), chunks)
    return pickle.dumps(Metadata({"key": tensor}, storage_data=storage))


def test_shards_make_up_their_tensor_each_element_once() -> None:
    # nothing guards stock DCP's metadata but its own sense: what is not filled would silently stay as it was
    halves = [((0, 0), (4, 4)), ((4, 0), (4, 4))]
    corners = [((0, 0), (4, 4)), ((4, 0), (4, 1)), ((4, 1), (4, 3))]
    for whole in (halves, corners, corners[::-1], [*halves, ((8, 0), (0, 4))]):
        assert len(load_metadata(sharded(*whole), "", 0, {})) == len(whole)
    for odd in (
        halves[:1],
        [*halves[:1], ((4, 0), (3, 4))],
        [*halves[:1], ((3, 0), (4, 4))],
        [*corners[:1], ((4, 0), (4, 2)), ((4, 2), (4, 1))],
        [*corners, ((0, 0), (1, 1))],
        [((0, 0), (8, 3)), ((0, 2), (8, 1))],
    ):
        with pytest.raises(Corrupt, match=r"do not make up its shape|without a shard|stored nowhere"):
            load_metadata(sharded(*odd), "", 0, {})


def test_items_do_not_lie_upon_each_other_nor_behind_their_object() -> None:
    halves = [((0, 0), (4, 4)), ((4, 0), (4, 4))]
    for places in ([(0, 100), (50, 100)], [(50, 100), (0, 100)], [(0, 100), (0, 100)]):
        with pytest.raises(Corrupt, match="upon each other"):
            load_metadata(sharded(*halves, places=places), "", 0, {})
    assert len(load_metadata(sharded(*halves, places=[(100, 100), (0, 100)]), "", 0, {"__0_0.distcp": 200})) == 2
    for place in ((101, 100), (1 << 62, 1 << 62)):
        with pytest.raises(Corrupt, match="past the end"):
            load_metadata(sharded(*halves, places=[(0, 100), place]), "", 0, {"__0_0.distcp": 200})


def test_sizes_whose_product_is_too_large_are_not_small() -> None:
    huge = 1 << 32
    index = load_metadata(sharded(((0, 0), (8, 4))), "", 0, {})
    sizes = np.array([[huge, huge]])
    for odd in (sizes, sizes // 2, sizes * 16):
        columns = dataclasses.replace(index.columns, sizes=odd)
        with pytest.raises(Corrupt, match="too short"):
            check_sizes(dataclasses.replace(index, columns=columns))
