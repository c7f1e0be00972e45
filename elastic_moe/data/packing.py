"""Documents within a window of tokens. Pure.

A document ends with its end-of-document token, which belongs to it; what a window begins with and ends with may be
parts of documents.

Shape suffixes: B windows, S positions; a window holds S + 1 tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from elastic_moe.data.order import Int64s


def documents_of(windows: Int64s, end: int) -> Int64s:
    """The document that each position of each window is in, int64 (B, S), counted from 0 in its window."""
    ends: Int64s = (windows[:, :-1] == end).astype(np.int64)
    before: Int64s = np.cumsum(ends, axis=1) - ends
    return before


def predicted(windows: Int64s, end: int) -> npt.NDArray[np.bool_]:
    """The positions whose next token is of the same document, bool (B, S): the others say nothing of what follows."""
    same: npt.NDArray[np.bool_] = windows[:, :-1] != end
    return same
