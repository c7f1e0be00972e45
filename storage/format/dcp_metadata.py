"""Stock DCP's `.metadata`: read without executing what is in it, written as DCP would have, shown to DCP's planners.

The file is a pickle, and a pickle runs whatever it names, for as long as it likes. It is made harmless first
(`opcodes`), and of the rest this reader resolves a few names, none of them to what it stands for elsewhere: DCP's
classes become empty ones that are made anew for each file, so that there is nothing which a pickle could call or
alter; any other name is refused before it is imported. It is also what makes it fast: nothing is built but lists and
tuples, from which the columns of an `Index` are taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import itertools
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import metadata as dcp

from storage.errors import Corrupt, Denied, UnloadableValue
from storage.format.columns import Boxes, Ints
from storage.format.index import Columns, Entry, Index, IndexedObject, build, check_apart, check_whole
from storage.format.opcodes import Record, harmless
from storage.format.stock import LONG_ITEM_BYTES, PART_SIZE_BYTES
from storage.stores.keys import check_key
from storage.torch_private import GET_LAYOUT, MEMORY_FORMAT, STORAGE_INFO

_DCP = "torch.distributed.checkpoint.metadata"
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_PATHS = [
    (module, name)
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
]
_NUM_FIELDS_MAX = 16
_NUM_DIMS_MAX = 64  # torch's own
_NUM_PARTS_MAX = 1024
_NAME_CHARS_MAX = 200  # of a name, in a message
_INT64_MAX = np.iinfo(np.int64).max


class _Names:
    """What the names of one pickle stand for while it is read: classes of its own, and calls that cost nothing."""

    def __init__(self) -> None:
        self.metadata = _record("Metadata")
        self.index = _record("MetadataIndex")
        self.tensor = _record("TensorStorageMetadata")
        self.value = _record("BytesStorageMetadata")
        self.chunk = _record("ChunkStorageMetadata")
        self.storage_meta = _record("StorageMeta")
        self.info = _record(STORAGE_INFO[1])
        self.properties = _record("TensorProperties")
        self.known: dict[tuple[str, str], Any] = {
            (_DCP, "Metadata"): self.metadata,
            (_DCP, "MetadataIndex"): self.index,
            (_DCP, "TensorStorageMetadata"): self.tensor,
            (_DCP, "BytesStorageMetadata"): self.value,
            (_DCP, "ChunkStorageMetadata"): self.chunk,
            (_DCP, "TensorProperties"): self.properties,
            (_DCP, "StorageMeta"): self.storage_meta,
            MEMORY_FORMAT: _noted(MEMORY_FORMAT[1]),
            STORAGE_INFO: self.info,
            ("torch", "Size"): ().__add__,  # takes a tuple and nothing else, and copies none
            GET_LAYOUT: _noted(GET_LAYOUT[1]),
            ("collections", "OrderedDict"): type("OrderedDict", (), {"__new__": lambda cls: []}),
            # a checkpoint's own path is only a note
            **dict.fromkeys(_PATHS, _noted("Path")),
            **{("torch", name): value for name, value in _DTYPES.items()},
        }


def _record(name: str) -> type:
    """A class whose instances keep the state that they are given."""
    return type(name, (Record,), {"__slots__": ()})


def _noted(name: str) -> type:
    """A class whose instances say nothing, whatever they are made of; an exception copies no argument."""
    return type(name, (Exception,), {})


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, known: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(harmless(data)))
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            where = f"{module}.{name}"[:_NAME_CHARS_MAX]
            raise Denied(f"refused: it names {where}, which no checkpoint metadata needs") from None


class _Odd(Exception):
    """The parts of the metadata do not fit together."""


def load_metadata(
    data: bytes, prefix: str, step: int, sizes_bytes: Mapping[str, int], name: str = ".metadata"
) -> Index:
    """The index of a checkpoint of stock DCP, from its `.metadata`.

    It takes time and memory by its length, at most 25 bytes for each.

    Args:
        prefix, step: of the checkpoint.
        sizes_bytes: of the objects in its folder.
        name: of the file, for messages.

    Raises:
        Denied: the pickle names something that metadata has no use for; nothing of it was executed.
        Corrupt: not a pickle of `Metadata`, or one whose parts do not fit together.
    """
    names = _Names()
    try:
        with _no_collection():
            return _Parts(_Unpickler(data, names.known).load(), names).index(prefix, step, sizes_bytes)
    except Denied as error:
        raise Denied(f"{name}: {error}") from None
    except (_Odd, Corrupt) as error:
        raise Corrupt(f"{name} is not checkpoint metadata: {str(error)[:_NAME_CHARS_MAX]}") from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises almost anything
        told = str(error)[:_NAME_CHARS_MAX]
        raise Corrupt(f"{name} is not checkpoint metadata: {type(error).__name__}: {told}") from None


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without the cycle collector, which would walk over a million new objects again and again and find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Parts:
    """An unpickled `Metadata`, any part of which may be anything; so nothing is hashed, compared or shown before its
    type is known. Raises _Odd, and almost anything else.
    """

    def __init__(self, metadata: Any, names: _Names) -> None:
        kind: Any = type(metadata)
        if kind is not names.metadata:
            raise _Odd("no Metadata")
        fields = _fields(metadata)
        self._names = names
        self._keys, self._stored = _items(fields["state_dict_metadata"])
        if _types(self._keys) - {str} or len(set(self._keys)) < len(self._keys):
            raise _Odd("keys that are none")
        self._number_of = {key: number for number, key in enumerate(self._keys)}
        self._paths = self._paths_of(fields.get("planner_data"))
        self._indices, self._infos = _items(fields["storage_data"])
        self._save_id = self._save_id_of(fields.get("storage_meta"))

    def _paths_of(self, planner_data: Any) -> dict[str, tuple[str | int, ...]]:
        if planner_data is None or type(planner_data) is not list:
            return {}
        keys, paths = _items(planner_data)
        if _types(keys) - {str}:
            return {}
        return {key: path for key, path in zip(keys, paths, strict=True) if _is_path(path)}

    def _save_id_of(self, storage_meta: Any) -> str:
        is_noted = type(storage_meta) is self._names.storage_meta
        noted = _fields(storage_meta).get("save_id") if is_noted else None
        return noted if type(noted) is str else ""

    def index(self, prefix: str, step: int, sizes_bytes: Mapping[str, int]) -> Index:
        """All of it as columns."""
        rows, chunks = self._entries()
        order, chunk_of, ranges = self._order(chunks)
        info = _columns(
            self._infos, self._names.info, ("relative_path", "offset", "length"), ("transform_descriptors",)
        )
        transforms = next(filter(None, info["transform_descriptors"]), ())
        if type(transforms) not in (list, tuple) or _types(transforms) - {str}:
            raise _Odd("transforms that are no names")
        where = info["relative_path"]
        if _types(where) - {str}:
            raise _Odd("objects without a name")
        names = sorted(set(where))
        number_of = {check_key(name): number for number, name in enumerate(names)}
        item_object = np.fromiter(map(number_of.__getitem__, where), np.int64, len(where))
        offset, length = _whole_numbers(info["offset"]), _whole_numbers(info["length"])
        check_apart(item_object, offset, length)
        item_object, offset, length = (column[order] for column in (item_object, offset, length))
        ends = np.fromiter((sizes_bytes.get(name, _INT64_MAX) for name in names), np.int64, len(names))
        if bool((length > ends[item_object] - offset).any()):
            raise _Odd("an item reaches past the end of its object")
        columns = Columns(
            object=item_object,
            offset=offset,
            length=length,
            raw_offset=np.zeros(len(order), np.int64),
            block_size_bytes=np.where(length > LONG_ITEM_BYTES, PART_SIZE_BYTES, np.maximum(length, 1)),
            num_crcs=np.zeros(len(order), np.int64),
            offsets=chunks.offsets[chunk_of],
            sizes=chunks.sizes[chunk_of],
            crcs=np.zeros(0, np.uint32),
        )
        objects = [IndexedObject(name, sizes_bytes.get(name, 0)) for name in names]
        spans = [(*row, *span) for row, span in zip(rows, ranges, strict=True)]
        index = build(prefix, step, objects, spans, columns, chunks.num_dims[chunk_of])
        return dataclasses.replace(check_whole(index), transforms=tuple(transforms), save_id=self._save_id)

    def _entries(self) -> tuple[list[tuple[str, str, tuple[int, ...], tuple[str | int, ...]]], _Chunks]:
        """Key, dtype, shape and path of each entry, and the chunks of all."""
        rows: list[tuple[str, str, tuple[int, ...], tuple[str | int, ...]]] = []
        first, chunks = [0], list[Any]()
        for key, stored in zip(self._keys, self._stored, strict=True):
            dtype, shape = "", tuple[int, ...]()
            if type(stored) is not self._names.value:
                dtype, shape, found = self._tensor(key, stored)
                chunks += found
            rows.append((key, dtype, shape, self._paths.get(key, (key,))))
            first.append(len(chunks))
        columns = _columns(chunks, self._names.chunk, ("offsets", "sizes"))
        offsets, sizes = _boxes(columns["offsets"]), _boxes(columns["sizes"])
        if not np.array_equal(offsets.num_dims, sizes.num_dims):
            raise _Odd("a shard whose offsets and sizes are not of the same number")
        nothing = Boxes.of([()])  # in the place of a value's
        offsets, sizes = Boxes.join([offsets, nothing]), Boxes.join([sizes, nothing])
        return rows, _Chunks(np.array(first), offsets.num_dims, offsets.padded(0), sizes.padded(1))

    def _tensor(self, key: str, stored: Any) -> tuple[str, tuple[int, ...], list[Any]]:
        """dtype, shape and chunks."""
        kind: Any = type(stored)
        if kind is not self._names.tensor:
            raise _Odd(f"entry {key!r}")
        fields = _fields(stored)
        shape, chunks, properties = fields["size"], fields["chunks"], fields["properties"]
        _boxes([shape])
        kind = type(properties)
        if type(chunks) is not list or kind is not self._names.properties or len(properties) != 1:
            raise _Odd(f"entry {key!r}")
        state = properties[0]
        if type(state) is not tuple or not state or not isinstance(state[0], torch.dtype):
            raise _Odd(f"entry {key!r}")
        return str(state[0]).removeprefix("torch."), shape, chunks

    def _order(self, chunks: _Chunks) -> tuple[Ints, Ints, list[tuple[int, int]]]:
        """The items in the order of their keys' chunks, tensors before values: their numbers, each one's chunk (-1 for
        a value), and from where to where those of each key are.
        """
        index = _columns(self._indices, self._names.index, ("fqn",), ("offset", "index"))
        if _types(index["fqn"]) - {str}:
            raise _Odd("storage data without a key")
        key_of = np.fromiter(map(self._number_of.__getitem__, index["fqn"]), np.int64, len(self._indices))
        is_value_key = np.fromiter((type(stored) is self._names.value for stored in self._stored), bool)
        is_value = is_value_key[key_of]
        items, values = np.flatnonzero(~is_value), np.flatnonzero(is_value)
        chunk_of = self._chunk_of(chunks, key_of, _boxes(index["offset"]), index["index"])[items]
        if len(items) and (chunk_of.min() < 0 or np.bincount(chunk_of).max() > 1):
            raise _Odd("storage data without a shard")
        item_of = np.full(len(chunks.num_dims), -1)
        item_of[chunk_of] = items
        missing = np.flatnonzero((item_of < 0)[:-1] & (chunks.sizes != 0).all(axis=1)[:-1])
        if len(missing):
            key = self._keys[int(np.searchsorted(chunks.first, missing[0], side="right")) - 1]
            raise _Odd(f"a shard of {key!r} is stored nowhere")
        stored_chunks = np.flatnonzero(item_of >= 0)
        values = values[np.argsort(key_of[values], kind="stable")]
        order = np.concatenate((item_of[stored_chunks], values))
        num_of = np.bincount(key_of, minlength=len(self._keys))
        ends = np.where(is_value_key, len(items) + np.cumsum(num_of * is_value_key), np.cumsum(num_of * ~is_value_key))
        ranges = list(zip((ends - num_of).tolist(), ends.tolist(), strict=True))
        return order, np.concatenate((stored_chunks, np.full(len(values), -1))), ranges

    def _chunk_of(self, chunks: _Chunks, key_of: Ints, corners: Boxes, hints: Sequence[Any]) -> Ints:
        """Each item's chunk, by its offsets; -1 where there is none. Most items say which of its key's it is."""
        width = max(chunks.offsets.shape[1], int(corners.num_dims.max(initial=0)))
        wanted, known = corners.padded(0, width), _widened(chunks.offsets, width)
        if _types(hints) - {int}:
            hints = [hint if type(hint) is int else -1 for hint in hints]
        try:
            number = np.fromiter(hints, np.int64, len(hints))
        except OverflowError:
            raise _Odd("a number of more than 64 bits") from None
        number[number >= len(known)] = -1
        guess = chunks.first[key_of] + number
        guess[(number < 0) | (guess >= chunks.first[key_of + 1])] = -1
        is_right = (chunks.num_dims[guess] == corners.num_dims) & (known[guess] == wanted).all(axis=1) & (guess >= 0)
        found = np.where(is_right, guess, -1)
        others = np.flatnonzero(~is_right & (corners.num_dims >= 0))
        if len(others):
            lists = {}
            for key in np.unique(key_of[others]).tolist():
                for chunk in range(int(chunks.first[key]), int(chunks.first[key + 1])):
                    lists[key, int(chunks.num_dims[chunk]), known[chunk].tobytes()] = chunk
            for item in others.tolist():
                place = int(key_of[item]), int(corners.num_dims[item]), wanted[item].tobytes()
                found[item] = lists.get(place, -1)
        return found


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """The chunks of all tensors, key by key, and after the last one the one of any value.

    Those of key i are [first[i], first[i + 1]); `offsets` and `sizes` are filled up with 0 and 1.
    """

    first: Ints
    num_dims: Ints
    offsets: Ints
    sizes: Ints


def _widened(column: Ints, width: int) -> Ints:
    return np.pad(column, ((0, 0), (0, width - column.shape[1])))


def _types(objects: Iterable[Any]) -> set[type]:
    return set(map(type, objects))


def _items(pairs: Any) -> tuple[list[Any], list[Any]]:
    """Keys and values of what was a dict, see `harmless`. Nothing is known of either."""
    if type(pairs) is not list:
        raise _Odd("something else in the place of a dict")
    if tuple in _types(pairs[::2]):  # no key is a tuple: this was set alone
        flat = list[Any]()
        at = 0
        while at < len(pairs):
            is_pair = type(pairs[at]) is tuple and len(flat) % 2 == 0
            flat += pairs[at] if is_pair else pairs[at : at + 2]
            at += 1 if is_pair else 2
        pairs = flat
    if len(pairs) % 2:
        raise _Odd("a key without a value")
    return pairs[::2], pairs[1::2]


def _fields(record: Record) -> dict[str, Any]:
    """What is said in the state of an object."""
    if len(record) != 1 or type(record[0]) is not list or len(record[0]) > 2 * _NUM_FIELDS_MAX:
        raise _Odd("an object without a state")
    names, values = _items(record[0])
    if _types(names) - {str}:
        raise _Odd("an object with odd fields")
    return dict(zip(names, values, strict=True))


def _columns(
    records: Sequence[Any], kind: type, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Sequence[Any]]:
    """The fields of many objects; None for an optional one that is not there."""
    if _types(records) - {kind}:
        raise _Odd(f"something else in the place of {kind.__name__}")
    states = list(itertools.chain.from_iterable(records))
    if len(states) != len(records) or set(map(len, records)) - {1} or _types(states) - {list}:
        raise _Odd(f"a {kind.__name__} without a state")
    names = states[0][::2] if states else []
    width = 2 * len(names)
    if len(names) <= _NUM_FIELDS_MAX and not _types(names) - {str} and not set(map(len, states)) - {width}:
        flat = list(itertools.chain.from_iterable(states))
        # most are all alike: then the fields are every so many apart
        if all(flat[2 * place :: width].count(name) == len(states) for place, name in enumerate(names)):
            known = {name: flat[2 * place + 1 :: width] for place, name in enumerate(names)}
            return {
                **{name: known[name] if states else [] for name in required},
                **{name: known.get(name) or [None] * len(states) for name in optional},
            }
    rows = [_fields(record) for record in records]
    return {
        **{name: [row[name] for row in rows] for name in required},
        **{name: [row.get(name) for row in rows] for name in optional},
    }


def _boxes(rows: Sequence[Any]) -> Boxes:
    """Tuples of whole numbers from 0 to 2^63 - 1, or None, as columns."""
    kinds = _types(rows)
    if kinds - {tuple, type(None)}:
        raise _Odd("a shape that is none")
    full = rows if kinds == {tuple} else [() if row is None else row for row in rows]
    num_dims = np.fromiter(map(len, full), np.int64, len(full))
    if num_dims.max(initial=0) > _NUM_DIMS_MAX:
        raise _Odd(f"a shape of {num_dims.max()} dimensions")
    numbers = _whole_numbers(list(itertools.chain.from_iterable(full)))
    if full is not rows:
        num_dims[[row is None for row in rows]] = -1
    return Boxes(num_dims, numbers)


def _whole_numbers(numbers: Sequence[Any]) -> Ints:
    if _types(numbers) - {int}:
        raise _Odd("something else in the place of a number")
    try:
        column = np.fromiter(numbers, np.int64, len(numbers))
    except OverflowError:
        raise _Odd("a number of more than 64 bits") from None
    if column.min(initial=0) < 0:
        raise _Odd("a negative number")
    return column


def _is_path(path: Any) -> bool:
    return type(path) is tuple and len(path) <= _NUM_PARTS_MAX and not _types(path) - {str, int}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of an entry's `dtype`. Raises UnloadableValue."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise UnloadableValue(
            f"the checkpoint has tensors of dtype {name!r}, which torch {torch.__version__} does not know; read it with"
            " a newer torch"
        ) from None


def check_sizes(index: Index) -> Index:
    """`index`, if every tensor's bytes lie inside its items. Raises Corrupt, UnloadableValue."""
    itemsize = np.zeros(len(index), np.int64)
    for entry in index.entries.values():
        if entry.is_tensor:
            itemsize[entry.first : entry.last] = torch_dtype(entry.dtype).itemsize
    columns = index.columns
    size_bytes = columns.sizes.prod(axis=1) * itemsize
    # the same in another kind of numbers: the product may be too large for 64 bits, and then seem to be small
    is_large = columns.sizes.prod(axis=1, dtype=np.float64) * itemsize > _INT64_MAX / 2
    short = np.flatnonzero(is_large | (size_bytes > columns.length - columns.raw_offset))
    if len(short):
        key = next(key for key, entry in index.entries.items() if entry.first <= short[0] < entry.last)
        raise Corrupt(f"item {key!r} is too short for its data")
    return index


class _Entries(Mapping[str, dcp.STORAGE_TYPES]):
    """`state_dict_metadata` in which an entry is made when it is asked for: a rank asks for few of many shards."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._made: dict[str, dcp.STORAGE_TYPES] = {}

    def __getitem__(self, key: str) -> dcp.STORAGE_TYPES:
        if key not in self._made:
            self._made[key] = self._make(key, self._index.entries[key])
        return self._made[key]

    def _make(self, key: str, entry: Entry) -> dcp.STORAGE_TYPES:
        if not entry.is_tensor:
            return dcp.BytesStorageMetadata()
        columns, num_dims = self._index.columns, len(entry.shape)
        span = slice(entry.first, entry.last)
        pairs = zip(columns.offsets[span, :num_dims].tolist(), columns.sizes[span, :num_dims].tolist(), strict=True)
        return dcp.TensorStorageMetadata(
            properties=dcp.TensorProperties(dtype=torch_dtype(entry.dtype)),
            size=torch.Size(entry.shape),
            chunks=[dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in pairs],
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.entries)

    def __len__(self) -> int:
        return len(self._index.entries)

    def __contains__(self, key: object) -> bool:
        return key in self._index.entries


def metadata_of(index: Index) -> dcp.Metadata:
    """What a planner of DCP has to know; `storage_data` is None, for that is this package's own business."""
    paths = {key: entry.path for key, entry in index.entries.items()}
    return dcp.Metadata(state_dict_metadata=_Entries(index), planner_data=paths, version="1.0.0")  # type: ignore[arg-type]
