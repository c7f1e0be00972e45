"""What one rank wants of a checkpoint: DCP's read items as wants for byte ranges, each with the target it goes to."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from storage.errors import Corrupt, UnloadableValue, UnsupportedValue
from storage.format.columns import Array, Ints
from storage.format.dcp_metadata import torch_dtype
from storage.format.index import Index
from storage.format.stock import Layout
from storage.format.tensors import oddity, overlaps
from storage.format.values import decode_value
from storage.format.zips import RunningSum, check_zip
from storage.loading.casts import Casts, may_overflow
from storage.loading.readplan import NOWHERE, ItemSpan, Part, Segment, Stripes, Want, box_runs, box_stripes, run_length
from storage.loading.shareplan import merged
from storage.loading.targets import (
    FreshSlabs,
    ItemTarget,
    PinnedRing,
    SlabTarget,
    Target,
    TensorTarget,
    cuda_copies,
    fill,
)
from storage.torch_private import is_without_memory


@runtime_checkable
class TakesValues(Protocol):
    """A planner that takes a value as such, and not as the bytes of its pickle."""

    def load_value(self, read_item: ReadItem, value: object) -> None:
        """Put it where the item belongs."""


Box = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Sizes of a tensor, and offsets and lengths of a part of it."""

_RUN_SIZE_BYTES_MIN = 32 * 1024  # shorter runs are fetched with what lies between them


@dataclass
class Requests:
    """The wants of a rank, in no particular order; `Want.buffer` is the number of its target.

    `striped`: of the items that are wanted for nothing but some stripes, those. `sums`: of the long items of stock DCP
    whose layout is known; this rank reads all of each. `failed`: other long items that were read whole, and differ from
    their checksums. `at_end`: by item, to be called when everything is read and verified.
    """

    spans: dict[int, ItemSpan] = field(default_factory=dict)
    wants: list[Want] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    rings: dict[torch.device, PinnedRing] = field(default_factory=dict)
    sums: dict[int, RunningSum] = field(default_factory=dict)
    failed: dict[int, Corrupt] = field(default_factory=dict)
    at_end: dict[int, list[Callable[[], None]]] = field(default_factory=dict)

    def damaged(self) -> dict[int, Corrupt]:
        """The long items that are not what was written; to be asked when everything is read."""
        found = dict(self.failed)
        for item, total in self.sums.items():
            try:
                total.check()
            except Corrupt as error:
                found[item] = error
        return found

    def striped(self) -> dict[int, Stripes]:
        """See the class."""
        found: dict[int, Stripes | None] = {}
        for want in self.wants:
            if want.buffer != NOWHERE and want.item not in self.sums:
                found[want.item] = None if want.item in found else want.stripes
        return {item: stripes for item, stripes in found.items() if stripes is not None}

    def needs(self, axis: Ints) -> Ints:
        """The blocks that are touched, as ascending ranges of the axis."""
        rows = np.array([(want.item, want.start, want.stop) for want in self.wants], np.int64).reshape(-1, 3)
        of = [self.spans[item] for item in rows[:, 0].tolist()]
        size = np.fromiter((span.block_size_bytes for span in of), np.int64, len(of))
        length = np.fromiter((span.length for span in of), np.int64, len(of))
        low = rows[:, 1] // size * size
        high = np.minimum(-(-rows[:, 2] // size) * size, length)
        start = axis[rows[:, 0]]
        return merged(np.stack((start + low, start + high), axis=1))

    def view(self, segment: Segment) -> memoryview | None:
        """The memory that takes a segment as it is, if there is one."""
        want = segment.direct
        if want is None or not self.targets[want.buffer].is_direct:
            return None
        return self.targets[want.buffer].view(want.at + segment.item_start - want.start, segment.stop - segment.start)

    def held_bytes(self, part: Part) -> int:
        """What fetching the part takes of memory that is no tensor's."""
        straight = sum(
            segment.stop - segment.start
            for segment in part.segments
            if segment.direct is not None and isinstance(self.targets[segment.direct.buffer], TensorTarget)
        )
        return part.stop - part.start - straight

    def filled(self, segment: Segment) -> None:
        """A segment was read into its view."""
        assert segment.direct is not None
        self.targets[segment.direct.buffer].filled(segment.stop - segment.start)

    def deliver(self, segment: Segment, memory: memoryview) -> None:
        """Copy a segment's bytes to the targets that want some of them."""
        origin = segment.item_start
        for want in [segment.direct] if segment.direct else segment.wants:
            low, high = max(want.start, origin), min(want.stop, origin + memory.nbytes)
            if want.buffer == NOWHERE or low >= high:
                continue
            content = memory[low - origin : high - origin]
            at = want.at + low - want.start
            if want.stripes is not None:
                at = want.at + want.stripes.before(low)
                content = as_bytes(packed(np.frombuffer(content, np.uint8), low, want.stripes))
            self.targets[want.buffer].write(at, content)

    def deliver_stripes(self, segment: Segment, first: int, content: memoryview) -> None:
        """Put bytes of the only stripes that are wanted of the segment's item, from number `first` of theirs on."""
        (want,) = (want for want in segment.wants if want.buffer != NOWHERE)
        self.targets[want.buffer].write(want.at + first, content)


def long_items(index: Index, items: Sequence[ReadItem]) -> list[int]:
    """Those of stock DCP's items which hold a tensor and are long, among the ones that the read items name.

    Raises:
        Corrupt: the checkpoint does not have what an item asks for.
    """
    if not index.is_stock or not bool((index.columns.length > index.columns.block_size_bytes).any()):
        return []
    places = [read.storage_index for read in items if read.type is not LoadItemType.BYTE_IO and read.lengths.numel()]
    found = {index.find(place.fqn, place.offset, place.index) for place in places}
    return sorted(item for item in found if index.is_long(item))


def reads_of(index: Index, items: Sequence[ReadItem], among: Collection[int]) -> list[ReadItem]:
    """Those of the read items that want something of the index's items `among`."""
    wanting = (read for read in items if read.type is LoadItemType.BYTE_IO or read.lengths.numel())
    places = ((read, read.storage_index) for read in wanting)
    return [read for read, place in places if index.find(place.fqn, place.offset, place.index) in among]


def requests_of(
    index: Index,
    items: Sequence[ReadItem],
    planner: LoadPlanner,
    layouts: Mapping[int, Layout] = MappingProxyType({}),
    casts: Casts | None = None,
) -> Requests:
    """Resolve every read item to a target in what `planner` fills.

    Args:
        layouts: of the long items of stock DCP, where they are known; others of them are read into memory whole.
        casts: learns which tensors go into others of another dtype, and is asked whether they may.

    Raises:
        WrongModel: a tensor would lose by a change of its dtype.
        UnsupportedValue: the checkpoint was written with DCP's stream transforms, or a tensor cannot be filled.
        Corrupt: it does not have what an item asks for.
        ValueError: the planner resolves an item to a tensor of another shape.
    """
    if index.transforms:
        through = ", ".join(index.transforms)
        raise UnsupportedValue(f"{index.prefix} was stored through {through}; save it without transforms to load it")
    casts = Casts() if casts is None else casts
    builder = _StockBuilder(index, planner, casts, layouts) if index.is_stock else _Builder(index, planner, casts)
    for read in items:
        if read.type is LoadItemType.BYTE_IO or read.lengths.numel():
            place = read.storage_index
            builder.add(index.find(place.fqn, place.offset, place.index), read)
    casts.check()
    return builder.found()


def as_bytes(array: Array) -> memoryview:
    """The array's memory."""
    return memoryview(array)  # type: ignore[arg-type]


def packed(memory: Array, origin: int, stripes: Stripes) -> Array:
    """The stripes' bytes among `memory`, which are the bytes of the item from `origin` on."""
    low, high = stripes.before(origin), stripes.before(origin + len(memory))
    size = stripes.length
    first, last = -(-low // size), high // size  # the runs that are there as a whole

    def some(start: int, stop: int) -> Array:
        """Bytes [start, stop) of the stripes' bytes, which are of one run."""
        run, rest = divmod(start, size)
        place = stripes.start + run * stripes.stride + rest - origin
        return memory[place : place + stop - start]

    if first > last:
        return some(low, high)
    runs = [some(low, first * size)] if low < first * size else []
    if first < last:
        place = stripes.start + first * stripes.stride - origin
        shape = (last - first, size)
        runs.append(np.lib.stride_tricks.as_strided(memory[place:], shape, (stripes.stride, 1)).reshape(-1))
    if last * size < high:
        runs.append(some(last * size, high))
    return np.concatenate(runs) if runs else memory[:0]


class _Builder:
    """Requests of a checkpoint of ours: bytes of items, by their raw offsets."""

    def __init__(self, index: Index, planner: LoadPlanner, casts: Casts) -> None:
        self._index = index
        self._planner = planner
        self._casts = casts
        self._requests = Requests()

    def found(self) -> Requests:
        """What was added."""
        return self._requests

    def add(self, item: int, read: ReadItem) -> None:
        """Want what `read` asks of the item."""
        columns = self._index.columns
        where, offset, length, block = (
            int(column[item]) for column in (columns.object, columns.offset, columns.length, columns.block_size_bytes)
        )
        self._requests.spans[item] = ItemSpan(where, offset, length, block)
        if read.type is LoadItemType.BYTE_IO:
            key, planner = read.storage_index.fqn, self._planner

            def finish(memory: memoryview) -> None:
                _put_value(planner, read, decode_value(memory, key))

            self._want(Want(item, 0, length, self._target(ItemTarget(length, finish)), 0))
        else:
            self._add_tensor(item, int(columns.raw_offset[item]), length, read)

    def _add_tensor(self, item: int, raw_offset: int, length: int, read: ReadItem) -> None:
        key = read.storage_index.fqn
        dtype = torch_dtype(self._index.entries[key].dtype)
        sizes, lengths, offsets = self._index.box(key, item)[1], tuple(read.lengths), tuple(read.storage_offsets)
        target = self._target(self._tensor_target(read, dtype))
        self._want_box(item, raw_offset, dtype.itemsize, (sizes, offsets, lengths), target)
        raw_stop = raw_offset + math.prod(sizes) * dtype.itemsize
        if raw_stop < length and all(o + n == size for o, n, size in zip(offsets, lengths, sizes, strict=True)):
            # whoever reads the last byte also has the framing behind it checked; the first block holds that before
            self._want(Want(item, raw_stop, length, NOWHERE, 0))

    def _want_box(self, item: int, raw_offset: int, itemsize_bytes: int, box: Box, target: int) -> None:
        """Want a box of a row-major tensor which begins `raw_offset` bytes after its item."""
        sizes, _, lengths = box
        run_bytes = run_length(sizes, lengths) * itemsize_bytes
        if run_bytes >= _RUN_SIZE_BYTES_MIN or run_bytes == math.prod(lengths) * itemsize_bytes:
            runs = box_runs(*box, itemsize_bytes)
            for number, start in enumerate(runs.starts):
                first = raw_offset + start
                self._want(Want(item, first, first + runs.length, target, number * runs.length))
        else:
            at = 0
            for stripes in box_stripes(*box, itemsize_bytes):
                moved = Stripes(raw_offset + stripes.start, stripes.stride, stripes.length, stripes.count)
                self._want(Want(item, moved.start, moved.stop, target, at, moved))
                at += moved.length * moved.count

    def _tensor_target(self, read: ReadItem, dtype: torch.dtype, order: Sequence[int] = ()) -> Target:
        """What takes the tensor's bytes, row-major after its dimensions were put into `order`."""
        tensor = destination_of(self._planner, read)
        overflowed = noted(self._casts, read.storage_index.fqn, dtype, tensor.dtype)
        if tensor.shape != read.lengths:
            name = read.storage_index.fqn
            raise ValueError(f"{name!r}: planned {tuple(read.lengths)}, resolved {tuple(tensor.shape)}")
        finish = functools.partial(self._finish, read, tensor)
        turned = tensor.permute(*order) if order else tensor
        if _is_plain(turned, dtype):
            return TensorTarget(turned, finish)
        if not tensor.is_cuda:
            return SlabTarget(turned, dtype, FreshSlabs(), finish, overflowed=overflowed)
        rings = self._requests.rings
        if tensor.device not in rings:
            rings[tensor.device] = PinnedRing(cuda_copies(tensor.device))
        return SlabTarget(turned, dtype, rings[tensor.device], finish, overflowed=overflowed)

    def _finish(self, read: ReadItem, tensor: torch.Tensor) -> None:
        """All that `read` asks for is in `tensor`, and verified."""
        self._planner.commit_tensor(read, tensor)

    def _target(self, target: Target) -> int:
        self._requests.targets.append(target)
        return len(self._requests.targets) - 1

    def _want(self, want: Want) -> None:
        self._requests.wants.append(want)


class _StockBuilder(_Builder):
    """Requests of a checkpoint of stock DCP, whose items have one checksum each: they are read whole."""

    def __init__(self, index: Index, planner: LoadPlanner, casts: Casts, layouts: Mapping[int, Layout]) -> None:
        super().__init__(index, planner, casts)
        self._layouts = layouts
        self._reads_of: dict[int, list[ReadItem]] = {}

    def add(self, item: int, read: ReadItem) -> None:
        """Want the item, once for all reads of it."""
        reads = self._reads_of.setdefault(item, [])
        reads.append(read)
        columns = self._index.columns
        where, offset, length, block = (
            int(column[item]) for column in (columns.object, columns.offset, columns.length, columns.block_size_bytes)
        )
        self._requests.spans[item] = ItemSpan(where, offset, length, block)
        layout = self._layouts.get(item)
        if layout is not None and layout.sizes == self._index.box(read.storage_index.fqn, item)[1]:
            self._add_long(item, layout, length, read)
            return
        if read.type is not LoadItemType.BYTE_IO:
            dtype = torch_dtype(self._index.entries[read.storage_index.fqn].dtype)
            noted(self._casts, read.storage_index.fqn, dtype, destination_of(self._planner, read).dtype)
        if len(reads) == 1:
            target = self._target(ItemTarget(length, self._deliverer(item, where, reads)))
            self._want(Want(item, 0, length, target, 0))

    def _add_long(self, item: int, layout: Layout, length: int, read: ReadItem) -> None:
        """Want the bytes that `read` asks for where they belong, and all others of the item for its sum."""
        name = f"{self._index.prefix}{self._index.objects[int(self._index.columns.object[item])].name}"
        self._requests.sums.setdefault(item, RunningSum(layout.start, layout.stop, layout.crc32, name))
        sizes, offsets, lengths = (
            tuple(int(of_dims[dim]) for dim in layout.order)
            for of_dims in (layout.sizes, read.storage_offsets, read.lengths)
        )
        target = self._target(self._tensor_target(read, layout.dtype, layout.order))
        self._want_box(item, layout.raw_offset, layout.dtype.itemsize, (sizes, offsets, lengths), target)
        if lengths == sizes:
            raw_stop = layout.raw_offset + math.prod(sizes) * layout.dtype.itemsize
            self._want(Want(item, 0, layout.raw_offset, NOWHERE, 0))
            self._want(Want(item, raw_stop, length, NOWHERE, 0))
        else:
            self._want(Want(item, 0, length, NOWHERE, 0))

    def _finish(self, read: ReadItem, tensor: torch.Tensor) -> None:
        # the sum of its item may not be complete yet
        place = read.storage_index
        item = self._index.find(place.fqn, place.offset, place.index)
        self._requests.at_end.setdefault(item, []).append(functools.partial(self._planner.commit_tensor, read, tensor))

    def _deliverer(self, item: int, where: int, reads: Sequence[ReadItem]) -> Callable[[memoryview], None]:
        planner, object_key = self._planner, self._index.prefix + self._index.objects[where].name

        def finish(memory: memoryview) -> None:
            if self._index.is_long(item):  # of the others the parts that were read have been verified
                try:
                    check_zip(memory, object_key)
                except Corrupt as error:
                    self._requests.failed[item] = error
                    return
            try:
                value = decode_value(memory, reads[0].storage_index.fqn, is_checked=False)
            except Corrupt as error:
                raise Corrupt(str(error), object_key) from error
            for read in reads:
                if read.type is LoadItemType.BYTE_IO:
                    _put_value(planner, read, value)
                else:
                    self._deliver(item, read, value)

        return finish

    def _deliver(self, item: int, read: ReadItem, value: object) -> None:
        key = read.storage_index.fqn
        dtype, sizes = torch_dtype(self._index.entries[key].dtype), self._index.box(key, item)[1]
        if not isinstance(value, torch.Tensor) or (value.dtype, value.shape) != (dtype, sizes):
            raise UnloadableValue(f"{key!r} is stored as another thing than the checkpoint's index says; leave it out")
        box = tuple(slice(o, o + n) for o, n in zip(read.storage_offsets, read.lengths, strict=True))
        destination = self._planner.resolve_tensor(read).detach()
        fill(destination, value[box], noted(self._casts, key, dtype, destination.dtype))
        self._planner.commit_tensor(read, destination)


def _put_value(planner: LoadPlanner, read: ReadItem, value: object) -> None:
    if isinstance(planner, TakesValues):
        planner.load_value(read, value)
        return
    # other planners load with pickle: what they get was not read from anywhere, but is written here
    again = io.BytesIO()
    torch.save(value, again)
    again.seek(0)
    planner.load_bytes(read, again)


def destination_of(planner: LoadPlanner, read: ReadItem) -> torch.Tensor:
    """The tensor that `read` fills. Raises UnsupportedValue for one that cannot be filled."""
    tensor = planner.resolve_tensor(read)
    why = oddity(tensor)
    if why is None and is_without_memory(tensor):
        why = "of zeros that have no memory; clone() it"
    if why is None and overlaps(tensor):
        why = "whose elements share memory, as of one that is expanded; clone() it"
    if why is not None:
        raise UnsupportedValue(f"{read.dest_index.fqn!r} cannot be restored into a tensor {why}")
    return tensor.detach()


def noted(casts: Casts, key: str, stored: torch.dtype, wanted: torch.dtype) -> Callable[[int], None] | None:
    """Note what is to be read; who is to be told of overflows, if there may be any."""
    names = str(stored).removeprefix("torch."), str(wanted).removeprefix("torch.")
    casts.note(key, *names)
    return functools.partial(casts.overflowed, key) if may_overflow(*names) else None


def _is_plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the tensor's memory takes the stored bytes as they are."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == dtype
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )
