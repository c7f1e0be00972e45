"""Fill a state from a checkpoint: DCP's read items -> wants -> parts -> tensors."""

from __future__ import annotations

import functools
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from storage.dcp_metadata import torch_dtype
from storage.errors import Corrupt, UnsupportedValue
from storage.fetch import Source, Traffic, blaming, run_all, windowed
from storage.index import Index
from storage.items import decode_value
from storage.objects import ObjectStore
from storage.readplan import ItemSpan, Want, box_runs, box_strides, plan_parts, run_length
from storage.staging import bytes_of
from storage.zips import check_zip

NUM_THREADS = 8
_RUN_SIZE_BYTES_MIN = 32 * 1024  # shorter runs are fetched with what lies between them
_WAVE_SIZE_BYTES = 256 * 1024 * 1024  # bound on memory for what cannot go straight into a tensor


def read_items(
    store: ObjectStore,
    index: Index,
    items: Sequence[ReadItem],
    planner: LoadPlanner,
    num_threads: int = NUM_THREADS,
) -> Traffic:
    """Read every item into what `planner` resolves for it.

    Checksums are verified before a value is handed over, but tensors are filled in place: after an error their
    content is undefined.

    Raises:
        Corrupt: a checksum, size or format does not hold.
        UnsupportedValue: the checkpoint was written with DCP's stream transforms.
        Transient, Denied, NotFound: by the store.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix="storage-read") as pool:
        if index.is_stock:
            return _read_stock(store, index, items, planner, pool, 2 * num_threads)
        source = Source(store, index)
        columns = index.columns
        fields = (columns.object, columns.offset, columns.length, columns.block_size_bytes)
        spans = list(itertools.starmap(ItemSpan, zip(*(field.tolist() for field in fields), strict=True)))
        traffic = Traffic()
        for wave in _waves(index, items, planner):
            parts = plan_parts(spans, wave.wants)
            calls = [functools.partial(source.fetch_part, part, wave.buffers) for part in parts]
            traffic = sum(run_all(pool, calls), traffic)
            for finish in wave.finishers:
                finish()
        return traffic


@dataclass(frozen=True)
class _Item:
    key: str
    sizes: tuple[int, ...]
    length: int
    raw_offset: int


@dataclass
class _Wave:
    """Reads that are carried out together: destinations, what goes into them, and what is left to do after."""

    wants: list[Want] = field(default_factory=list)
    buffers: list[memoryview] = field(default_factory=list)
    finishers: list[Callable[[], None]] = field(default_factory=list)
    extra_bytes: int = 0

    def add_value(self, position: int, entry: _Item, read: ReadItem, planner: LoadPlanner) -> None:
        memory = bytearray(entry.length)
        self._want_all(position, 0, memoryview(memory))
        self.extra_bytes += entry.length

        def finish() -> None:
            decode_value(memory, entry.key)  # a planner may load with pickle: it only gets what a safe loader takes
            planner.load_bytes(read, io.BytesIO(memory))

        self.finishers.append(finish)

    def add_tensor(self, position: int, entry: _Item, dtype: torch.dtype, read: ReadItem, planner: LoadPlanner) -> None:
        destination = planner.resolve_tensor(read).detach()
        if destination.shape != read.lengths:
            raise ValueError(f"{entry.key!r}: planned {tuple(read.lengths)}, resolved {tuple(destination.shape)}")
        sizes, lengths, itemsize = entry.sizes, tuple(read.lengths), dtype.itemsize
        raw_stop = entry.raw_offset + math.prod(entry.sizes) * itemsize
        length_bytes = run_length(sizes, lengths) * itemsize
        if length_bytes >= _RUN_SIZE_BYTES_MIN or length_bytes == math.prod(lengths) * itemsize:
            target = destination if _is_plain(destination, dtype) else self._temporary(lengths, dtype)
            runs = box_runs(sizes, read.storage_offsets, lengths, itemsize)
            buffer = len(self.buffers)
            self.buffers.append(bytes_of(target))
            self.wants += [
                Want(
                    position,
                    entry.raw_offset + start,
                    entry.raw_offset + start + runs.length,
                    buffer,
                    index * runs.length,
                )
                for index, start in enumerate(runs.starts)
            ]
            box = target
        else:
            strides = box_strides(sizes)
            low = sum(o * s for o, s in zip(read.storage_offsets, strides, strict=True))
            extent = 1 + sum((n - 1) * s for n, s in zip(lengths, strides, strict=True))
            covering = self._temporary((extent,), dtype)
            self._want_all(position, entry.raw_offset + low * itemsize, bytes_of(covering))
            box = covering.as_strided(lengths, strides)

        if all(o + n == size for o, n, size in zip(read.storage_offsets, lengths, sizes, strict=True)):
            # whoever reads the last byte also has the framing behind it checked; the first block holds that before
            self._want_all(position, raw_stop, memoryview(bytearray(entry.length - raw_stop)))

        def finish() -> None:
            if box is not destination:
                destination.copy_(box)
            planner.commit_tensor(read, destination)

        self.finishers.append(finish)

    def _temporary(self, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(tuple(sizes), dtype=dtype)
        self.extra_bytes += tensor.nbytes
        return tensor

    def _want_all(self, position: int, start: int, memory: memoryview) -> None:
        if not memory.nbytes:
            return
        self.wants.append(Want(position, start, start + memory.nbytes, len(self.buffers), 0))
        self.buffers.append(memory)


def _is_plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the tensor's memory takes the stored bytes as they are."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == dtype
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _waves(index: Index, items: Sequence[ReadItem], planner: LoadPlanner) -> Iterator[_Wave]:
    """The reads in the order of storage, cut where their temporary memory would pass the bound."""
    columns = index.columns
    found = []
    for read in items:
        place = read.storage_index
        position = index.find(place.fqn, place.offset, place.index)
        if read.type is LoadItemType.BYTE_IO or read.lengths.numel():
            found.append(((int(columns.object[position]), int(columns.offset[position])), position, read))
    found.sort(key=lambda row: row[0])
    wave = _Wave()
    for _, position, read in found:
        key = read.storage_index.fqn
        entry = _Item(
            key, index.box(key, position)[1], int(columns.length[position]), int(columns.raw_offset[position])
        )
        if read.type is LoadItemType.BYTE_IO:
            wave.add_value(position, entry, read, planner)
        else:
            wave.add_tensor(position, entry, torch_dtype(index.entries[key].dtype), read, planner)
        if wave.extra_bytes >= _WAVE_SIZE_BYTES:
            yield wave
            wave = _Wave()
    if wave.wants:
        yield wave


def _read_stock(
    store: ObjectStore,
    index: Index,
    items: Sequence[ReadItem],
    planner: LoadPlanner,
    pool: ThreadPoolExecutor,
    window: int,
) -> Traffic:
    """A checkpoint of stock DCP has no checksums but the zips' own: each item is read whole and verified by those."""
    if index.transforms:
        through = ", ".join(index.transforms)
        raise UnsupportedValue(f"{index.prefix} was stored through {through}; save it without transforms to load it")
    reads_of: dict[tuple[str, int, int], list[ReadItem]] = {}
    columns = index.columns
    for read in items:
        found = index.find(read.storage_index.fqn, read.storage_index.offset, read.storage_index.index)
        place = (index.objects[columns.object[found]].name, int(columns.offset[found]), int(columns.length[found]))
        reads_of.setdefault(place, []).append(read)

    def fetch(place: tuple[str, int, int]) -> tuple[tuple[str, int, int], memoryview]:
        name, offset, length = place
        memory = bytes_of(torch.empty(length, dtype=torch.uint8))
        with blaming(index.prefix + name):
            store.read_into(index.prefix + name, offset, [memory])
            check_zip(memory, f"{index.prefix}{name} at byte {offset}")
        return place, memory

    fetched_bytes = 0
    for place, memory in windowed(pool, fetch, sorted(reads_of), window):
        fetched_bytes += memory.nbytes
        with blaming(index.prefix + place[0]):
            value = decode_value(memory, reads_of[place][0].storage_index.fqn)
        for read in reads_of[place]:
            _deliver(read, value, memory, planner)
    return Traffic(len(reads_of), fetched_bytes)


def _deliver(read: ReadItem, value: object, memory: memoryview, planner: LoadPlanner) -> None:
    if read.type is LoadItemType.BYTE_IO:
        planner.load_bytes(read, io.BytesIO(memory))
        return
    if not isinstance(value, torch.Tensor):
        raise Corrupt(f"item {read.storage_index.fqn!r} holds a {type(value).__name__}, not a tensor")
    box = tuple(slice(o, o + n) for o, n in zip(read.storage_offsets, read.lengths, strict=True))
    destination = planner.resolve_tensor(read).detach()
    destination.copy_(value[box])
    planner.commit_tensor(read, destination)
