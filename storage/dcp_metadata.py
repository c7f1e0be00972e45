"""Stock DCP's `.metadata`, read without executing what is in it.

The file is a pickle, and a pickle runs whatever it names. This reader resolves only the classes that DCP itself
writes (`torch.distributed.checkpoint.metadata`, `_StorageInfo`), torch's dtypes and sizes, and paths; any other name
is refused before it is imported.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.serialization import _get_layout

from storage.errors import Corrupt, Denied
from storage.manifest import Manifest
from storage.objects import check_key

_DCP = "torch.distributed.checkpoint.metadata"
_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (_DCP, cls.__name__): cls
        for cls in (
            dcp.Metadata,
            dcp.MetadataIndex,
            dcp.TensorStorageMetadata,
            dcp.BytesStorageMetadata,
            dcp.ChunkStorageMetadata,
            dcp.TensorProperties,
            dcp._MEM_FORMAT_ENCODING,
            dcp.StorageMeta,
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("collections", "OrderedDict"): OrderedDict,
    # a checkpoint's own path is only a note: as a pure path it cannot touch a file system
    **{
        (module, name): pathlib.PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}


_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, so its attributes can be set
# the Python classes among them: a pickle's BUILD opcode could set attributes of a class as well as of an instance
_CLASSES = {value for value in _ALLOWED.values() if isinstance(value, type) and value.__flags__ & _HEAP_TYPE}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise Denied(f"refused: it names {module}.{name}, which no checkpoint metadata needs") from None

    def persistent_load(self, pid: Any) -> Any:
        raise Denied("refused: it refers to objects outside of the file")


def load_metadata(data: bytes, name: str = ".metadata") -> dcp.Metadata:
    """The `Metadata` that stock DCP or this package wrote.

    Raises:
        Denied: the pickle names something that metadata has no use for; nothing of it was executed.
        Corrupt: not a pickle of `Metadata`, or one whose parts do not fit together.
    """
    try:
        with _unchanged_classes():
            metadata = _Unpickler(io.BytesIO(data)).load()
        problem = _problem(metadata)
    except Denied as error:
        raise Denied(f"{name}: {error}") from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises almost anything
        raise Corrupt(f"{name} is not checkpoint metadata: {type(error).__name__}: {error}") from None
    if problem:
        raise Corrupt(f"{name} is not checkpoint metadata: {problem}")
    return metadata  # type: ignore[no-any-return]


@contextlib.contextmanager
def _unchanged_classes() -> Iterator[None]:
    """Undo, and refuse, what a pickle did to the classes themselves."""
    before = {cls: dict(vars(cls)) for cls in _CLASSES}
    try:
        yield
    finally:
        changed = [cls for cls in _CLASSES if dict(vars(cls)) != before[cls]]
        for cls in changed:
            for name in vars(cls).keys() - before[cls].keys():
                type.__delattr__(cls, name)
            for name, value in before[cls].items():
                if vars(cls).get(name) is not value:
                    type.__setattr__(cls, name, value)
    if changed:
        raise Denied(f"refused: it alters the class {changed[0].__name__}")


def _problem(metadata: Any) -> str | None:
    """What is wrong with unpickled metadata, None if nothing is. Any attribute may have been set to anything."""
    if type(metadata) is not dcp.Metadata or not isinstance(metadata.state_dict_metadata, dict):
        return "no Metadata"
    entries: dict[Any, Any] = metadata.state_dict_metadata
    for key, value in entries.items():
        if not isinstance(key, str):
            return f"key {key!r}"
        if isinstance(value, dcp.TensorStorageMetadata):
            chunks_ok = isinstance(value.chunks, list) and all(
                isinstance(chunk, dcp.ChunkStorageMetadata)
                and len(chunk.offsets) == len(chunk.sizes) == len(value.size)
                for chunk in value.chunks
            )
            if not chunks_ok or not isinstance(value.properties.dtype, torch.dtype):
                return f"entry {key!r}"
        elif not isinstance(value, dcp.BytesStorageMetadata):
            return f"entry {key!r}"
    if not isinstance(metadata.storage_data, dict):
        return "no storage data"
    places: dict[Any, Any] = metadata.storage_data
    for index, info in places.items():
        if not isinstance(index, dcp.MetadataIndex) or index.fqn not in metadata.state_dict_metadata:
            return f"index {index!r}"
        if type(info) is not _StorageInfo or not isinstance(info.relative_path, str):
            return f"storage info of {index.fqn!r}"
        if min(info.offset, info.length) < 0:
            return f"place of {index.fqn!r}"
        check_key(info.relative_path)
    return None


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a manifest's `dtype`. Raises Corrupt."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise Corrupt(f"unknown dtype {name!r}")
    return dtype


def metadata_of(manifest: Manifest) -> dcp.Metadata:
    """The DCP metadata that says what `manifest` says; `storage_data` included."""
    state: dict[str, dcp.STORAGE_TYPES] = {
        key: dcp.TensorStorageMetadata(
            properties=dcp.TensorProperties(dtype=torch_dtype(entry.dtype)),
            size=torch.Size(entry.shape),
            chunks=[],
        )
        for key, entry in manifest.tensors.items()
    }
    state.update({key: dcp.BytesStorageMetadata() for key in manifest.values})
    storage_data = {}
    for item in manifest.items.rows():
        entry = state[item.key]
        if isinstance(entry, dcp.TensorStorageMetadata):
            assert item.offsets is not None and item.sizes is not None  # the manifest's own check
            index = dcp.MetadataIndex(item.key, item.offsets, len(entry.chunks))
            entry.chunks.append(dcp.ChunkStorageMetadata(torch.Size(item.offsets), torch.Size(item.sizes)))
        else:
            index = dcp.MetadataIndex(item.key)
        name = manifest.objects[item.object].name
        storage_data[index] = _StorageInfo(name, item.offset, item.length)
    paths = {key: entry.path for key, entry in manifest.tensors.items()}
    paths.update({key: value.path for key, value in manifest.values.items()})
    return dcp.Metadata(
        state_dict_metadata=state,
        planner_data=paths,
        storage_data=storage_data,
        storage_meta=dcp.StorageMeta(save_id=manifest.attempt),
        version="1.0.0",  # DCP's own version of this layout (filesystem.CURRENT_DCP_VERSION)
    )


def dump_metadata(manifest: Manifest) -> bytes:
    """The bytes of `.metadata` for `manifest`, as stock DCP would have pickled them."""
    return pickle.dumps(metadata_of(manifest))
