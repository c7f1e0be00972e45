"""The index of one checkpoint as a reader holds it: columns, and nothing per item but numbers. Needs no torch.

Made from a manifest or from stock DCP's `.metadata` by one rank, and sent to the others as it is (`dump`): a quarter of
a million items are a dozen megabytes, which nobody has to parse. Item i is row i of every column; the items of one key
are neighbours, in the order of the document that they came from.
"""

from __future__ import annotations

import binascii
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import Corrupt
from storage.format.columns import Ints
from storage.format.containers import Container, Path
from storage.format.manifest import Manifest

_UNSIGNED = (np.uint8, np.uint16, np.uint32)


@dataclass(frozen=True, slots=True)
class IndexedObject:
    """A data object; `name` is relative to the checkpoint's folder."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """What is stored under one key: items [first, last).

    A tensor has torch's name of its dtype without prefix, and its global shape; a value has "" and ().
    """

    dtype: str
    shape: tuple[int, ...]
    path: Path
    first: int
    last: int

    @property
    def is_tensor(self) -> bool:
        """Whether a tensor is stored under the key, and no value."""
        return bool(self.dtype)


@dataclass(frozen=True)
class Columns:
    """One row for each item.

    An item is `length` bytes at `offset` of `object`. It holds the box [offsets, offsets + sizes) of its tensor, where
    both have as many columns as the tensor with the most dimensions, filled with 0 and 1. The box begins `raw_offset`
    bytes after the item; 0 says that only the item itself tells where. Of its blocks of `block_size_bytes` the first
    `num_crcs` have a CRC32C: all of ours, and none of stock DCP's, whose items are one block each, or several if they
    are long (see `storage.format.stock`). `crcs` has those of all items, one item after the other.
    """

    object: Ints
    offset: Ints
    length: Ints
    raw_offset: Ints
    block_size_bytes: Ints
    num_crcs: Ints
    offsets: Ints
    sizes: Ints
    crcs: npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Index:
    """A checkpoint at `prefix`; see the module's docstring.

    `transforms`: the stream transforms of stock DCP that it was written through, which nothing here can undo.
    `containers`: of the nested state, where the entries' paths do not tell all about them. `healthy`: what whoever
    saved it said of the state. `save_id`: of that very save, its attempt or what stock DCP noted.
    """

    prefix: str
    step: int
    objects: tuple[IndexedObject, ...]
    entries: Mapping[str, Entry]
    columns: Columns
    transforms: tuple[str, ...] = ()
    containers: tuple[Container, ...] = ()
    healthy: bool = True
    save_id: str = ""

    def __len__(self) -> int:
        return len(self.columns.object)

    def box(self, key: str, item: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offsets and sizes of an item of the tensor `key`."""
        num_dims = len(self.entries[key].shape)
        return _row(self.columns.offsets, item, num_dims), _row(self.columns.sizes, item, num_dims)

    def find(self, key: str, offsets: Sequence[int] | None, hint: int | None = None) -> int:
        """The item of `key` at `offsets` (None for a value), looked for at number `hint` of the key's first.

        Raises:
            Corrupt: there is none.
        """
        entry = self.entries[key]
        if offsets is None:
            if entry.last > entry.first:
                return entry.first
            raise Corrupt(f"value {key!r} is not stored")
        wanted = np.asarray(offsets, np.int64)
        among = self.columns.offsets[entry.first : entry.last, : len(wanted)]
        if hint is not None and 0 <= hint < len(among) and bool((among[hint] == wanted).all()):
            return entry.first + hint
        found = np.flatnonzero((among == wanted).all(axis=1))
        if not len(found):
            raise Corrupt(f"{key!r} has no shard at {list(offsets)}")
        return entry.first + int(found[0])

    def key_of(self, item: int) -> str:
        """The key that the item is stored under."""
        return next(key for key, entry in self.entries.items() if entry.first <= item < entry.last)

    def object_of(self, item: int) -> str:
        """The key of the item's object in the store."""
        return self.prefix + self.objects[int(self.columns.object[item])].name

    def items_by_object(self) -> list[Ints]:
        """For each data object its items, in the order of their places."""
        return by_object(self.columns.object, self.columns.offset, len(self.objects))

    @functools.cached_property
    def first_crc(self) -> Ints:
        """Where each item's checksums begin among `Columns.crcs`, and where the last one's end."""
        return np.concatenate((np.zeros(1, np.int64), np.cumsum(self.columns.num_crcs)))

    def axis(self) -> Ints:
        """Where each item begins on the line of all bytes: object after object, none touching the next."""
        sizes = np.fromiter((entry.size_bytes + 1 for entry in self.objects), np.int64, len(self.objects))
        starts = np.concatenate(([0], np.cumsum(sizes)[:-1])) if len(sizes) else sizes
        return np.asarray(starts[self.columns.object] + self.columns.offset, np.int64)

    def crcs_of(self, items: Ints) -> npt.NDArray[np.uint32]:
        """The blocks' checksums of those items, one item after the other."""
        first = self.first_crc
        return self.columns.crcs[aranges(first[items], first[items + 1])]

    def with_crcs(self, items: Ints, crcs: npt.NDArray[np.uint32]) -> Index:
        """The same index, with `crcs_of(items)` in the place of all checksums."""
        counts = np.zeros(len(self), np.int64)
        counts[items] = self.columns.num_crcs[items]
        return dataclasses.replace(self, columns=dataclasses.replace(self.columns, num_crcs=counts, crcs=crcs))

    def dump(self) -> bytes:
        """Bytes for the way to the other ranks: a head in JSON, then the columns in the narrowest type each.

        Without checksums, which can be many times the rest: each rank asks for those of what it reads.
        """
        none = {"crcs": np.zeros(0, np.uint32)}
        fields = {field.name: getattr(self.columns, field.name) for field in dataclasses.fields(Columns)}
        columns = {name: _narrow(column) for name, column in (fields | none).items()}
        head = {
            "prefix": self.prefix,
            "step": self.step,
            "objects": [(entry.name, entry.size_bytes) for entry in self.objects],
            "entries": [(key, e.dtype, e.shape, e.path, e.first, e.last) for key, e in self.entries.items()],
            "transforms": self.transforms,
            "containers": [container.model_dump() for container in self.containers],
            "healthy": self.healthy,
            "save_id": self.save_id,
            "columns": [(name, column.dtype.str, column.shape) for name, column in columns.items()],
        }
        text = json.dumps(head, separators=(",", ":")).encode()
        return b"".join([len(text).to_bytes(8, "little"), text, *(column.tobytes() for column in columns.values())])

    @classmethod
    def load(cls, data: bytes) -> Index:
        """The index that `dump` has dumped, which knows no checksum yet."""
        at = 8 + int.from_bytes(data[:8], "little")
        head = json.loads(data[8:at])
        columns: dict[str, Any] = {}
        for name, kind, shape in head["columns"]:
            column = np.frombuffer(data, kind, math.prod(shape), at).reshape(shape)
            at += column.nbytes
            columns[name] = column.astype(np.uint32 if name == "crcs" else np.int64)
        return cls(
            head["prefix"],
            head["step"],
            tuple(IndexedObject(*row) for row in head["objects"]),
            {
                key: Entry(dtype, tuple(shape), tuple(path), first, last)
                for key, dtype, shape, path, first, last in head["entries"]
            },
            Columns(**columns),
            tuple(head["transforms"]),
            tuple(Container.model_validate(fields) for fields in head["containers"]),
            head["healthy"],
            head["save_id"],
        )


def of_manifest(prefix: str, manifest: Manifest) -> Index:
    """The index of a checkpoint of ours. Raises Corrupt when the manifest's numbers do not fit together."""
    table = manifest.items
    check_apart(table.object, table.offset, table.length)
    kinds: list[tuple[str, str, tuple[int, ...], Path]] = [
        *((key, entry.dtype, entry.shape, entry.path) for key, entry in manifest.tensors.items()),
        *((key, "", (), entry.path) for key, entry in manifest.values.items()),
    ]
    block_size, length = table.block_size_bytes, table.length
    num_blocks = -(-length // block_size)
    try:
        packed = list(map(binascii.a2b_base64, table.block_crcs))
    except ValueError as error:  # binascii's own, and what a text of other characters raises
        raise Corrupt(f"not a list of checksums: {error}") from None
    odd = np.flatnonzero(np.fromiter(map(len, packed), np.int64, len(packed)) != 4 * num_blocks)
    if len(odd):
        row = int(odd[0])
        raise Corrupt(f"item {table.key[row]!r} has {len(packed[row]) / 4:g} block checksums for {length[row]} bytes")
    order, ranges = _by_key([row[0] for row in kinds], table.key)
    crcs_of = [packed[row] for row in order.tolist()]
    columns = Columns(
        object=table.object[order],
        offset=table.offset[order],
        length=length[order],
        raw_offset=table.raw_offset[order],
        block_size_bytes=block_size[order],
        num_crcs=num_blocks[order],
        offsets=table.offsets.padded(0)[order],
        sizes=table.sizes.padded(1)[order],
        crcs=np.frombuffer(b"".join(crcs_of), "<u4"),
    )
    dims = np.maximum(table.sizes.num_dims, 0)[order]
    index = build(
        prefix,
        manifest.step,
        [IndexedObject(entry.name, entry.size_bytes) for entry in manifest.objects],
        [(*kind, *span) for kind, span in zip(kinds, ranges, strict=True)],
        columns,
        dims,
    )
    return dataclasses.replace(
        index, containers=manifest.containers, healthy=manifest.healthy, save_id=manifest.attempt
    )


def build(
    prefix: str,
    step: int,
    objects: Sequence[IndexedObject],
    rows: Iterable[tuple[str, str, tuple[int, ...], Path, int, int]],
    columns: Columns,
    num_dims: Ints,
) -> Index:
    """The index whose entries are `rows` of (key, dtype, shape, path, first, last). Raises Corrupt.

    `num_dims`: of each item's box.
    """
    entries = {key: Entry(dtype, shape, path, first, last) for key, dtype, shape, path, first, last in rows}
    index = Index(prefix, step, tuple(objects), entries, columns)
    width = columns.sizes.shape[1]
    for key, entry in entries.items():
        if not entry.is_tensor:
            continue
        span = slice(entry.first, entry.last)
        dims = len(entry.shape)
        ends = columns.offsets[span] + columns.sizes[span]
        if bool((num_dims[span] != dims).any()) or (
            dims <= width and bool((ends[:, :dims] > np.array(entry.shape, np.int64)).any())
        ):
            raise Corrupt(f"a shard of {key!r} does not fit into shape {list(entry.shape)}")
    return index


def check_whole(index: Index) -> Index:
    """`index`, if the shards of every tensor make up the whole of it, each element once. Raises Corrupt.

    Seen in the volumes: where every coordinate has a weight at random, the weighted volumes of boxes add up to the
    whole's only if they fill it, but for one chance in 2^50 or so.
    """
    offsets, sizes = index.columns.offsets, index.columns.sizes
    tensors = [(key, entry) for key, entry in index.entries.items() if entry.is_tensor]
    shapes = np.ones((len(tensors), sizes.shape[1]), np.int64)
    for row, (_, entry) in zip(shapes, tensors, strict=True):
        row[: len(entry.shape)] = entry.shape[: len(row)]  # a tensor without a shard may have more dimensions
    found = np.concatenate((np.zeros(1, np.uint64), np.cumsum(_weights(offsets, offsets + sizes))))
    first, last = (np.array([getattr(entry, name) for _, entry in tensors], np.int64) for name in ("first", "last"))
    is_whole = found[last] - found[first] == _weights(np.zeros_like(shapes), shapes)
    for number in np.flatnonzero(~is_whole).tolist():
        key, entry = tensors[number]
        if math.prod(entry.shape) or entry.last > entry.first:
            raise Corrupt(f"the shards of {key!r} do not make up its shape {list(entry.shape)}")
    return index


def _weights(starts: Ints, stops: Ints) -> npt.NDArray[np.uint64]:
    """Of the boxes from starts to stops, in a space of weighted coordinates; modulo 2^64, as sums and products are."""
    weights = np.ones(len(starts), np.uint64)
    for dim in range(starts.shape[1]):
        weights *= _mixed(stops[:, dim], dim) - _mixed(starts[:, dim], dim)
    return weights


def _mixed(numbers: Ints, seed: int) -> npt.NDArray[np.uint64]:
    """Numbers as if at random (the finalizer of splitmix64)."""
    mixed = (numbers.astype(np.uint64) + np.uint64(seed + 1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), np.uint64)


def by_object(where: Ints, offset: Ints, num_objects: int) -> list[Ints]:
    """For each object the numbers of its items, given by object and offset, in the order of their places."""
    order = np.lexsort((offset, where))
    bounds = np.searchsorted(where[order], np.arange(num_objects + 1))
    return [order[low:high] for low, high in itertools.pairwise(bounds.tolist())]


def check_apart(where: Ints, offset: Ints, length: Ints) -> None:
    """That no two items, given by object, offset and length, lie upon each other in an object. Raises Corrupt."""
    rows = (where, offset, length)
    is_next = where[1:] == where[:-1]
    if not bool(((where[1:] > where[:-1]) | (is_next & (offset[1:] >= offset[:-1]))).all()):  # mostly they are in order
        order = np.lexsort((length, offset, where))
        where, offset, length = (column[order] for column in rows)
        is_next = where[1:] == where[:-1]
    if bool((is_next & (offset[1:] - offset[:-1] < length[:-1])).any()):
        raise Corrupt("two items lie upon each other")


def aranges(first: Ints, last: Ints) -> Ints:
    """The numbers of range(first[i], last[i]), one range after the other."""
    counts = last - first
    before = np.cumsum(counts) - counts
    return np.asarray(np.repeat(first - before, counts) + np.arange(counts.sum()), np.int64)


def _by_key(keys: Sequence[str], key_of_item: Sequence[str]) -> tuple[Ints, list[tuple[int, int]]]:
    """An order of the items that brings those of a key together, and where each key's then are."""
    number = {key: index for index, key in enumerate(keys)}
    ids = np.fromiter((number[key] for key in key_of_item), np.int64, len(key_of_item))
    order = np.argsort(ids, kind="stable")
    edges = np.searchsorted(ids[order], np.arange(len(keys) + 1))
    return order, list(itertools.pairwise(edges.tolist()))


def _row(column: Ints, item: int, num_dims: int) -> tuple[int, ...]:
    return tuple(column[item, :num_dims].tolist())


def _narrow(column: npt.NDArray[np.integer[npt.NBitBase]]) -> npt.NDArray[np.integer[npt.NBitBase]]:
    high = int(column.max(initial=0))
    for kind in _UNSIGNED:
        if high <= np.iinfo(kind).max:
            return np.ascontiguousarray(column, kind)
    return np.ascontiguousarray(column)
