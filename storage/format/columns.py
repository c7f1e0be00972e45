"""Columns of a document: arrays in memory, plain lists in its JSON.

A checkpoint may have hundreds of thousands of items. As Python's own numbers and tuples they take several times the
memory of the arrays, and the collector walks over them again and again; they exist for one document at a time, while
it is parsed or written.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import GetCoreSchemaHandler, GetPydanticSchema
from pydantic_core import CoreSchema, core_schema

from storage.errors import Corrupt

Ints = npt.NDArray[np.int64]
Array = npt.NDArray[np.uint8]

_NUMBER = core_schema.int_schema()
# a single long row must not make gigabytes of many short ones
_WIDTH_MAX_OF_MANY = 16
_NUM_PADDED_MAX = 1 << 24


def _column(numbers: Sequence[int] | Ints) -> Ints:
    try:
        column = np.array(numbers, np.int64)
    except OverflowError:
        raise ValueError("a number of more than 64 bits") from None
    if column.min(initial=0) < 0:  # here, because for the whole column at once that costs nothing
        raise ValueError("a negative number")
    column.setflags(write=False)
    return column


def _schema(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
    return core_schema.json_or_python_schema(
        core_schema.no_info_after_validator_function(_column, core_schema.list_schema(_NUMBER)),
        core_schema.no_info_plain_validator_function(_column),
        serialization=core_schema.plain_serializer_function_ser_schema(
            np.ndarray.tolist, return_schema=core_schema.list_schema(core_schema.int_schema())
        ),
    )


IntColumn = Annotated[Ints, GetPydanticSchema(_schema)]
"""Numbers from 0 to 2^63 - 1: a read-only array."""


@dataclass(frozen=True, eq=False)
class Boxes:
    """Tuples of numbers from 0 to 2^63 - 1 or None, one a row.

    Row i has `num_dims[i]` numbers, -1 for None; `numbers` has those of all rows, one row after the other.
    """

    num_dims: Ints
    numbers: Ints

    @classmethod
    def of(cls, rows: Sequence[Sequence[int] | None]) -> Boxes:
        """Those rows as columns. Raises ValueError for a number that is negative or too large."""
        num_dims = np.array([-1 if row is None else len(row) for row in rows], np.int64)
        num_dims.setflags(write=False)
        return cls(num_dims, _column(list(itertools.chain.from_iterable(filter(None, rows)))))

    @classmethod
    def join(cls, parts: Sequence[Boxes]) -> Boxes:
        """Boxes with the rows of all parts, one part after the other."""
        if not parts:
            return cls.of(())
        return cls(np.concatenate([part.num_dims for part in parts]), np.concatenate([part.numbers for part in parts]))

    def __len__(self) -> int:
        return len(self.num_dims)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Boxes)
            and np.array_equal(self.num_dims, other.num_dims)
            and np.array_equal(self.numbers, other.numbers)
        )

    __hash__ = None  # type: ignore[assignment]

    def rows(self) -> Iterator[tuple[int, ...] | None]:
        """Yield every row, in order."""
        numbers = iter(self.numbers.tolist())
        return (None if num < 0 else tuple(itertools.islice(numbers, num)) for num in self.num_dims.tolist())

    def padded(self, fill: int, width: int | None = None) -> Ints:
        """One array, `width` or as wide as the longest row; shorter rows and None are filled up. Raises Corrupt."""
        width = int(self.num_dims.max(initial=0)) if width is None else width
        if width > _WIDTH_MAX_OF_MANY and len(self) * width > _NUM_PADDED_MAX:
            raise Corrupt(f"{len(self)} shards, and one of {width} dimensions among them")
        array = np.full((len(self), width), fill, np.int64)
        array[np.arange(width) < self.num_dims[:, None]] = self.numbers
        return array

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # tuples, which the collector forgets once it has seen that they hold numbers only
        row = core_schema.nullable_schema(core_schema.tuple_schema([_NUMBER], variadic_item_index=0))
        return core_schema.json_or_python_schema(
            core_schema.no_info_after_validator_function(cls.of, core_schema.list_schema(row)),
            core_schema.is_instance_schema(cls),
            serialization=core_schema.plain_serializer_function_ser_schema(
                cls.rows, return_schema=core_schema.generator_schema(row)
            ),
        )
