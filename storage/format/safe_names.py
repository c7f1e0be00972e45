"""The names that a value's pickle may hold, and what is done for each. Everything else is refused, or left to torch.

docs/storage.md has the table for users. Whatever is added here must run no code of a checkpoint's choice, open nothing,
and allocate no more than its arguments have.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import math
import pathlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from storage import torch_private
from storage.format import safe_arrays
from storage.format.safe_pickle import Function, Malformed, Names, Pending, Refused, Stranger, UnknownName
from storage.format.tensors import STORAGE_DTYPES

_NUM_DIGITS_MAX = 1000  # of a Decimal: its hash takes long

_BUILTINS: tuple[type, ...] = (
    *(bool, int, float, complex, str, bytes, bytearray),
    *(list, tuple, dict, set, frozenset, range, slice),
)
_FACTORIES = frozenset((*_BUILTINS[:12], collections.OrderedDict, collections.Counter, collections.deque, type(None)))
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_CLASSES: dict[str, tuple[type, ...]] = {
    "collections": (collections.OrderedDict, collections.Counter, collections.deque, collections.defaultdict),
    "datetime": (datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
    "decimal": (decimal.Decimal,),
    "uuid": (uuid.UUID,),
}
_ENCODE, _ARRAY, _SCALAR = (Function(name) for name in ("encode", "array", "scalar"))
_TENSOR_V2, _TENSOR_V3, _PARAMETER, _LAYOUT = (Function(name) for name in ("v2", "v3", "parameter", "layout"))
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}


def _known() -> dict[tuple[str, str], Any]:
    known: dict[tuple[str, str], Any] = {
        ("_codecs", "encode"): _ENCODE,
        ("__builtin__", "xrange"): range,
        ("__builtin__", "unicode"): str,
        ("__builtin__", "long"): int,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        torch_private.REBUILD_TENSOR_V2: _TENSOR_V2,
        torch_private.REBUILD_TENSOR_V3: _TENSOR_V3,
        torch_private.REBUILD_PARAMETER: _PARAMETER,
        torch_private.GET_LAYOUT: _LAYOUT,
        ("torch", "Size"): torch.Size,
        ("torch", "device"): torch.device,
    }
    for module in ("__builtin__", "builtins"):
        known |= {(module, kind.__name__): kind for kind in _BUILTINS}
    for module, kinds in _CLASSES.items():
        known |= {(module, kind.__name__): kind for kind in kinds}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        known |= {(module, "_reconstruct"): _ARRAY, (module, "scalar"): _SCALAR}
    known |= {("numpy", name): kind for name, kind in safe_arrays.SCALARS.items()}
    for module in ("pathlib", "pathlib._local"):
        known |= {(module, name): getattr(pathlib, name) for name in _PATHS}
    for name, value in vars(torch).items():
        if isinstance(value, (torch.dtype, torch.qscheme)):
            known["torch", name] = value
    for module in ("torch", "torch.storage"):
        known |= {(module, name): Function(name) for name in STORAGE_DTYPES}
    return known


_KNOWN = MappingProxyType(_known())


def find(module: str, name: str) -> Any:
    """What a name stands for. Raises UnknownName."""
    try:
        return _KNOWN[module, name]
    except KeyError:
        raise UnknownName(f"{module}.{name}".removeprefix("__builtin__.").removeprefix("builtins.")) from None


def _all(values: Any, *kinds: type) -> Any:
    """The values, if each is exactly of one of the types."""
    if any(type(value) not in kinds for value in values):
        raise Malformed("arguments of other types")
    return values


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise Refused(f"encoding {encoding!r}")
    found: bytes = _all((text,), str)[0].encode("latin-1")
    return found


def _bytes(*args: Any) -> bytes:
    if args:
        raise Refused("bytes of a number")
    return b""


def _bytearray(content: Any = b"", encoding: Any = None) -> bytearray:
    # bytearray(10**10) is ten bytes of a pickle
    return bytearray(_all((content,), bytes)[0] if encoding is None else _encode(content, encoding))


def _deque(content: Any = (), maxlen: Any = None) -> collections.deque[Any]:
    _all((maxlen,), int, type(None))
    if content != ():
        raise Malformed("a deque that is not empty before it has content")
    return collections.deque(maxlen=maxlen)


def _defaultdict(factory: Any = None) -> collections.defaultdict[Any, Any]:
    if factory is not None and not (isinstance(factory, type) and factory in _FACTORIES):
        raise Refused("a default factory that is no built-in type")
    return collections.defaultdict(factory)


def _decimal(text: Any) -> decimal.Decimal:
    if len(_all((text,), str)[0]) > _NUM_DIGITS_MAX:
        raise Refused(f"Decimal of more than {_NUM_DIGITS_MAX} digits")
    return decimal.Decimal(text)


def _uuid(*args: Any) -> Pending:
    def build(state: Any) -> uuid.UUID:
        is_safe = uuid.SafeUUID(state["is_safe"]) if "is_safe" in state else uuid.SafeUUID.unknown
        return uuid.UUID(int=_all((state["int"],), int)[0], is_safe=is_safe)

    return Pending(build)


def _path(kind: type[pathlib.PurePath]) -> Callable[..., pathlib.PurePath]:
    def make(*parts: Any) -> pathlib.PurePath:
        try:
            return kind(*_all(parts, str))
        except NotImplementedError:
            raise Refused(f"{kind.__name__} of another operating system") from None

    return make


def _storage(pid: Any, load: Callable[[str, int], torch.UntypedStorage]) -> tuple[torch.UntypedStorage, torch.dtype]:
    tag, kind, key, _, num = pid
    if tag != "storage" or not isinstance(kind, Function) or kind.name not in STORAGE_DTYPES:
        raise Malformed("no storage")
    dtype = STORAGE_DTYPES[kind.name]
    return load(_all((key,), str)[0], _all((num,), int)[0] * dtype.itemsize), dtype


def _tensor_v2(storage: Any, *args: Any) -> torch.Tensor:
    offset, sizes, strides, grad, hooks, *metadata = args
    return _tensor_v3(storage, offset, sizes, strides, grad, hooks, storage[1], *metadata)


def _tensor_v3(storage: Any, *args: Any) -> torch.Tensor:
    offset, sizes, strides, grad, hooks, dtype, *metadata = args
    if min(_all((offset, *sizes, *strides), int)) < 0 or len(sizes) != len(strides):
        raise Malformed("a tensor of no shape")
    last = offset + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    if math.prod(sizes) and (last + 1) * dtype.itemsize > storage[0].nbytes():
        raise Malformed("a tensor that is larger than its storage")  # torch would make the storage larger
    if any(metadata) or hooks:
        raise UnknownName("torch.Tensor that is conjugated, negated or has hooks")
    tensor = torch.empty(0, dtype=dtype).set_(storage[0], offset, tuple(sizes), tuple(strides))
    return tensor.requires_grad_(bool(grad))


def _parameter(data: Any, grad: Any, hooks: Any) -> torch.nn.Parameter:
    if hooks or not isinstance(data, torch.Tensor):
        raise UnknownName("torch.nn.Parameter with hooks")
    return torch.nn.Parameter(data, bool(grad))


_MAKERS: Mapping[Any, Callable[..., Any]] = {
    _ENCODE: _encode,
    _ARRAY: safe_arrays.new_array,
    _SCALAR: safe_arrays.scalar,
    np.dtype: safe_arrays.new_dtype,
    bytes: _bytes,
    bytearray: _bytearray,
    complex: lambda real, imag: complex(*_all((real, imag), float)),
    set: lambda content=[]: set(_all((content,), list)[0]),
    frozenset: lambda content=[]: frozenset(_all((content,), list)[0]),
    range: lambda *args: range(*_all(args, int)),
    slice: lambda *args: slice(*_all(args, int, type(None))),
    collections.OrderedDict: lambda: collections.OrderedDict(),
    collections.Counter: lambda content={}: collections.Counter(_all((content,), dict)[0]),
    collections.deque: _deque,
    collections.defaultdict: _defaultdict,
    datetime.date: lambda content: datetime.date(*_all((content,), bytes)),
    datetime.datetime: lambda content, *zone: datetime.datetime(
        _all((content,), bytes)[0], *_all(zone, datetime.timezone)
    ),
    datetime.time: lambda content, *zone: datetime.time(_all((content,), bytes)[0], *_all(zone, datetime.timezone)),
    datetime.timedelta: lambda *args: datetime.timedelta(*_all(args, int)),
    datetime.timezone: lambda offset, *name: datetime.timezone(_all((offset,), datetime.timedelta)[0], *name),
    decimal.Decimal: _decimal,
    **{getattr(pathlib, name): _path(getattr(pathlib, name)) for name in _PATHS},
    torch.Size: lambda sizes: torch.Size(_all(sizes, int)),
    torch.device: lambda *args: torch.device(*args),
    _LAYOUT: lambda name: _LAYOUTS[name],
    _TENSOR_V2: _tensor_v2,
    _TENSOR_V3: _tensor_v3,
    _PARAMETER: _parameter,
}
_CREATORS: Mapping[Any, Callable[..., Pending]] = {uuid.UUID: _uuid}


def names_of(load: Callable[[str, int], torch.UntypedStorage]) -> Names:
    """All of them, where `load(key, size_bytes)` is the memory of a tensor of the same file."""
    return Names(find, _MAKERS, _CREATORS, lambda pid: _storage(pid, load))


class _Lenient(Mapping[Any, Callable[..., Any]]):
    """Every call is done: those that are not known, or are of something that is not, make a `Stranger`."""

    def __getitem__(self, wanted: Any) -> Callable[..., Any]:
        known = _MAKERS.get(wanted)

        def make(*args: Any) -> Any:
            if known is None or any(isinstance(arg, Stranger) for arg in args):
                return Stranger()
            try:
                return known(*args)
            except UnknownName:
                return Stranger()

        return make

    def __iter__(self) -> Iterator[Any]:
        return iter(_MAKERS)

    def __len__(self) -> int:
        return len(_MAKERS)


def outline_names_of(load: Callable[[str, int], torch.UntypedStorage]) -> Names:
    """Names to look through a pickle with before torch loads it: its keys, calls, storages and tensors are checked."""

    def find_any(module: str, name: str) -> Any:
        return _KNOWN.get((module, name)) or Function(f"{module}.{name}")

    return Names(find_any, _Lenient(), _Lenient(), lambda pid: _storage(pid, load))
