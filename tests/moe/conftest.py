import pytest

from tests.moe import variants
from tests.ranks import ranks

__all__ = ["ranks"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    variants.mark(items)
