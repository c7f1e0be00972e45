"""Stock DCP's `.metadata`: read without executing what is in it, written as DCP would have, shown to DCP's planners.

The file is a pickle, and a pickle runs whatever it names. This reader resolves a few names, and none of them to what
it stands for elsewhere: DCP's classes become empty ones that are made anew for each file, so that there is nothing
which a pickle could call or alter; any other name is refused before it is imported. It is also what makes it fast:
nothing is built but dicts and tuples, from which the columns of an `Index` are taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import metadata as dcp

from storage.errors import Corrupt, Denied, UnloadableValue
from storage.format.columns import Boxes
from storage.format.index import Columns, Entry, Index, IndexedObject, build
from storage.format.stock import LONG_ITEM_BYTES, PART_SIZE_BYTES
from storage.stores.objects import check_key

_DCP = "torch.distributed.checkpoint.metadata"
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_PATHS = [
    (module, name)
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
]


class _Names:
    """What the names of one pickle stand for while it is read: classes of its own, and builtins without effects."""

    def __init__(self) -> None:
        self.metadata = _record("Metadata")
        self.index = _record("MetadataIndex")
        self.tensor = _record("TensorStorageMetadata")
        self.value = _record("BytesStorageMetadata")
        self.chunk = _record("ChunkStorageMetadata")
        self.info = _record("_StorageInfo")
        self.properties = type(
            "TensorProperties", (), {"__setstate__": lambda self, state: setattr(self, "state", state)}
        )
        self.known: dict[tuple[str, str], Any] = {
            (_DCP, "Metadata"): self.metadata,
            (_DCP, "MetadataIndex"): self.index,
            (_DCP, "TensorStorageMetadata"): self.tensor,
            (_DCP, "BytesStorageMetadata"): self.value,
            (_DCP, "ChunkStorageMetadata"): self.chunk,
            (_DCP, "TensorProperties"): self.properties,
            (_DCP, "StorageMeta"): _record("StorageMeta"),
            (_DCP, "_MEM_FORMAT_ENCODING"): int,
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): self.info,
            ("torch", "Size"): tuple,
            ("torch.serialization", "_get_layout"): str,
            ("collections", "OrderedDict"): OrderedDict,
            # a checkpoint's own path is only a note
            **dict.fromkeys(_PATHS, type("Path", (), {"__init__": lambda self, *parts: None})),
            **{("torch", name): value for name, value in _DTYPES.items()},
        }


def _record(name: str) -> type:
    """A class whose instances take any attributes."""
    return type(name, (), {})


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, known: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise Denied(f"refused: it names {module}.{name}, which no checkpoint metadata needs") from None

    def persistent_load(self, pid: Any) -> Any:
        raise Denied("refused: it refers to objects outside of the file")


class _Odd(Exception):
    """The parts of the metadata do not fit together."""


def load_metadata(
    data: bytes, prefix: str, step: int, sizes_bytes: Mapping[str, int], name: str = ".metadata"
) -> Index:
    """The index of a checkpoint of stock DCP, from its `.metadata`.

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
            metadata = _Unpickler(data, names.known).load()
            return _Parts(metadata, names).index(prefix, step, sizes_bytes)
    except Denied as error:
        raise Denied(f"{name}: {error}") from None
    except (_Odd, Corrupt) as error:
        raise Corrupt(f"{name} is not checkpoint metadata: {error}") from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises almost anything
        raise Corrupt(f"{name} is not checkpoint metadata: {type(error).__name__}: {error}") from None


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
    """An unpickled `Metadata`, any attribute of which may be anything. Raises _Odd, and almost anything else."""

    def __init__(self, metadata: Any, names: _Names) -> None:
        kind: Any = type(metadata)
        if kind is not names.metadata or not isinstance(metadata.state_dict_metadata, dict):
            raise _Odd("no Metadata")
        if not isinstance(metadata.storage_data, dict):
            raise _Odd("no storage data")
        self._names = names
        self._state: dict[Any, Any] = metadata.state_dict_metadata
        self._paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
        self._places: dict[Any, Any] = metadata.storage_data

    def index(self, prefix: str, step: int, sizes_bytes: Mapping[str, int]) -> Index:
        """All of it as columns."""
        indices, infos = list(self._places), list(self._places.values())
        if {type(index) for index in indices} - {self._names.index} or {type(i) for i in infos} - {self._names.info}:
            raise _Odd("storage data of another kind")
        transforms = next((found for info in infos if (found := info.__dict__.get("transform_descriptors"))), ())
        object_names = sorted({info.relative_path for info in infos})
        objects = [IndexedObject(check_key(name), sizes_bytes.get(name, 0)) for name in object_names]
        number_of = {name: number for number, name in enumerate(object_names)}
        items_of: dict[str, dict[tuple[int, ...] | None, int]] = {key: {} for key in self._state}
        for item, index in enumerate(indices):
            items_of[index.fqn][index.__dict__.get("offset")] = item
        rows: list[tuple[str, str, tuple[int, ...], tuple[str | int, ...], int, int]] = []
        order: list[int] = []
        chunks: list[tuple[Sequence[int], Sequence[int]]] = []
        for key, stored in self._state.items():
            first = len(order)
            dtype, shape, found = self._entry(key, stored, items_of[key])
            order += [item for item, _ in found]
            chunks += [chunk for _, chunk in found]
            rows.append((key, dtype, shape, self._path(key), first, len(order)))
        if len(order) != len(infos):
            raise _Odd("storage data without a shard")
        length = _column([info.length for info in infos])[order]
        offset = _column([info.offset for info in infos])[order]
        where = _column([number_of[info.relative_path] for info in infos])[order]
        num = len(order)
        offsets, sizes = Boxes.of([chunk[0] for chunk in chunks]), Boxes.of([chunk[1] for chunk in chunks])
        columns = Columns(
            object=where,
            offset=offset,
            length=length,
            raw_offset=np.zeros(num, np.int64),
            block_size_bytes=np.where(length > LONG_ITEM_BYTES, PART_SIZE_BYTES, np.maximum(length, 1)),
            first_crc=np.zeros(num + 1, np.int64),
            offsets=offsets.padded(0),
            sizes=sizes.padded(1),
            crcs=np.zeros(0, np.uint32),
        )
        if min(int(column.min(initial=0)) for column in (offset, length)) < 0:
            raise _Odd("a negative number")
        index = build(prefix, step, True, objects, rows, columns, offsets.num_dims)
        return dataclasses.replace(index, transforms=tuple(map(str, transforms)))

    def _entry(
        self, key: Any, stored: Any, items: Mapping[tuple[int, ...] | None, int]
    ) -> tuple[str, tuple[int, ...], list[tuple[int, tuple[Sequence[int], Sequence[int]]]]]:
        """dtype, shape, and the key's items in the order of its chunks, each with its box."""
        if not isinstance(key, str):
            raise _Odd(f"key {key!r}")
        kind: Any = type(stored)
        if kind is self._names.value:
            return "", (), [(item, ((), ())) for item in items.values()]
        if kind is not self._names.tensor or not isinstance(stored.size, tuple):
            raise _Odd(f"entry {key!r}")
        dtype = stored.properties.state[0]
        if not isinstance(dtype, torch.dtype) or {type(chunk) for chunk in stored.chunks} - {self._names.chunk}:
            raise _Odd(f"entry {key!r}")
        found = []
        for chunk in stored.chunks:
            item = items.get(chunk.offsets)
            if len(chunk.offsets) != len(chunk.sizes):
                raise _Odd(f"entry {key!r}")
            if item is not None:
                found.append((item, (chunk.offsets, chunk.sizes)))
            elif math.prod(chunk.sizes):
                raise _Odd(f"shard of {key!r} at {list(chunk.offsets)} is stored nowhere")
        return str(dtype).removeprefix("torch."), stored.size, found

    def _path(self, key: str) -> tuple[str | int, ...]:
        path = self._paths.get(key, (key,))
        ok = isinstance(path, tuple) and all(isinstance(part, (str, int)) for part in path)
        return path if ok else (key,)


def _column(numbers: Sequence[int]) -> Any:
    return np.fromiter(numbers, np.int64, len(numbers))


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
    short = np.flatnonzero(columns.raw_offset + columns.sizes.prod(axis=1) * itemsize > columns.length)
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
