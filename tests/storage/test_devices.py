"""On which device the tensors of a group's collectives lie."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from storage.ranks.devices import collective_device
from tests.accelerators import Accelerators


@pytest.mark.parametrize(
    ("config", "num", "expected"),
    [
        ("cpu:gloo", 0, "cpu"),  # what init_process_group() makes of no backend without an accelerator
        ("cpu:gloo", 2, "cpu"),
        ("cpu:gloo,cuda:gloo", 2, "cpu"),
        ("cuda:nccl,cpu:gloo", 2, "cpu"),
        ("cpu:gloo,cuda:nccl", 2, "cpu"),
        ("cuda:nccl", 2, "cuda"),
        ("xpu:xccl", 2, "xpu"),
        ("cuda:nccl", 0, "cpu"),  # nothing works then; torch says so best itself
    ],
)
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
