"""What all tests share: nobody waits for the disk, since nothing of theirs has to outlive this machine."""

import os

import hypothesis
import pytest

from tests import order, sample, unsynced

os.fsync = unsynced.fsync
# A busy machine is no fault of what is tested: no example is too slow. Nor does a run fail by chance: SUITE_RANDOM=1
# looks for examples that have not been tried.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize="SUITE_RANDOM" not in os.environ,
)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first, and of large tables a sample."""
    items.sort(key=order.place)
    left_out = [item for item in items if sample.is_left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not sample.is_left_out(item)]
