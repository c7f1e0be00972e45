"""torch's dtypes by the names that an index has for them, and whether its items are long enough for them."""

from __future__ import annotations

import numpy as np
import torch

from storage.errors import Corrupt, UnloadableValue
from storage.format.index import Index

DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_INT64_MAX = np.iinfo(np.int64).max


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of an entry's `dtype`. Raises UnloadableValue."""
    try:
        return DTYPES[name]
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
        raise Corrupt(f"item {index.key_of(int(short[0]))!r} is too short for its data")
    return index
