"""Items are encoded while what is before them is sent: front to back, once, and no more than was asked for."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.format.checksum import BlockCrcs, block_size_bytes, crc32c
from storage.format.framing import EncodedItem, FramedItem
from storage.format.items import Framings, item_of
from storage.parallel import run_all
from storage.saving.encoding import Encoding, ObjectContent
from storage.saving.saveplan import Chunk
from storage.saving.writing import Payload, write_payloads
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectStore
from storage.stores.retrying_store import stored_equal

MIB = 1024 * 1024


def framed(tensor: torch.Tensor) -> FramedItem:
    """Its item, as that of the third tensor of a kind."""
    framings = Framings()
    for number in range(2):
        item_of(torch.full_like(tensor, number), framings)
    item = item_of(tensor, framings)
    assert isinstance(item, FramedItem)
    return item


def whole(encoding: Encoding) -> bytes:
    return b"".join(encoding.views(0, encoding.length))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 30_000), min_size=1, max_size=5),
    st.integers(1000, 20_000),
    st.integers(0, 1000),
)
def test_parts_in_any_order_make_the_object(sizes: list[int], part_bytes: int, seed: int) -> None:
    items = [
        framed(torch.rand(size)) if size % 3 else EncodedItem((b"x" * size, b"", b"yz"), 0, size + 2) for size in sizes
    ]
    expected = b"".join(whole(Encoding(item)) for item in items)
    content = ObjectContent([Encoding(item) for item in items])
    assert content.size_bytes == len(expected)
    places = list(range(0, len(expected), part_bytes))
    random.Random(seed).shuffle(places)
    for at in places:
        length = min(part_bytes, len(expected) - at)
        assert b"".join(content.fetch(at, length)) == expected[at : at + length]
    for encoding, offset in zip(content.items, content.offsets[:-1], strict=True):
        data, size = expected[offset : offset + encoding.length], block_size_bytes(encoding.length)
        assert encoding.crcs.whole == crc32c(data)
        assert encoding.crcs.blocks == [crc32c(data[at : at + size]) for at in range(0, len(data), size)]


def test_a_part_needs_no_more_than_the_items_before_its_end() -> None:
    items = [Encoding(framed(torch.rand(8 * MIB // 4))) for _ in range(3)]
    content = ObjectContent(items)
    content.fetch(0, 2 * MIB)
    begun = len(items[0].crcs.blocks) * items[0].crcs.size_bytes
    assert 2 * MIB <= begun <= 3 * MIB
    assert [item.crcs.blocks for item in items[1:]] == [[], []]
    content.fetch(9 * MIB, MIB)
    assert items[1].crcs.blocks
    assert not items[2].crcs.blocks


def test_a_tensors_memory_is_not_copied_and_not_counted_twice() -> None:
    tensor = torch.rand(MIB)
    encoding = Encoding(framed(tensor))
    (view,) = encoding.views(encoding.raw_offset, encoding.raw_offset + tensor.nbytes)
    counted = encoding.crcs.blocks
    tensor.zero_()
    assert bytes(view) == bytes(tensor.nbytes)
    encoding.views(0, encoding.raw_offset + tensor.nbytes)
    assert encoding.crcs.blocks == counted


def test_threads_that_ask_at_once_get_the_same() -> None:
    tensor = torch.rand(4 * MIB)
    item = framed(tensor)
    expected = whole(Encoding(item))
    content = ObjectContent([Encoding(item) for _ in range(3)])
    size = 100_001
    with ThreadPoolExecutor(8) as pool:
        calls = [
            lambda at=at: b"".join(content.fetch(at, min(size, content.size_bytes - at)))
            for at in range(0, content.size_bytes, size)
        ]
        assert b"".join(run_all(pool, calls)) == 3 * expected
    assert {encoding.crcs.whole for encoding in content.items} == {crc32c(expected)}


class Plain(MemoryStore):
    """A store that takes objects as a whole only."""

    put_from = ObjectStore.put_from


def test_a_store_that_takes_no_parts_gets_all_at_once() -> None:
    store, content = Plain("x"), ObjectContent([Encoding(framed(torch.rand(100))) for _ in range(2)])
    with ThreadPoolExecutor(1) as pool:
        info = store.put_from("k", content.size_bytes, content.fetch, pool)
    assert info.size_bytes == content.size_bytes == len(store.read("k"))


def test_a_save_tells_of_what_was_encoded_on_the_way() -> None:
    store, tensors = MemoryStore("x"), [torch.rand(70_000) for _ in range(6)]
    chunks = [Chunk(f"t{number}", (), (0,), (70_000,), (70_000,), "float32", 280_000) for number in range(6)]
    payloads = [Payload(chunk, tensor) for chunk, tensor in zip(chunks, tensors, strict=True)]
    (entry,), items = write_payloads(store, "", "a", 0, payloads)
    data = store.read(entry.name)
    assert (entry.size_bytes, sum(item.length for item in items)) == (len(data), len(data))
    for item, chunk, tensor in zip(items, chunks, tensors, strict=True):
        stored = data[item.offset : item.offset + item.length]
        assert (item.key, item.crc32c) == (chunk.key, crc32c(stored))
        assert stored[item.raw_offset :][: tensor.nbytes] == tensor.numpy().tobytes()


@settings(deadline=None)
@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=5), st.integers(-1, 59), st.integers(-3, 3))
def test_an_object_is_compared_byte_by_byte(data: bytes, cuts: list[int], flip: int, more: int) -> None:
    """Whatever the chunks are, and whether it is longer or shorter."""
    sent = bytearray(data)
    if 0 <= flip < len(sent):
        sent[flip] ^= 1
    sent = sent + bytes(more) if more > 0 else sent[: len(sent) + more] if more else sent
    places = sorted({0, len(sent), *(cut for cut in cuts if cut < len(sent))})
    views = [memoryview(sent)[a:b] for a, b in itertools.pairwise(places)]
    store = MemoryStore("x")
    info = store.put("k", [data])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.stores.retrying_store._COMPARED_SIZE_BYTES", 7)
        assert stored_equal(store, "k", views) == (info if sent == data else None)
    assert stored_equal(store, "other", views) is None


def test_block_checksums_of_nothing() -> None:
    assert (BlockCrcs(10).whole, BlockCrcs(10).blocks) == (0, [])
