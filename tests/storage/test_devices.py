"""On which device the tensors of a group's collectives lie."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from storage.ranks.devices import collective_device
from tests.accelerators import BACKENDS, Accelerators


@pytest.mark.parametrize(("config", "num", "expected"), BACKENDS)
def test_tensors_of_collectives_lie_on_the_cpu_wherever_the_group_can(
    monkeypatch: pytest.MonkeyPatch, config: str, num: int, expected: str
) -> None:
    Accelerators(monkeypatch, num)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    assert collective_device(_group()) == torch.device(expected)


def test_a_group_that_is_bound_to_a_device_has_them_there(monkeypatch: pytest.MonkeyPatch) -> None:
    Accelerators(monkeypatch, 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    assert collective_device(_group(torch.device("cuda", 1))) == torch.device("cuda", 1)


def _group(bound: torch.device | None = None) -> Any:
    return SimpleNamespace(bound_device_id=bound)
