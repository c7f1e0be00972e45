"""Whether a value that was read back is the one that was written: of the same types and content, down to the bits."""

from __future__ import annotations

import collections
import datetime
import decimal
import pathlib
import struct
import uuid
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

_ATOMS = frozenset((type(None), bool, int, float, str, bytes))
_IN_WORDS = (datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, decimal.Decimal, np.dtype)
"""Equal where they differ: in a fold, in a name, in a number of zeros. Their `repr` tells."""
_AS_THEY_SAY = (range, slice, pathlib.PurePath, torch.Size, torch.dtype, torch.device, torch.layout, type)


def is_plain(value: Any) -> bool:
    """Whether it is made of Python's own atoms, lists, tuples and dicts only, which no pickle changes."""
    seen: set[int] = set()
    level = [value]
    while level:
        parts: list[Any] = []
        for one in level:
            kind = type(one)
            if kind in _ATOMS or id(one) in seen:
                continue
            seen.add(id(one))
            if kind is dict:
                parts += one.keys()
                parts += one.values()
            elif kind is list or kind is tuple:
                parts += one
            else:
                return False
        level = parts
    return True


def same(one: Any, other: Any) -> bool:
    """Whether they are of the same types, and equal; of tensors, and of classes of others, only the types count."""
    return _same(one, other, set())


def _same(one: Any, other: Any, seen: set[tuple[int, int]]) -> bool:
    kind = type(one)
    if kind is not type(other):
        return False
    if kind is float:
        return struct.pack("d", one) == struct.pack("d", other)
    if kind is complex:
        return struct.pack("dd", one.real, one.imag) == struct.pack("dd", other.real, other.imag)
    if kind in _ATOMS or kind is bytearray or isinstance(one, _AS_THEY_SAY):
        return bool(one == other)
    if (id(one), id(other)) in seen:
        return True
    seen.add((id(one), id(other)))
    if isinstance(one, dict):
        return (
            _all_same(one.keys(), other.keys(), seen)
            and _all_same(one.values(), other.values(), seen)
            and getattr(one, "default_factory", None) is getattr(other, "default_factory", None)
            and (kind is not collections.OrderedDict or _same(vars(one), vars(other), seen))
        )
    if kind is collections.deque and one.maxlen != other.maxlen:
        return False
    if kind in (list, tuple, collections.deque):
        return _all_same(one, other, seen)
    if kind in (set, frozenset):
        return sorted(map(_described, one)) == sorted(map(_described, other))
    if isinstance(one, (np.ndarray, np.generic)):
        is_alike = bool(one.dtype == other.dtype) and one.shape == other.shape
        return is_alike and _equal_bytes(one, other)
    if isinstance(one, torch.Tensor):
        return (one.dtype, one.shape, one.requires_grad) == (other.dtype, other.shape, other.requires_grad)
    if isinstance(one, uuid.UUID):
        return (one, one.is_safe) == (other, other.is_safe)
    return not isinstance(one, _IN_WORDS) or repr(one) == repr(other)


def _all_same(one: Iterable[Any], other: Iterable[Any], seen: set[tuple[int, int]]) -> bool:
    parts, others = list(one), list(other)
    return len(parts) == len(others) and all(_same(*pair, seen) for pair in zip(parts, others, strict=True))


def _described(value: Any) -> str:
    return f"{type(value)} {value!r}"


def _equal_bytes(one: Any, other: Any) -> bool:
    # padding is neither here nor there
    return one.tobytes() == other.tobytes() or bool(np.array_equal(one, other))
