"""What all tests share: nothing of theirs has to outlive this machine, so nobody waits for its disk."""

import os

import pytest

from tests import order, unsynced

os.fsync = unsynced.fsync


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=order.place)
