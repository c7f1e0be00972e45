"""The read plan against brute force: every wanted byte arrives, every touched block is fetched once, nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.format.checksum import block_size_bytes
from storage.verified.readplan import ItemPlace, Part, Want, bites, box_stripes, plan_parts


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    sizes = draw(st.lists(st.integers(1, 6), min_size=0, max_size=4))
    offsets = [draw(st.integers(0, size - 1)) for size in sizes]
    lengths = [draw(st.integers(1, size - offset)) for size, offset in zip(sizes, offsets, strict=True)]
    return sizes, offsets, lengths


@given(boxes(), st.sampled_from([1, 2, 8]))
@settings(max_examples=300, deadline=None)
def test_the_stripes_of_a_box_cover_it_in_order(box: tuple[list[int], list[int], list[int]], itemsize: int) -> None:
    sizes, offsets, lengths = box
    elements = np.arange(int(np.prod(sizes)), dtype=np.int64).reshape(sizes)
    wanted = elements[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))].ravel()
    stripes = [(start, s.length) for s in box_stripes(sizes, offsets, lengths, itemsize) for start in s.starts]
    found = [element for start, length in stripes for element in range(start // itemsize, (start + length) // itemsize)]
    assert found == wanted.tolist()
    # as few as can be: no two of them touch, unless the box leaves a dimension that is whole in between
    if len(stripes) > 1 and all(n < s for s, n in zip(sizes, lengths, strict=True)):
        assert all(start + length < after for (start, length), (after, _) in itertools.pairwise(stripes))


@st.composite
def reads(draw: st.DrawFn) -> tuple[list[ItemPlace], list[Want], int, int]:
    items: list[ItemPlace] = []
    ends = [0, 0]
    for _ in range(draw(st.integers(1, 5))):
        where = draw(st.integers(0, 1))
        length = draw(st.integers(1, 90))
        items.append(ItemPlace(where, ends[where], length, draw(st.sampled_from([4, 8, 16, 128]))))
        ends[where] += length
    wants = []
    for buffer in range(draw(st.integers(0, 8))):
        item = draw(st.integers(0, len(items) - 1))
        start = draw(st.integers(0, items[item].length - 1))
        stop = draw(st.integers(start + 1, items[item].length))
        wants.append(Want(item, start, stop, buffer, draw(st.integers(0, 5))))
    return items, wants, draw(st.sampled_from([1, 16, 40, 1000])), draw(st.sampled_from([0, 5, 50]))


def deliver(items: list[ItemPlace], parts: list[Part], objects: list[bytes], size: int) -> dict[int, bytearray]:
    """What a fetcher does with a plan, byte by byte."""
    buffers: dict[int, bytearray] = {}
    for part in parts:
        for segment in part.segments:
            data = objects[part.object][segment.start : segment.stop]
            origin = segment.start - items[segment.item].offset
            for want in [segment.direct] if segment.direct else segment.wants:
                low, high = max(want.start, origin), min(want.stop, origin + len(data))
                if low < high:
                    at = want.at + low - want.start
                    buffers.setdefault(want.target, bytearray(size))[at : at + high - low] = data[
                        low - origin : high - origin
                    ]
    return buffers


@given(reads())
@settings(max_examples=600, deadline=None)
def test_plan_delivers_every_wanted_byte_and_fetches_no_block_twice(
    case: tuple[list[ItemPlace], list[Want], int, int],
) -> None:
    items, wants, part_size, gap = case
    rng = np.random.default_rng(7)
    objects = [rng.integers(0, 256, 600, np.uint8).tobytes() for _ in range(2)]
    parts = plan_parts(dict(enumerate(items)), wants, part_size_bytes=part_size, gap_size_bytes=gap)
    buffers = deliver(items, parts, objects, 200)
    touched: set[tuple[int, int]] = set()
    for want in wants:
        item = items[want.item]
        data = objects[item.object][item.offset + want.start : item.offset + want.stop]
        assert buffers[want.target][want.at : want.at + len(data)] == data
        size = item.block_size_bytes
        low, high = want.start // size * size, min(-(-want.stop // size) * size, item.length)
        touched |= {(item.object, item.offset + byte) for byte in range(low, high)}
    fetched = [(part.object, s) for part in parts for seg in part.segments for s in range(seg.start, seg.stop)]
    assert len(fetched) == len(set(fetched))
    assert set(fetched) == touched
    for part in parts:
        inside = sum(segment.stop - segment.start for segment in part.segments)
        assert part.stop - part.start <= inside + gap * (len(part.segments) - 1)
        blocks = max(items[segment.item].block_size_bytes for segment in part.segments)
        assert part.stop - part.start <= max(part_size, blocks) + part_size // 8
        for segment in part.segments:
            block = items[segment.item].block_size_bytes
            assert segment.start == items[segment.item].offset + segment.first_block * block


def test_a_whole_tensor_goes_straight_into_its_memory() -> None:
    items = [ItemPlace(0, 1000, 704 + 4 * 65536 + 873, 16384)]
    parts = plan_parts(dict(enumerate(items)), [Want(0, 704, 704 + 4 * 65536, 0, 0)])
    assert len(parts) == 1
    direct = sum(segment.stop - segment.start for segment in parts[0].segments if segment.direct)
    assert direct == 15 * 16384  # all but the first block and the last two, which the framing shares


def test_items_of_about_a_parts_size_are_one_request_each() -> None:
    length = 704 + (16 << 20) + 873
    items = [ItemPlace(0, number * length, length, block_size_bytes(length)) for number in range(8)]
    wants = [Want(number, 704, 704 + (16 << 20), number, 0) for number in range(8)]
    assert len(plan_parts(dict(enumerate(items)), wants)) == 8


@pytest.mark.parametrize("size_mib", [1, 8, 100, 5000])
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 1), (2, 4), (4, 3), (3, 5)])
def test_resharding_fetches_hardly_more_than_it_needs(size_mib: int, saved_by: int, loaded_by: int) -> None:
    """One tensor, sharded by rows, saved by some ranks and loaded by others: fetched / needed over all ranks."""
    total = size_mib << 20
    cuts = [total * rank // saved_by for rank in range(saved_by + 1)]
    items = [ItemPlace(i, 0, 704 + b - a + 873, block_size_bytes(704 + b - a + 873)) for i, (a, b) in pairs(cuts)]
    fetched = 0
    shares = [total * rank // loaded_by for rank in range(loaded_by + 1)]
    for _, (low, high) in pairs(shares):
        wants = [
            Want(i, 704 + max(low, a) - a, 704 + min(high, b) - a, 0, max(low, a) - low)
            for i, (a, b) in pairs(cuts)
            if max(low, a) < min(high, b)
        ]
        fetched += sum(part.stop - part.start for part in plan_parts(dict(enumerate(items)), wants))
    assert fetched / total <= (1.02 if size_mib > 1 else 1.15)


def pairs(cuts: list[int]) -> list[tuple[int, tuple[int, int]]]:
    return list(enumerate(itertools.pairwise(cuts)))


@given(reads(), st.sampled_from([1, 8, 20, 1000]))
@settings(max_examples=200, deadline=None)
def test_bites_of_a_part_are_all_of_it_between_blocks_and_no_longer_than_asked_for(
    read: tuple[list[ItemPlace], list[Want], int, int], size_bytes: int
) -> None:
    items, wants, part_size, gap_size = read
    for part in plan_parts(dict(enumerate(items)), wants, part_size_bytes=part_size, gap_size_bytes=gap_size):
        found: list[list[tuple[int, int]]] = [[] for _ in part.segments]
        for bite, places in bites(part, lambda item: items[item].block_size_bytes, size_bytes):
            blocks = [items[segment.item].block_size_bytes for segment in bite.segments]
            assert len(bite.segments) == 1 or bite.stop - bite.start <= size_bytes + size_bytes // 8
            assert bite.stop - bite.start <= max(size_bytes + size_bytes // 8, *blocks)
            for segment, (number, start, stop) in zip(bite.segments, places, strict=True):
                whole = part.segments[number]
                assert (segment.start, segment.stop) == (whole.start + start, whole.start + stop)
                assert segment.item_start % items[segment.item].block_size_bytes == 0
                assert segment.direct == whole.direct
                found[number].append((start, stop))
        for whole, ranges in zip(part.segments, found, strict=True):
            assert ranges[0][0] == 0 and ranges[-1][1] == whole.stop - whole.start
            assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
