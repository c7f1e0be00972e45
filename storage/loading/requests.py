"""What one rank wants of a checkpoint: byte ranges of items, each with the target that it goes to."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.distributed.checkpoint.planner import ReadItem

from storage.errors import Corrupt
from storage.format.columns import Array, Ints
from storage.loading.shareplan import merged
from storage.loading.targets import PinnedRing, Target, TensorTarget
from storage.verified.readplan import NOWHERE, ItemPlace, Part, Segment, Stripes, Want
from storage.verified.verifiers import Verifier


@dataclass
class Requests:
    """The wants of a rank, in no particular order; `Want.target` is the number of its target.

    `reads`: by item, DCP's read items that it is wanted for. `waiting`: by item, what is to be called once all of the
    item is verified.
    """

    reads: dict[int, list[ReadItem]] = field(default_factory=dict)
    places: dict[int, ItemPlace] = field(default_factory=dict)
    wants: list[Want] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    rings: dict[torch.device, PinnedRing] = field(default_factory=dict)
    waiting: dict[int, list[Callable[[], None]]] = field(default_factory=lambda: defaultdict(list))

    def hand_over(self, item: int, verifier: Verifier, call: Callable[[], None]) -> None:
        """A target is full, of an item that is judged as a whole: `call` takes it over, now or once that is settled."""
        self.waiting[item].append(call)
        if verifier.is_complete:
            with contextlib.suppress(Corrupt):  # the item is read again when all others are there
                self.settle(item, verifier)

    def settle(self, item: int, verifier: Verifier) -> None:
        """Hand over what waits for the item. Raises Corrupt: it is damaged."""
        verifier.check()
        for call in self.waiting[item]:
            call()
        del self.waiting[item]

    def striped(self) -> dict[int, Stripes]:
        """The items that are wanted for nothing but some stripes, with those."""
        found: dict[int, Stripes | None] = {}
        for want in self.wants:
            found[want.item] = None if want.item in found else want.stripes
        return {item: stripes for item, stripes in found.items() if stripes is not None}

    def needs(self, axis: Ints) -> Ints:
        """The blocks that are touched, as ascending ranges of the axis."""
        rows = np.array([(want.item, want.start, want.stop) for want in self.wants], np.int64).reshape(-1, 3)
        of = [self.places[item] for item in rows[:, 0].tolist()]
        size = np.fromiter((place.block_size_bytes for place in of), np.int64, len(of))
        length = np.fromiter((place.length for place in of), np.int64, len(of))
        low = rows[:, 1] // size * size
        high = np.minimum(-(-rows[:, 2] // size) * size, length)
        start = axis[rows[:, 0]]
        return merged(np.stack((start + low, start + high), axis=1))

    def view(self, segment: Segment, *, is_made: bool = True) -> memoryview | None:
        """The memory that takes a segment as it is, if there is one; `is_made` as for `Target.view`."""
        want = segment.direct
        if want is None or not self.targets[want.target].is_direct:
            return None
        at, size_bytes = want.at + segment.item_start - want.start, segment.stop - segment.start
        return self.targets[want.target].view(at, size_bytes, is_made=is_made)

    def held_bytes(self, part: Part) -> int:
        """How many bytes of memory other than a tensor's are held while the part is fetched."""
        straight = sum(
            segment.stop - segment.start
            for segment in part.segments
            if segment.direct is not None and isinstance(self.targets[segment.direct.target], TensorTarget)
        )
        return part.stop - part.start - straight

    def filled(self, segment: Segment) -> None:
        """Tell the target that a segment was read into its view."""
        assert segment.direct is not None
        self.targets[segment.direct.target].filled(segment.stop - segment.start)

    def deliver(self, segment: Segment, memory: memoryview) -> None:
        """Copy a segment's bytes, which lie in `memory`, to the targets that want some of them."""
        origin = segment.item_start
        for want in [segment.direct] if segment.direct else segment.wants:
            low, high = max(want.start, origin), min(want.stop, origin + memory.nbytes)
            if want.target == NOWHERE or low >= high:
                continue
            content = memory[low - origin : high - origin]
            at = want.at + low - want.start
            if want.stripes is not None:
                at = want.at + want.stripes.before(low)
                content = as_bytes(packed(np.frombuffer(content, np.uint8), low, want.stripes))
            self.targets[want.target].write(at, content)

    def deliver_stripes(self, segment: Segment, first: int, content: memoryview) -> None:
        """Put bytes of the only stripes that are wanted of the segment's item, from number `first` of theirs on."""
        (want,) = (want for want in segment.wants if want.target != NOWHERE)
        self.targets[want.target].write(want.at + first, content)


def as_bytes(array: Array) -> memoryview:
    """The array's memory."""
    return memoryview(array)  # type: ignore[arg-type]


def packed(memory: Array, origin: int, stripes: Stripes) -> Array:
    """The stripes' bytes among `memory`, which are the bytes of the item from `origin` on."""
    low, high = stripes.before(origin), stripes.before(origin + len(memory))
    size = stripes.length
    first, last = -(-low // size), high // size  # those that are there as a whole

    def some(start: int, stop: int) -> Array:
        """Bytes [start, stop) of the stripes laid end to end, which lie in a single one."""
        number, rest = divmod(start, size)
        place = stripes.start + number * stripes.stride + rest - origin
        return memory[place : place + stop - start]

    if first > last:
        return some(low, high)
    found = [some(low, first * size)] if low < first * size else []
    if first < last:
        place = stripes.start + first * stripes.stride - origin
        shape = (last - first, size)
        found.append(np.lib.stride_tricks.as_strided(memory[place:], shape, (stripes.stride, 1)).reshape(-1))
    if last * size < high:
        found.append(some(last * size, high))
    return np.concatenate(found) if found else memory[:0]
