"""What the suite takes of a table that grows as a product: so much that each of its rows and columns is met.

SUITE_WHOLE=1 takes all of it (`make test-whole`; so does `make chaos` in what it runs).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import pytest

IS_WHOLE = os.environ.get("SUITE_WHOLE", "0") != "0"

T = TypeVar("T")


def rest(*values: object, id: str | None = None) -> object:
    """A case that is left out of the suite: what it could show, the other cases show each for itself."""
    return pytest.param(*values, id=id, marks=pytest.mark.whole)


def turn(things: Sequence[T], number: int, num: int) -> list[T]:
    """All of them; in the suite `num` of them, in their order and others for each number, so that some in a row meet
    them all.
    """
    if IS_WHOLE:
        return list(things)
    return [things[i] for i in sorted({(number * num + k) % len(things) for k in range(num)})]


def is_left_out(item: pytest.Item) -> bool:
    """Whether a test is marked as one of the whole only."""
    return not IS_WHOLE and item.get_closest_marker("whole") is not None
