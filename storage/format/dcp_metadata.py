"""Stock DCP's `.metadata`, read without executing what is in it.

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
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from storage.errors import Corrupt, Denied
from storage.format.columns import Boxes, Ints
from storage.format.dcp_fields import Odd, boxes_of, columns_of, fields_of, is_path, pairs_of, types_of, whole_numbers
from storage.format.dtypes import DTYPES
from storage.format.index import Columns, Index, IndexedObject, build, check_apart, check_whole
from storage.format.opcodes import Record, harmless
from storage.format.stock import LONG_ITEM_BYTES, PART_SIZE_BYTES
from storage.stores.keys import check_key
from storage.torch_private import GET_LAYOUT, MEMORY_FORMAT, STORAGE_INFO

_DCP = "torch.distributed.checkpoint.metadata"
_PATHS = [
    (module, name)
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
]
_NAME_CHARS_MAX = 200  # of a name, in a message
_INT64_MAX = np.iinfo(np.int64).max


class _MetadataNames:
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
            **{("torch", name): value for name, value in DTYPES.items()},
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
    names = _MetadataNames()
    try:
        with _no_collection():
            return _Parts(_Unpickler(data, names.known).load(), names).index(prefix, step, sizes_bytes)
    except Denied as error:
        raise Denied(f"{name}: {error}") from None
    except (Odd, Corrupt) as error:
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
    """An unpickled `Metadata`, any part of which may be anything. Raises Odd, and almost anything else."""

    def __init__(self, metadata: Any, names: _MetadataNames) -> None:
        kind: Any = type(metadata)
        if kind is not names.metadata:
            raise Odd("no Metadata")
        fields = fields_of(metadata)
        self._names = names
        self._keys, self._stored = pairs_of(fields["state_dict_metadata"])
        if types_of(self._keys) - {str} or len(set(self._keys)) < len(self._keys):
            raise Odd("keys that are none")
        self._number_of = {key: number for number, key in enumerate(self._keys)}
        self._paths = self._paths_of(fields.get("planner_data"))
        self._indices, self._infos = pairs_of(fields["storage_data"])
        self._save_id = self._save_id_of(fields.get("storage_meta"))

    def _paths_of(self, planner_data: Any) -> dict[str, tuple[str | int, ...]]:
        if planner_data is None or type(planner_data) is not list:
            return {}
        keys, paths = pairs_of(planner_data)
        if types_of(keys) - {str}:
            return {}
        return {key: path for key, path in zip(keys, paths, strict=True) if is_path(path)}

    def _save_id_of(self, storage_meta: Any) -> str:
        is_noted = type(storage_meta) is self._names.storage_meta
        noted = fields_of(storage_meta).get("save_id") if is_noted else None
        return noted if type(noted) is str else ""

    def index(self, prefix: str, step: int, sizes_bytes: Mapping[str, int]) -> Index:
        """The index that the metadata describes."""
        rows, chunks = self._entries()
        order, chunk_of, ranges = self._order(chunks)
        info = columns_of(
            self._infos, self._names.info, ("relative_path", "offset", "length"), ("transform_descriptors",)
        )
        transforms = next(filter(None, info["transform_descriptors"]), ())
        if type(transforms) not in (list, tuple) or types_of(transforms) - {str}:
            raise Odd("transforms that are no names")
        where = info["relative_path"]
        if types_of(where) - {str}:
            raise Odd("objects without a name")
        names = sorted(set(where))
        number_of = {check_key(name): number for number, name in enumerate(names)}
        item_object = np.fromiter(map(number_of.__getitem__, where), np.int64, len(where))
        offset, length = whole_numbers(info["offset"]), whole_numbers(info["length"])
        check_apart(item_object, offset, length)
        item_object, offset, length = (column[order] for column in (item_object, offset, length))
        ends = np.fromiter((sizes_bytes.get(name, _INT64_MAX) for name in names), np.int64, len(names))
        if bool((length > ends[item_object] - offset).any()):
            raise Odd("an item reaches past the end of its object")
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
        columns = columns_of(chunks, self._names.chunk, ("offsets", "sizes"))
        offsets, sizes = boxes_of(columns["offsets"]), boxes_of(columns["sizes"])
        if not np.array_equal(offsets.num_dims, sizes.num_dims):
            raise Odd("a shard whose offsets and sizes are not of the same number")
        nothing = Boxes.of([()])  # in the place of a value's
        offsets, sizes = Boxes.join([offsets, nothing]), Boxes.join([sizes, nothing])
        return rows, _Chunks(np.array(first), offsets.num_dims, offsets.padded(0), sizes.padded(1))

    def _tensor(self, key: str, stored: Any) -> tuple[str, tuple[int, ...], list[Any]]:
        """The dtype, shape and chunks of the tensor stored under `key`."""
        kind: Any = type(stored)
        if kind is not self._names.tensor:
            raise Odd(f"entry {key!r}")
        fields = fields_of(stored)
        shape, chunks, properties = fields["size"], fields["chunks"], fields["properties"]
        boxes_of([shape])
        kind = type(properties)
        if type(chunks) is not list or kind is not self._names.properties or len(properties) != 1:
            raise Odd(f"entry {key!r}")
        state = properties[0]
        if type(state) is not tuple or not state or not isinstance(state[0], torch.dtype):
            raise Odd(f"entry {key!r}")
        return str(state[0]).removeprefix("torch."), shape, chunks

    def _order(self, chunks: _Chunks) -> tuple[Ints, Ints, list[tuple[int, int]]]:
        """The items in the order of their keys' chunks, tensors before values: their numbers, each one's chunk (-1 for
        a value), and from where to where those of each key are.
        """
        index = columns_of(self._indices, self._names.index, ("fqn",), ("offset", "index"))
        if types_of(index["fqn"]) - {str}:
            raise Odd("storage data without a key")
        key_of = np.fromiter(map(self._number_of.__getitem__, index["fqn"]), np.int64, len(self._indices))
        is_value_key = np.fromiter((type(stored) is self._names.value for stored in self._stored), bool)
        is_value = is_value_key[key_of]
        items, values = np.flatnonzero(~is_value), np.flatnonzero(is_value)
        chunk_of = self._chunk_of(chunks, key_of, boxes_of(index["offset"]), index["index"])[items]
        if len(items) and (chunk_of.min() < 0 or np.bincount(chunk_of).max() > 1):
            raise Odd("storage data without a shard")
        item_of = np.full(len(chunks.num_dims), -1)
        item_of[chunk_of] = items
        missing = np.flatnonzero((item_of < 0)[:-1] & (chunks.sizes != 0).all(axis=1)[:-1])
        if len(missing):
            key = self._keys[int(np.searchsorted(chunks.first, missing[0], side="right")) - 1]
            raise Odd(f"a shard of {key!r} is stored nowhere")
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
        if types_of(hints) - {int}:
            hints = [hint if type(hint) is int else -1 for hint in hints]
        try:
            number = np.fromiter(hints, np.int64, len(hints))
        except OverflowError:
            raise Odd("a number of more than 64 bits") from None
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
