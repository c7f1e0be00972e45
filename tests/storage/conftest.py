"""What the storage tests share."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from tests.ranks import ranks

__all__ = ["ranks"]

_names = itertools.count()


@pytest.fixture
def memory_url() -> str:
    """The URL of a fresh in-memory store."""
    return f"memory://test-{next(_names)}"


@pytest.fixture
def events() -> tuple[list[tuple[str, dict[str, object]]], Callable[[str, dict[str, object]], None]]:
    """A list of events and the listener that fills it."""
    seen: list[tuple[str, dict[str, object]]] = []
    return seen, lambda name, fields: seen.append((name, fields))
