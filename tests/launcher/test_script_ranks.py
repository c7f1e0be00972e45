"""On which device a rank computes, and on which lies what the ranks of a script agree on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from launcher.script.ranks import collective_device, highest, use_own_device
from launcher.script.worker import Worker
from tests.accelerators import BACKENDS, Accelerators


def test_without_a_group_each_agrees_with_itself() -> None:
    assert highest([2.0, 1.0]) == [2.0, 1.0]


def test_ranks_agree_on_the_highest_and_on_what_holds_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a second rank that has [0, 3], or says no."""
    other = torch.tensor([0.0, 3.0], dtype=torch.float64)

    def all_reduce(held: torch.Tensor, op: object) -> None:
        theirs = other if len(held) == 2 else torch.ones(1, dtype=torch.float64)
        held.copy_(torch.maximum(held, theirs) if op is dist.ReduceOp.MAX else torch.minimum(held, theirs))

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo")
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert highest([2.0, 1.0]) == [2.0, 3.0]
    assert not Worker({}).on_all_ranks(True)


@pytest.mark.parametrize(("config", "num", "expected"), BACKENDS)
def test_what_ranks_agree_on_lies_on_the_cpu_wherever_the_group_can(
    monkeypatch: pytest.MonkeyPatch, config: str, num: int, expected: str
) -> None:
    Accelerators(monkeypatch, num)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=SimpleNamespace(bound_device_id=None)))
    monkeypatch.setattr(dist, "get_backend_config", lambda: config)
    assert collective_device() == torch.device(expected)


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
