"""What the objects of an unpickled `Metadata` say, any of which may be anything; see `dcp_metadata`.

Nothing is hashed, compared or shown before its type is known.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from storage.format.columns import Boxes, Ints
from storage.format.opcodes import Record

_NUM_FIELDS_MAX = 16
_NUM_DIMS_MAX = 64  # torch's own
_NUM_PARTS_MAX = 1024


class Odd(Exception):
    """The parts of the metadata do not fit together."""


def types_of(objects: Iterable[Any]) -> set[type]:
    return set(map(type, objects))


def pairs_of(pairs: Any) -> tuple[list[Any], list[Any]]:
    """Keys and values of what was a dict, see `harmless`. Nothing is known of either."""
    if type(pairs) is not list:
        raise Odd("something else in the place of a dict")
    if tuple in types_of(pairs[::2]):  # no key is a tuple: this was set alone
        flat = list[Any]()
        at = 0
        while at < len(pairs):
            is_pair = type(pairs[at]) is tuple and len(flat) % 2 == 0
            flat += pairs[at] if is_pair else pairs[at : at + 2]
            at += 1 if is_pair else 2
        pairs = flat
    if len(pairs) % 2:
        raise Odd("a key without a value")
    return pairs[::2], pairs[1::2]


def fields_of(record: Record) -> dict[str, Any]:
    """The fields that an object's state sets, by name."""
    if len(record) != 1 or type(record[0]) is not list or len(record[0]) > 2 * _NUM_FIELDS_MAX:
        raise Odd("an object without a state")
    names, values = pairs_of(record[0])
    if types_of(names) - {str}:
        raise Odd("an object with odd fields")
    return dict(zip(names, values, strict=True))


def columns_of(
    records: Sequence[Any], kind: type, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Sequence[Any]]:
    """The fields of many objects; None for an optional one that is not there."""
    if types_of(records) - {kind}:
        raise Odd(f"something else in the place of {kind.__name__}")
    states = list(itertools.chain.from_iterable(records))
    if len(states) != len(records) or set(map(len, records)) - {1} or types_of(states) - {list}:
        raise Odd(f"a {kind.__name__} without a state")
    names = states[0][::2] if states else []
    width = 2 * len(names)
    if len(names) <= _NUM_FIELDS_MAX and not types_of(names) - {str} and not set(map(len, states)) - {width}:
        flat = list(itertools.chain.from_iterable(states))
        # most are all alike: then the fields are every so many apart
        if all(flat[2 * place :: width].count(name) == len(states) for place, name in enumerate(names)):
            known = {name: flat[2 * place + 1 :: width] for place, name in enumerate(names)}
            return {
                **{name: known[name] if states else [] for name in required},
                **{name: known.get(name) or [None] * len(states) for name in optional},
            }
    rows = [fields_of(record) for record in records]
    return {
        **{name: [row[name] for row in rows] for name in required},
        **{name: [row.get(name) for row in rows] for name in optional},
    }


def boxes_of(rows: Sequence[Any]) -> Boxes:
    """Tuples of whole numbers from 0 to 2^63 - 1, or None, as columns."""
    kinds = types_of(rows)
    if kinds - {tuple, type(None)}:
        raise Odd("a shape that is none")
    full = rows if kinds == {tuple} else [() if row is None else row for row in rows]
    num_dims = np.fromiter(map(len, full), np.int64, len(full))
    if num_dims.max(initial=0) > _NUM_DIMS_MAX:
        raise Odd(f"a shape of {num_dims.max()} dimensions")
    numbers = whole_numbers(list(itertools.chain.from_iterable(full)))
    if full is not rows:
        num_dims[[row is None for row in rows]] = -1
    return Boxes(num_dims, numbers)


def whole_numbers(numbers: Sequence[Any]) -> Ints:
    if types_of(numbers) - {int}:
        raise Odd("something else in the place of a number")
    try:
        column = np.fromiter(numbers, np.int64, len(numbers))
    except OverflowError:
        raise Odd("a number of more than 64 bits") from None
    if column.min(initial=0) < 0:
        raise Odd("a negative number")
    return column


def is_path(path: Any) -> bool:
    return type(path) is tuple and len(path) <= _NUM_PARTS_MAX and not types_of(path) - {str, int}
