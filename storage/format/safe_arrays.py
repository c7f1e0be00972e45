"""Numpy's dtypes, arrays and scalars from what their pickles say, by public constructors. No arrays of objects."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from storage.format.safe_pickle import Malformed, Pending, Refused

_CODE = re.compile(r"[biufcSUVMm?]\d{0,9}")
_ALIGNED = 0x80
_NUM_DIMS_MAX = 64

SCALARS = {
    kind.__name__: kind
    for kind in vars(np).values()
    if isinstance(kind, type) and issubclass(kind, np.generic) and kind is not np.object_
}
"""Numpy's scalar types by name; as values they are no more than that."""


def new_dtype(code: str, align: bool = False, copy: bool = True) -> Pending:
    """What `numpy.dtype` is called for: the rest comes as its state."""
    if type(code) is str and code.startswith("O"):
        raise Refused("numpy.ndarray of objects")
    if type(code) is not str or not _CODE.fullmatch(code):
        raise Refused("numpy.dtype of an unusual kind")
    return Pending(lambda state: _dtype(code, state))


def _dtype(code: str, state: Any) -> np.dtype[Any]:
    if type(state) is not tuple or len(state) not in (8, 9):
        raise Malformed("a dtype of another version")
    _, order, part, names, fields, size, _, flags, *more = state
    if order not in ("<", ">", "|", "="):
        raise Malformed("a dtype of no byte order")
    if part is not None:
        base, shape = part
        return np.dtype((_checked(base), _shape(shape)))
    if names is not None:
        return _structure(names, fields, size, flags, more)
    if code[0] in "Mm":
        ((about, (unit, count, *divisor)),) = more
        if about or divisor[:1] not in ([], [1]):
            raise Refused("numpy.dtype with metadata")
        name = unit.decode("ascii") if type(unit) is bytes else str(unit)
        return np.dtype(f"{order}{code}" + ("" if name == "generic" else f"[{int(count)}{name}]"))
    if more:
        raise Refused("numpy.dtype with metadata")
    return np.dtype(order + code if order != "|" else code)


def _structure(names: Any, fields: Any, size: Any, flags: Any, more: list[Any]) -> np.dtype[Any]:
    if any(more) or any(len(fields[name]) != 2 for name in names):
        raise Refused("numpy.dtype with titles or metadata")
    return np.dtype(
        {
            "names": list(names),
            "formats": [_checked(fields[name][0]) for name in names],
            "offsets": [int(fields[name][1]) for name in names],
            "itemsize": int(size),
            "aligned": bool(flags & _ALIGNED),
        }
    )


def _checked(dtype: Any) -> np.dtype[Any]:
    if not isinstance(dtype, np.dtype) or dtype.hasobject:
        raise Malformed("no dtype")
    return dtype


def _shape(shape: Any) -> tuple[int, ...]:
    if type(shape) is not tuple or len(shape) > _NUM_DIMS_MAX or any(type(n) is not int or n < 0 for n in shape):
        raise Malformed("no shape")
    return shape


def new_array(kind: Any, shape: Any, code: Any) -> Pending:
    """What `numpy._core.multiarray._reconstruct` is called for; content comes as its state."""
    if kind is not np.ndarray:
        raise Refused(f"numpy array of another class, {getattr(kind, '__qualname__', kind)}")
    if (shape, code) != ((0,), b"b"):
        raise Malformed("an array that is not empty before it has content")
    return Pending(_array)


def _array(state: Any) -> np.ndarray[Any, Any]:
    _, shape, dtype, is_fortran, content = state
    if type(content) is list:
        raise Refused("numpy.ndarray of objects")
    num = math.prod(_shape(shape))
    if type(content) is not bytes or len(content) != num * _checked(dtype).itemsize or (num and not content):
        raise Malformed("an array of other content than it says")
    order: Any = "F" if is_fortran else "C"
    return np.ndarray(shape, dtype, content, order=order).copy(order)


def scalar(dtype: Any, content: Any) -> Any:
    """What `numpy._core.multiarray.scalar` returns."""
    size = _checked(dtype).itemsize
    if type(content) is not bytes or len(content) != size:
        raise Malformed("a scalar of other content than it says")
    array = np.frombuffer(content, dtype, 1) if size else np.zeros(1, dtype)
    return array.copy()[0]
