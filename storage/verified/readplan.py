"""What to fetch for the bytes that a rank wants. Pure: no torch, no store, no threads.

    boxes of tensors -> stripes of items (`box_stripes`) -> wants -> whole blocks -> merged per object -> parts

A part is one request. It is made of segments: whole blocks of one item, which are either *direct* (they lie inside
one want, so their bytes go straight into the destination) or go through scratch memory, from where the wanted bytes
are copied once the blocks' checksums hold.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

PART_SIZE_BYTES = 16 * 1024 * 1024
GAP_SIZE_BYTES = 0

Range = tuple[int, int]
Slice = tuple[int, int, int]
"""Of which of several memories, from where to where."""


@dataclass(frozen=True, slots=True)
class ItemPlace:
    """Where an item lies in its object, and the size of the blocks that it is verified by."""

    object: int
    offset: int
    length: int
    block_size_bytes: int


@dataclass(frozen=True, slots=True)
class Stripes:
    """`count` ranges of `length` bytes, the first at `start`, each `stride` bytes after the one before."""

    start: int
    stride: int
    length: int
    count: int

    @property
    def stop(self) -> int:
        """Where the last one stops."""
        return self.start + (self.count - 1) * self.stride + self.length

    @property
    def starts(self) -> range:
        """Where each of them begins."""
        return range(self.start, self.start + self.count * self.stride, self.stride)

    def before(self, position: int) -> int:
        """How many of the stripes' bytes come before `position`."""
        num, rest = divmod(max(0, position - self.start), self.stride)
        return min(num * self.length + min(rest, self.length), self.count * self.length)


NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Want:
    """Bytes [start, stop) of an item, wanted at byte `at` of target number `target`; only the stripes of
    them, if given.

    A want for `NOWHERE` has its blocks fetched and verified, no more.
    """

    item: int
    start: int
    stop: int
    target: int
    at: int
    stripes: Stripes | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks [first_block, last_block) of an item, which begin `item_start` bytes after the item's first byte.

    In the object they are the bytes [start, stop).

    `direct`: the one want that takes bytes of them, and takes them all; None where they go through scratch for all of
    `wants`.
    """

    item: int
    item_start: int
    first_block: int
    last_block: int
    start: int
    stop: int
    direct: Want | None
    wants: tuple[Want, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One request: bytes [start, stop) of an object. Bytes between its segments are fetched and thrown away."""

    object: int
    start: int
    stop: int
    segments: tuple[Segment, ...]


def box_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements, of an array of those sizes."""
    return tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))


def stripe_length(sizes: Sequence[int], lengths: Sequence[int]) -> int:
    """Elements of the longest stripes that a box of those lengths is made of, in a row-major array of those sizes."""
    num = 1
    for size, length in zip(reversed(sizes), reversed(lengths), strict=True):
        num *= length
        if length != size:
            break
    return num


def box_stripes(
    sizes: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], itemsize_bytes: int
) -> list[Stripes]:
    """The bytes of the box at `offsets` with `lengths` (none of them 0) in a row-major array of `sizes`.

    As few and as long as can be, in the box's own row-major order.
    """
    strides = box_strides(sizes)
    length = stripe_length(sizes, lengths)
    # the dimensions that a stripe covers are stepped over; the outer ones enumerate the stripes
    outer = 0
    while math.prod(lengths[outer:]) > length:
        outer += 1
    even = max(outer - 1, 0)  # from here on the stripes follow each other at one stride
    while even and strides[even - 1] == strides[even] * lengths[even]:
        even -= 1
    count = math.prod(lengths[even:outer])
    stride = (strides[outer - 1] if outer else length) * itemsize_bytes
    firsts = _starts(offsets, lengths, strides, even)
    return [Stripes(first * itemsize_bytes, stride, length * itemsize_bytes, count) for first in firsts]


def _starts(offsets: Sequence[int], lengths: Sequence[int], strides: Sequence[int], outer: int) -> Iterable[int]:
    """Where the box's parts begin, one for each index of the first `outer` dimensions."""
    steps = [[(offsets[dim] + index) * strides[dim] for index in range(lengths[dim])] for dim in range(outer)]
    base = sum(offsets[dim] * strides[dim] for dim in range(outer, len(strides)))
    return (base + sum(step) for step in itertools.product(*steps))


def plan_parts(
    items: Mapping[int, ItemPlace],
    wants: Iterable[Want],
    received: Mapping[int, Sequence[Range]] = MappingProxyType({}),
    *,
    part_size_bytes: int = PART_SIZE_BYTES,
    gap_size_bytes: int = GAP_SIZE_BYTES,
) -> list[Part]:
    """The requests that fetch every block touched by a want exactly once, and nothing else but coalesced gaps.

    Args:
        items: what `Want.item` names.
        wants: non-empty byte ranges; they may overlap.
        received: by object, byte ranges in order that come from elsewhere; they begin and end between blocks.
        part_size_bytes: a part is at most this long (but at least one block), and an eighth more: an item of that size
            with its framing is one request, and no small rest is one of its own.
        gap_size_bytes: segments this near to each other share a part.
    """
    wants_of: dict[int, list[Want]] = defaultdict(list)
    for want in wants:
        wants_of[want.item].append(want)
    segments: dict[int, list[Segment]] = defaultdict(list)
    for index, item_wants in wants_of.items():
        segments[items[index].object] += segments_of(index, items[index], item_wants)
    parts: list[Part] = []
    for index in sorted(segments):
        in_order = sorted(segments[index], key=lambda segment: segment.start)
        limited = itertools.chain.from_iterable(
            _split(rest, items[segment.item].block_size_bytes, part_size_bytes)
            for segment in in_order
            for rest in _without(segment, items[segment.item].block_size_bytes, received.get(index, ()))
        )
        parts += _merge(index, limited, part_size_bytes, gap_size_bytes)
    return parts


def segments_of(index: int, item: ItemPlace, wants: Sequence[Want]) -> list[Segment]:
    """The blocks that `wants` touch, as few segments as can be, in order."""
    size = item.block_size_bytes
    wants = sorted(wants, key=lambda want: (want.start, want.stop))

    def segment(first: int, last: int, direct: Want | None, through: Iterable[Want]) -> Segment:
        stop = min(last * size, item.length)
        start = first * size
        return Segment(index, start, first, last, item.offset + start, item.offset + stop, direct, tuple(through))

    # cut the touched blocks where the set of wants that touch a block changes
    edges: dict[int, list[Want]] = defaultdict(list)
    cuts = set()
    for want in wants:
        first, last = want.start // size, -(-want.stop // size)
        whole_first = -(-want.start // size)
        whole_last = last if want.stop == item.length else want.stop // size
        edges[first].append(want)
        cuts |= {first, last} | ({whole_first, whole_last} if whole_first < whole_last else set())
    found: list[Segment] = []
    active: list[Want] = []
    for first, last in itertools.pairwise(sorted(cuts)):
        active = [want for want in active if want.stop > first * size] + edges.get(first, [])
        if not active:
            continue
        stop = min(last * size, item.length)
        takers = [want for want in active if want.target != NOWHERE]
        only = takers[0] if len(takers) == 1 else None
        if only is not None and only.stripes is None and only.start <= first * size and stop <= only.stop:
            found.append(segment(first, last, only, ()))
        elif found and found[-1].direct is None and found[-1].last_block == first:
            previous = found.pop()
            through = dict.fromkeys((*previous.wants, *active))
            found.append(segment(previous.first_block, last, None, through))
        else:
            found.append(segment(first, last, None, active))
    return found


def _without(segment: Segment, block_size_bytes: int, received: Sequence[Range]) -> Iterable[Segment]:
    """What is left of the segment between what is received."""
    at = segment.start
    for start, stop in received[bisect.bisect_right(received, at, key=_stop_of) :]:
        if start >= segment.stop:
            break
        if at < start:
            yield between(segment, block_size_bytes, at, start)
        at = stop
    if at < segment.stop:
        yield between(segment, block_size_bytes, at, segment.stop)


def _stop_of(byte_range: Range) -> int:
    return byte_range[1]


def between(segment: Segment, block_size_bytes: int, start: int, stop: int) -> Segment:
    """Those of the segment's blocks that are the bytes [start, stop) of the object."""
    if (start, stop) == (segment.start, segment.stop):
        return segment
    skipped = start - segment.start
    return dataclasses.replace(
        segment,
        item_start=segment.item_start + skipped,
        first_block=segment.first_block + skipped // block_size_bytes,
        last_block=segment.first_block - (segment.start - stop) // block_size_bytes,
        start=start,
        stop=stop,
    )


def _split(segment: Segment, block_size_bytes: int, part_size_bytes: int) -> Iterable[Segment]:
    """The segment cut between blocks, so that nothing is longer than `part_size_bytes` and an eighth."""
    step = max(1, part_size_bytes // block_size_bytes)
    first, start = segment.first_block, segment.start
    while first < segment.last_block:
        last, stop = first + step, start + step * block_size_bytes
        if last >= segment.last_block or segment.stop - stop <= part_size_bytes // 8:
            last, stop = segment.last_block, segment.stop
        yield between(segment, block_size_bytes, start, stop)
        first, start = last, stop


def bites(part: Part, block_size_bytes: Callable[[int], int], size_bytes: int) -> Iterator[tuple[Part, list[Slice]]]:
    """The part cut into such of at most `size_bytes` (and an eighth), between blocks; what lies between its segments is
    left out where that is a cut. With each, by segment, where it lies in which segment of the part.

    `block_size_bytes`: of an item's blocks, by its number.
    """
    group: list[Segment] = []
    places: list[Slice] = []
    for number, whole in enumerate(part.segments):
        for segment in _split(whole, block_size_bytes(whole.item), size_bytes):
            if group and segment.stop - group[0].start > size_bytes + size_bytes // 8:
                yield Part(part.object, group[0].start, group[-1].stop, tuple(group)), places
                group, places = [], []
            group.append(segment)
            places.append((number, segment.start - whole.start, segment.stop - whole.start))
    if group:
        yield Part(part.object, group[0].start, group[-1].stop, tuple(group)), places


def _merge(index: int, segments: Iterable[Segment], part_size_bytes: int, gap_size_bytes: int) -> list[Part]:
    parts: list[Part] = []
    group: list[Segment] = []
    size_bytes_max = part_size_bytes + part_size_bytes // 8
    for segment in segments:
        if group and (
            segment.start - group[-1].stop > gap_size_bytes or segment.stop - group[0].start > size_bytes_max
        ):
            parts.append(Part(index, group[0].start, group[-1].stop, tuple(group)))
            group = []
        group.append(segment)
    if group:
        parts.append(Part(index, group[0].start, group[-1].stop, tuple(group)))
    return parts
