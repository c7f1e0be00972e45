"""Pieces that go from rank to rank: they arrive whatever either wants of them, and are not copied for nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.loading.shared_parts import (
    Held,
    SharedPart,
    clipped,
    item_segments,
    joined,
    long_ranges,
    receiving,
    scatter,
)
from storage.verified.readplan import NOWHERE, ItemPlace, Part, Range, Want

MIB = 1024 * 1024
LONG = 8


def part_of(
    items: Sequence[ItemPlace], wants: Sequence[Want], byte_range: Range, is_cut: tuple[bool, bool]
) -> SharedPart:
    segments = itertools.chain.from_iterable(
        clipped(
            item_segments(index, item, [w for w in wants if w.item == index], LONG), item.block_size_bytes, byte_range
        )
        for index, item in enumerate(items)
    )
    touched = [item for item in items if item.offset < byte_range[1] and byte_range[0] < item.offset + item.length]
    return SharedPart(0, Part(0, *byte_range, tuple(segments)), long_ranges(touched, byte_range, is_cut, LONG))


def held(part: SharedPart) -> Held:
    memories = [memoryview(bytearray(segment.stop - segment.start)) for segment in part.part.segments]
    return Held(part, tuple(memories), tuple(segment.direct is not None for segment in part.part.segments))


@st.composite
def items_and_range(draw: st.DrawFn) -> tuple[list[ItemPlace], Range]:
    items: list[ItemPlace] = []
    end = 0
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 90))
        items.append(ItemPlace(0, end, length, draw(st.sampled_from([4, 8, 16]))))
        end += length
    edges = {item.offset + at for item in items for at in range(0, item.length, item.block_size_bytes)} | {end}
    start, stop = sorted(draw(st.lists(st.sampled_from(sorted(edges)), min_size=2, max_size=2, unique=True)))
    return items, (start, stop)


def draw_wants(draw: st.DrawFn, items: Sequence[ItemPlace]) -> list[Want]:
    """Any wants that touch every block: first some ranges, then a byte of each block that they leave out."""
    wants: list[Want] = []
    for index, item in enumerate(items):
        for _ in range(draw(st.integers(0, 3))):
            start = draw(st.integers(0, item.length - 1))
            wants.append(Want(index, start, draw(st.integers(start + 1, item.length)), len(wants), 0))
        for at in range(0, item.length, item.block_size_bytes):
            block = range(at, min(at + item.block_size_bytes, item.length))
            if not any(w.item == index and w.start < block.stop and block.start < w.stop for w in wants):
                wants.append(Want(index, at, at + 1, len(wants), 0))
    return wants


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_piece_arrives_whatever_both_ranks_want_of_it(data: st.DataObject) -> None:
    items, byte_range = data.draw(items_and_range())
    is_cut = data.draw(st.tuples(st.booleans(), st.booleans()))
    sender, receiver = (
        held(part_of(items, data.draw(st.composite(draw_wants)(items)), byte_range, is_cut)) for _ in "ab"
    )
    content = np.arange(1, byte_range[1] + 1, dtype=np.int64).astype(np.uint8)
    for segment, memory in zip(sender.shared.part.segments, sender.memories, strict=True):
        memory[:] = content[segment.start : segment.stop].tobytes()
    assert sender.joined().tolist() == content[byte_range[0] : byte_range[1]].tolist()
    messages, places = [joined(memories) for memories in sender.messages()], receiver.messages()
    for message, memories in zip(messages, places, strict=True):
        into = receiving(memories)
        into[:] = message  # both have cut it into the same messages
        scatter(into, memories)
    assert receiver.joined().tolist() == content[byte_range[0] : byte_range[1]].tolist()


@pytest.mark.parametrize("size_bytes", [8 * MIB, 8 * MIB - 704 - 100])  # the framing behind it in one block, or two
def test_what_both_ranks_want_as_it_is_is_not_copied(size_bytes: int) -> None:
    item = ItemPlace(0, 0, size_bytes + 1600, 16 * 1024)
    wants = [Want(0, 704, 704 + size_bytes, 0, 0), Want(0, 704 + size_bytes, item.length, NOWHERE, 0)]
    part = part_of([item], wants, (0, item.length), (True, True))
    (run, rest) = held(part).messages()
    assert len(run) == 1
    assert len(run[0]) >= size_bytes - 4 * 16 * 1024
    assert sum(map(len, rest)) == item.length - len(run[0])


@pytest.mark.parametrize("is_lower", [True, False])
def test_a_rank_that_wants_half_of_an_item_loses_no_more_than_the_outer_blocks(is_lower: bool) -> None:
    size, middle = 16 * 1024, 704 + 4 * MIB
    item = ItemPlace(0, 0, 8 * MIB + 1600, size)
    whole = Want(0, 704, 704 + 8 * MIB, 0, 0)
    half = Want(0, 704, middle, 0, 0) if is_lower else Want(0, middle, 704 + 8 * MIB, 0, 0)
    byte_range = (0, 4 * MIB + size) if is_lower else (4 * MIB, item.length)  # the blocks that it touches
    of_half = part_of([item], [half, Want(0, 704 + 8 * MIB, item.length, NOWHERE, 0)], byte_range, (True, True))
    (run, rest) = held(of_half).messages()
    assert len(run) == 1
    assert sum(map(len, rest)) <= 3 * size
    of_whole = held(part_of([item], [whole, Want(0, 704 + 8 * MIB, item.length, NOWHERE, 0)], byte_range, (True, True)))
    assert list(map(len, of_whole.messages()[0])) == [len(run[0])]


def test_a_cut_for_size_costs_no_copy() -> None:
    item = ItemPlace(0, 0, 4096 * MIB, 8 * MIB)
    want = Want(0, 704, 4095 * MIB, 0, 0)
    assert long_ranges([item], (80 * MIB, 96 * MIB), (False, False)) == ((80 * MIB, 96 * MIB),)
    (segment,) = clipped(item_segments(0, item, [want]), item.block_size_bytes, (80 * MIB, 96 * MIB))
    assert segment.direct == want
    assert (segment.item_start, segment.first_block, segment.last_block) == (80 * MIB, 10, 12)


def test_short_segments_go_through_scratch_together() -> None:
    item = ItemPlace(0, 0, 64 * 16, 16)
    wants = [Want(0, 64 * k, 64 * k + 32, k, 0) for k in range(16)]
    (first, *others) = item_segments(0, item, wants, long_size_bytes=33)
    assert (first.direct, first.start, first.stop) == (None, 0, 32)
    assert len(others) == 15
    (together,) = item_segments(0, item, [Want(0, 32 * k, 32 * k + 32, k, 0) for k in range(32)], long_size_bytes=33)
    assert together.direct is None
    assert len(together.wants) == 32
    assert (together.first_block, together.last_block, together.stop) == (0, 64, 64 * 16)
