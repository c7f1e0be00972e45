"""Long items of stock DCP, read in parts.

Such an item is a zip with one checksum for all of a tensor's bytes, so that it has to be read as a whole; but nothing
says that it has to be in memory as a whole. Its two ends are looked at first: they say where the tensor's bytes are
and in which order (`look`). Then its parts go where a part of an item of ours would go, while a running sum
(`zips.RunningSum`) learns their checksums, in whatever order they come; with the last one it is known whether
they are right.
"""

from __future__ import annotations

import io
import itertools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from storage.format import safe_pickle
from storage.format.checksum import crc32
from storage.format.safe_pickle import Function, Malformed, Names, Refused, UnknownName
from storage.format.tensors import STORAGE_DTYPES
from storage.format.zips import ZIP_ERRORS, OutOfSight, Window, member_start
from storage.torch_private import REBUILD_TENSOR_V2, REBUILD_TENSOR_V3

LONG_ITEM_BYTES = 16 * 1024 * 1024
"""Longer items are read in parts; the others in one."""
PART_SIZE_BYTES = 8 * 1024 * 1024
END_SIZE_BYTES = 16 * 1024
"""How much of either end is looked at."""

_DTYPES: dict[str, torch.dtype | None] = {**STORAGE_DTYPES, "UntypedStorage": None}


@dataclass(frozen=True)
class Layout:
    """Where a tensor lies in its item.

    Its elements begin `raw_offset` bytes after the item, row-major after its dimensions were put into `order` (`sizes`
    are those before). The bytes [start, stop) of the item have the CRC32 `crc32`; 0 means that nobody has computed it.
    """

    dtype: torch.dtype
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    raw_offset: int
    start: int
    stop: int
    crc32: int


def look(read: Callable[[int, int], memoryview], length: int) -> Layout | None:
    """The layout of an item of `length` bytes of which `read(start, size_bytes)` reads some: 16 KiB at either end.

    None if it is not the intact zip of one dense tensor as far as its ends tell. Raises what `read` raises.
    """
    size = min(END_SIZE_BYTES, length // 2)
    head, tail = read(0, size), read(length - size, size)
    try:
        return _layout(Window(length, ((0, head), (length - size, tail))))
    except (_Other, OutOfSight, *ZIP_ERRORS):
        return None


class _Other(Exception):
    """Not the zip of one dense tensor, as far as its ends tell."""


def _layout(window: Window) -> Layout:
    with zipfile.ZipFile(io.BufferedReader(window)) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise _Other
    data, others = _only_data(members)
    content = {}
    for member in others:
        start = _start(window, member)
        body = window.view(start, member.file_size)
        if body is None or (member.CRC and crc32(body) != member.CRC):
            raise _Other
        content[member.filename.partition("/")[2]] = body
    if "data.pkl" not in content or bytes(content.get("byteorder", b"little")) != b"little":
        raise _Other
    start = _start(window, data)
    return _layout_of(bytes(content["data.pkl"]), start, data.file_size, data.CRC)


def _only_data(members: list[zipfile.ZipInfo]) -> tuple[zipfile.ZipInfo, list[zipfile.ZipInfo]]:
    data = [member for member in members if member.filename.partition("/")[2].startswith("data/")]
    if len(data) != 1:
        raise _Other
    return data[0], [member for member in members if member is not data[0]]


def _start(window: Window, member: zipfile.ZipInfo) -> int:
    header = window.view(member.header_offset, 30)
    if header is None:
        raise _Other
    return member.header_offset + member_start(header, 0)


def _layout_of(data: bytes, start: int, size_bytes: int, crc32: int) -> Layout:
    try:
        tensor = safe_pickle.read(data, _NAMES)
    except (Refused, Malformed):  # `values` says what is wrong with this one
        raise _Other from None
    if not isinstance(tensor, _PickledTensor) or not _is_sound(tensor):
        raise _Other
    order = tuple(sorted(range(len(tensor.sizes)), key=lambda dim: (-tensor.strides[dim], dim)))
    expected = 1
    for dim in reversed(order):
        if tensor.sizes[dim] > 1 and tensor.strides[dim] != expected:
            raise _Other
        expected *= tensor.sizes[dim]
    raw_offset = start + tensor.offset * tensor.dtype.itemsize
    if not expected or raw_offset + expected * tensor.dtype.itemsize > start + size_bytes:
        raise _Other
    return Layout(tensor.dtype, tensor.sizes, order, raw_offset, start, start + size_bytes, crc32)


@dataclass(frozen=True)
class _PickledTensor:
    """What the pickle of a tensor says; offset and strides are in elements. Any of it may be anything."""

    dtype: torch.dtype
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def _is_sound(tensor: _PickledTensor) -> bool:
    numbers = itertools.chain((tensor.offset,), tensor.sizes, tensor.strides)
    return (
        isinstance(tensor.dtype, torch.dtype)
        and len(tensor.sizes) == len(tensor.strides)
        and all(isinstance(number, int) and number >= 0 for number in numbers)
    )


_V2, _V3 = Function("v2"), Function("v3")
_KNOWN: dict[tuple[str, str], Any] = {
    REBUILD_TENSOR_V2: _V2,
    REBUILD_TENSOR_V3: _V3,
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, name): Function(name) for module in ("torch", "torch.storage") for name in _DTYPES},
}


def _find(module: str, name: str) -> Any:
    found = getattr(torch, name, None) if module == "torch" else None
    if isinstance(found, torch.dtype):
        return found
    if (module, name) not in _KNOWN:
        raise UnknownName(name)
    return _KNOWN[module, name]


def _storage(pid: Any) -> Function:
    kind, storage, *_ = pid
    if kind != "storage" or not isinstance(storage, Function) or storage.name not in _DTYPES:
        raise Refused("no storage")
    return storage


def _rebuild_v2(storage: Function, *args: Any) -> _PickledTensor:
    offset, sizes, strides, grad, hooks, *metadata = args
    return _rebuild_v3(storage, offset, sizes, strides, grad, hooks, _DTYPES[storage.name], *metadata)


def _rebuild_v3(storage: Function, *args: Any) -> _PickledTensor:
    offset, sizes, strides, _, _, dtype, *metadata = args
    if any(metadata):
        raise Refused("a tensor that is conjugated or negated")
    return _PickledTensor(dtype, offset, tuple(sizes), tuple(strides))


_NAMES = Names(_find, {_V2: _rebuild_v2, _V3: _rebuild_v3, OrderedDict: lambda: OrderedDict()}, {}, _storage)
"""What the pickle of a plain tensor names: what notes it down, and nothing else."""
