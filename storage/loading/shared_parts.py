"""The parts that ranks share: how a rank holds one, and how it is cut into messages. No torch, no store.

A part is whole blocks of one object. Each rank has it in segments of its own: what a plain tensor takes as it is lies
there from the start, the rest in scratch memory. Sender and receiver do not know each other's segments, but must cut a
part into the same messages: so it is cut where, by what all ranks know, segments are likely to end.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from storage.format.columns import Array
from storage.verified.readplan import ItemPlace, Part, Range, Segment, Want, between, segments_of

LONG_SIZE_BYTES = 256 * 1024
"""Shorter runs are copied and sent together: a system call and a message for each would cost more."""


@dataclass(frozen=True)
class SharedPart:
    """Part `number` of the plan, with this rank's segments, which cover it, and its `long_ranges`."""

    number: int
    part: Part
    long_ranges: tuple[Range, ...]

    @property
    def size_bytes(self) -> int:
        """The part's length."""
        return self.part.stop - self.part.start

    def only_item(self) -> tuple[int, Range] | None:
        """The item and its bytes, if the part has bytes of one item only."""
        first = self.part.segments[0]
        if any(segment.item != first.item for segment in self.part.segments):
            return None
        return first.item, (first.item_start, first.item_start + self.size_bytes)

    def messages(self) -> list[list[Range]]:
        """What goes into one message each: every long range by itself, and together what they leave."""
        edges = [self.part.start, *itertools.chain.from_iterable(self.long_ranges), self.part.stop]
        left = [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]
        return [*([long] for long in self.long_ranges), *([left] if left else [])]


@dataclass(frozen=True)
class Held:
    """A part, and the memory of each of its segments; whether that is where the bytes belong (`in_place`)."""

    shared: SharedPart
    memories: tuple[memoryview, ...]
    in_place: tuple[bool, ...]

    @property
    def scratch_bytes(self) -> int:
        """How many bytes of its memory exist for the exchange only."""
        of = zip(self.memories, self.in_place, strict=True)
        return sum(memory.nbytes for memory, in_place in of if not in_place)

    def messages(self) -> list[list[Array]]:
        """The memories that each message of the part lies in, in order."""
        return [
            [memory for byte_range in message for memory in self._memories_of(byte_range)]
            for message in self.shared.messages()
        ]

    def joined(self) -> Array:
        """The bytes of the part, copied only if they lie in several memories."""
        return joined(list(self._memories_of((self.shared.part.start, self.shared.part.stop))))

    def _memories_of(self, byte_range: Range) -> Iterator[Array]:
        segments = self.shared.part.segments
        for number in range(bisect.bisect_right(segments, byte_range[0], key=_stop_of), len(segments)):
            segment = segments[number]
            if segment.start >= byte_range[1]:
                return
            low, high = max(byte_range[0], segment.start), min(byte_range[1], segment.stop)
            yield np.frombuffer(self.memories[number], np.uint8)[low - segment.start : high - segment.start]


def joined(memories: Sequence[Array]) -> Array:
    """The bytes of the memories, one after the other; the memory itself if there is one."""
    return memories[0] if len(memories) == 1 else np.concatenate(memories)


def receiving(memories: Sequence[Array]) -> Array:
    """Memory for as many bytes: the memory itself if it is one, else some to `scatter` from."""
    return memories[0] if len(memories) == 1 else np.empty(sum(map(len, memories)), np.uint8)


def scatter(content: Array, memories: Sequence[Array]) -> None:
    """Put into the memories what is `joined` on another rank, unless it is there already."""
    at = 0
    for memory in memories if len(memories) > 1 else ():
        memory[:] = content[at : at + len(memory)]
        at += len(memory)


def long_ranges(
    items: Sequence[ItemPlace], part: Range, is_cut: tuple[bool, bool], long_size_bytes: int = LONG_SIZE_BYTES
) -> tuple[Range, ...]:
    """The long ranges of the part that a rank most likely has in one memory each; the same on every rank.

    They leave out the blocks where what a rank wants of a tensor may begin or end: of each item the first one, which
    holds the framing before the tensor, and the last two, which hold what comes behind it; and the outermost blocks of
    the part, where it `is_cut` before or behind because what some rank needs begins or ends there.

    Args:
        items: those that the part touches, in order of their place.
    """
    found = []
    for item in items:
        size, end = item.block_size_bytes, item.offset + item.length
        start, stop = max(part[0], item.offset), min(part[1], end)
        if start == item.offset or (start == part[0] and is_cut[0]):
            start += size
        if stop == end:
            stop = item.offset + ((item.length - 1) // size - 1) * size
        elif stop == part[1] and is_cut[1]:
            stop -= size
        if stop - start >= long_size_bytes:
            found.append((start, stop))
    return tuple(found)


def item_segments(
    index: int, item: ItemPlace, wants: Sequence[Want], long_size_bytes: int = LONG_SIZE_BYTES
) -> list[Segment]:
    """The blocks of an item that `wants` touch, in order; of the direct segments only the long ones are left direct."""
    found: list[Segment] = []
    for segment in segments_of(index, item, wants):
        if segment.direct is not None and segment.stop - segment.start < long_size_bytes:
            segment = dataclasses.replace(segment, direct=None, wants=(segment.direct,))
        if found and segment.direct is None and found[-1].direct is None and found[-1].stop == segment.start:
            before = found.pop()
            wants_of_both = tuple(dict.fromkeys((*before.wants, *segment.wants)))
            segment = dataclasses.replace(before, last_block=segment.last_block, stop=segment.stop, wants=wants_of_both)
        found.append(segment)
    return found


def clipped(segments: Sequence[Segment], block_size_bytes: int, byte_range: Range) -> Iterator[Segment]:
    """What is of an item's segments, which are in order, in the range, which begins and ends between blocks."""
    for number in range(bisect.bisect_right(segments, byte_range[0], key=_stop_of), len(segments)):
        segment = segments[number]
        if segment.start >= byte_range[1]:
            return
        yield between(segment, block_size_bytes, max(byte_range[0], segment.start), min(byte_range[1], segment.stop))


def _stop_of(segment: Segment) -> int:
    return segment.stop
