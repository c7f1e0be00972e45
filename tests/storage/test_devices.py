"""On which device a rank computes, and on which its collectives' tensors lie."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from storage.ranks.devices import collective_device, use_own_device


class Accelerators:
    """As many as a test wants, in place of this machine's; none of them can be used."""

    def __init__(self, patch: pytest.MonkeyPatch, num: int, current: int = 0) -> None:
        self.current = current
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
        patch.setattr(torch.accelerator, "is_available", lambda: num > 0)
        patch.setattr(torch.accelerator, "device_count", lambda: num)
        patch.setattr(torch.accelerator, "current_device_index", lambda: self._of(num).current)
        patch.setattr(torch.accelerator, "set_device_index", self._set)

    def _of(self, num: int) -> Accelerators:
        assert num, "none is touched where there is none"
        return self

    def _set(self, index: int) -> None:
        self.current = index


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


@pytest.mark.parametrize(
    ("num", "current", "local_rank", "expected"),
    [
        (0, 0, 1, 0),
        (4, 0, 0, 0),
        (4, 0, 3, 3),
        (4, 2, 3, 2),  # the script has chosen
        (1, 0, 1, 0),  # each worker sees its own only
        (2, 0, 2, 0),  # more workers than devices: told, and left to the script
    ],
)
def test_a_rank_takes_the_device_of_its_local_rank(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num: int,
    current: int,
    local_rank: int,
    expected: int,
) -> None:
    accelerators = Accelerators(monkeypatch, num, current)
    use_own_device(local_rank)
    assert accelerators.current == expected
    assert ("no device of its own" in caplog.text) == (local_rank >= num > 1)
