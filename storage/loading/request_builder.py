"""From DCP's read items to requests: what of which item each asks for, and the target that takes it."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from storage.errors import UnloadableValue, UnsupportedValue
from storage.format.dtypes import torch_dtype
from storage.format.index import Index
from storage.format.tensors import oddity, overlaps
from storage.format.values import decode_value
from storage.loading.casts import Casts, may_overflow
from storage.loading.requests import Requests
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
from storage.verified.readplan import NOWHERE, Want, box_stripes, stripe_length
from storage.verified.source import Source, blaming

Reads = Mapping[int, list[ReadItem]]
"""DCP's read items, by the item of the index that each is for."""
Box = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Sizes of a tensor, and offsets and lengths of a part of it."""

_STRIPE_SIZE_BYTES_MIN = 32 * 1024  # shorter ones are fetched with what lies between them


@runtime_checkable
class TakesValues(Protocol):
    """A planner that takes a value as such, and not as the bytes of its pickle."""

    def load_value(self, read_item: ReadItem, value: object) -> None:
        """Put it where the item belongs."""


def reads_by_item(index: Index, items: Iterable[ReadItem]) -> dict[int, list[ReadItem]]:
    """The read items that want something, by the item of the index that each is for.

    Raises:
        Corrupt: the checkpoint does not have what one asks for.
        UnsupportedValue: it was written with DCP's stream transforms.
    """
    if index.transforms:
        through = ", ".join(index.transforms)
        raise UnsupportedValue(f"{index.prefix} was stored through {through}; save it without transforms to load it")
    found: dict[int, list[ReadItem]] = {}
    for read in items:
        if read.type is LoadItemType.BYTE_IO or read.lengths.numel():
            place = read.storage_index
            found.setdefault(index.find(place.fqn, place.offset, place.index), []).append(read)
    return found


def requests_of(source: Source, reads: Reads, planner: LoadPlanner, casts: Casts) -> Requests:
    """A target in what `planner` fills for every read item, and what has to be fetched for it.

    `casts` learns which tensors go into others of another dtype, and is asked whether they may.

    Raises:
        WrongModel: a tensor would lose by a change of its dtype.
        UnsupportedValue: a tensor cannot be filled.
        ValueError: the planner resolves an item to a tensor of another shape.
    """
    builder = _Builder(source, planner, casts)
    for item, of_item in reads.items():
        builder.add(item, of_item)
    casts.check()
    return builder.requests


@dataclass(frozen=True)
class _TensorPlace:
    """Where a tensor's bytes lie in its item: `raw_offset` bytes after its start, row-major after its dimensions were
    put into `order`; `sizes` are those before.
    """

    dtype: torch.dtype
    sizes: Sequence[int]
    order: Sequence[int]
    raw_offset: int


class _Builder:
    def __init__(self, source: Source, planner: LoadPlanner, casts: Casts) -> None:
        self._source = source
        self._index = source.index
        self._planner = planner
        self._casts = casts
        self.requests = Requests()

    def add(self, item: int, reads: list[ReadItem]) -> None:
        """Want what each of `reads` asks of the item."""
        place = self.requests.places[item] = self._source.place(item)
        self.requests.reads[item] = reads
        layout = self._layout(item, reads[0])
        if layout is None:
            self._add_whole(item, place.length, reads)
            return
        is_whole = item in self._source.layouts
        for read in reads:
            self._add_box(item, layout, read)
            is_whole |= tuple(read.lengths) == tuple(layout.sizes)
        if is_whole:  # the last block has framing behind the tensor, which is checked as well
            self._want(Want(item, 0, place.length, NOWHERE, 0))

    def _layout(self, item: int, read: ReadItem) -> _TensorPlace | None:
        """None where the item has to be decoded: a value, or a tensor of which only its pickle says where it lies."""
        raw_offset = int(self._index.columns.raw_offset[item])
        if read.type is LoadItemType.BYTE_IO:
            return None
        if raw_offset:
            key = read.storage_index.fqn
            sizes = self._index.box(key, item)[1]
            return _TensorPlace(torch_dtype(self._index.entries[key].dtype), sizes, range(len(sizes)), raw_offset)
        seen = self._source.layouts.get(item)
        return None if seen is None else _TensorPlace(seen.dtype, seen.sizes, seen.order, seen.raw_offset)

    def _add_whole(self, item: int, length: int, reads: Sequence[ReadItem]) -> None:
        """Want all of the item, once for all reads of it."""
        for read in reads:
            if read.type is not LoadItemType.BYTE_IO:
                dtype = torch_dtype(self._index.entries[read.storage_index.fqn].dtype)
                noted(self._casts, read.storage_index.fqn, dtype, destination_of(self._planner, read).dtype)

        def finish(memory: memoryview) -> None:
            self._once_verified(item, functools.partial(self._decode, item, reads, memory))()

        self._want(Want(item, 0, length, self._target(ItemTarget(length, finish)), 0))

    def _decode(self, item: int, reads: Sequence[ReadItem], memory: memoryview) -> None:
        is_checked = bool(self._index.columns.num_crcs[item])
        with blaming(self._index.object_of(item)):
            value = decode_value(memory, reads[0].storage_index.fqn, is_checked=is_checked)
        for read in reads:
            if read.type is LoadItemType.BYTE_IO:
                _put_value(self._planner, read, value)
            else:
                self._put_tensor(item, read, value)

    def _put_tensor(self, item: int, read: ReadItem, value: object) -> None:
        key = read.storage_index.fqn
        dtype, sizes = torch_dtype(self._index.entries[key].dtype), self._index.box(key, item)[1]
        if not isinstance(value, torch.Tensor) or (value.dtype, value.shape) != (dtype, sizes):
            raise UnloadableValue(f"{key!r} is stored as another thing than the checkpoint's index says; leave it out")
        box = tuple(slice(o, o + n) for o, n in zip(read.storage_offsets, read.lengths, strict=True))
        destination = self._planner.resolve_tensor(read).detach()
        fill(destination, value[box], noted(self._casts, key, dtype, destination.dtype))
        self._planner.commit_tensor(read, destination)

    def _add_box(self, item: int, layout: _TensorPlace, read: ReadItem) -> None:
        """Want what `read` asks for of the tensor."""
        sizes, offsets, lengths = (
            tuple(int(of_dims[dim]) for dim in layout.order)
            for of_dims in (layout.sizes, read.storage_offsets, read.lengths)
        )
        target = self._target(self._tensor_target(item, read, layout))
        self._want_box(item, layout, (sizes, offsets, lengths), target)

    def _want_box(self, item: int, layout: _TensorPlace, box: Box, target: int) -> None:
        """Want a box of the tensor, whose dimensions are in the order in which they are stored."""
        sizes, _, lengths = box
        itemsize_bytes, at = layout.dtype.itemsize, 0
        stripe_bytes = stripe_length(sizes, lengths) * itemsize_bytes
        is_short = stripe_bytes < min(_STRIPE_SIZE_BYTES_MIN, math.prod(lengths) * itemsize_bytes)
        for found in box_stripes(*box, itemsize_bytes):
            stripes = dataclasses.replace(found, start=layout.raw_offset + found.start)
            if is_short:
                self._want(Want(item, stripes.start, stripes.stop, target, at, stripes))
            for number, start in enumerate(() if is_short else stripes.starts):
                self._want(Want(item, start, start + stripe_bytes, target, at + number * stripe_bytes))
            at += stripe_bytes * stripes.count

    def _tensor_target(self, item: int, read: ReadItem, layout: _TensorPlace) -> Target:
        """What takes the tensor's bytes as they are stored."""
        tensor = destination_of(self._planner, read)
        overflowed = noted(self._casts, read.storage_index.fqn, layout.dtype, tensor.dtype)
        if tensor.shape != read.lengths:
            name = read.storage_index.fqn
            raise ValueError(f"{name!r}: planned {tuple(read.lengths)}, resolved {tuple(tensor.shape)}")
        finish = self._once_verified(item, functools.partial(self._planner.commit_tensor, read, tensor))
        turned = tensor.permute(*layout.order) if tuple(layout.order) != tuple(range(tensor.dim())) else tensor
        if _is_plain(turned, layout.dtype):
            return TensorTarget(turned, finish)
        if not tensor.is_cuda:
            return SlabTarget(turned, layout.dtype, FreshSlabs(), finish, overflowed=overflowed)
        rings = self.requests.rings
        if tensor.device not in rings:
            rings[tensor.device] = PinnedRing(cuda_copies(tensor.device))
        return SlabTarget(turned, layout.dtype, rings[tensor.device], finish, overflowed=overflowed)

    def _once_verified(self, item: int, call: Callable[[], None]) -> Callable[[], None]:
        """What to call when a target of the item is full: `call`, unless all of the item has to be judged first."""
        if item not in self._source.layouts:
            return call
        return functools.partial(self.requests.hand_over, item, self._source.verifier(item), call)

    def _target(self, target: Target) -> int:
        self.requests.targets.append(target)
        return len(self.requests.targets) - 1

    def _want(self, want: Want) -> None:
        self.requests.wants.append(want)


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
