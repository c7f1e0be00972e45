"""The lock that tells after which step the state stands: optimizers, scalers, and who holds it still."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from storage.live.lock import StepLock

DEADLINE_S = 60.0


@pytest.fixture
def lock() -> Iterator[StepLock[int]]:
    lock: StepLock[int] = StepLock()
    lock.start()
    yield lock
    lock.close()


def optimizer_of(*values: float) -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.tensor(values))
    parameter.grad = torch.ones_like(parameter)
    return torch.optim.SGD([parameter], lr=1.0)


def seen(lock: StepLock[int], timeout_s: float = 0.0) -> int | str:
    with lock.held(timeout_s) as note:
        return note


def test_a_note_lasts_until_an_optimizer_steps(lock: StepLock[int]) -> None:
    assert seen(lock) == "no step was noted yet"
    first, second = optimizer_of(1.0), optimizer_of(2.0)
    first.step()
    lock.note(1)
    assert seen(lock) == 1
    second.step()
    assert seen(lock) == "an optimizer's step was applied, and no step noted after it"
    first.step()
    lock.note(2)
    assert seen(lock) == 2
    assert set(lock.optimizers) == {first, second}
    lock.clear("a restore has begun")
    assert seen(lock) == "a restore has begun"


def test_a_scaler_that_skips_leaves_the_note(lock: StepLock[int]) -> None:
    scaler = torch.amp.GradScaler("cpu")
    optimizer = optimizer_of(1.0)
    parameter = optimizer.param_groups[0]["params"][0]
    lock.note(3)
    scaler.scale(parameter.sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert seen(lock) == 3
    parameter.grad = None
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    assert isinstance(seen(lock), str)


def test_an_optimizer_waits_for_who_holds_the_state(lock: StepLock[int]) -> None:
    optimizer = optimizer_of(1.0)
    parameter = optimizer.param_groups[0]["params"][0]
    lock.note(4)
    stepping = threading.Thread(target=optimizer.step, daemon=True)
    with lock.held(0.0) as note:
        assert note == 4
        stepping.start()
        stepping.join(0.2)  # as long as it gets, it does not pass
        assert parameter.item() == 1.0
    stepping.join(DEADLINE_S)
    assert parameter.item() == 0.0


@pytest.mark.parametrize("change", ["note", "clear"])
def test_so_does_who_changes_it_otherwise(lock: StepLock[int], change: str) -> None:
    """A restore, say, that would write over what is being copied."""
    lock.note(4)
    calls = {"note": lambda: lock.note(5), "clear": lambda: lock.clear("a restore has begun")}
    changing = threading.Thread(target=calls[change], daemon=True)
    with lock.held(0.0) as note:
        assert note == 4
        changing.start()
        changing.join(0.2)
        assert changing.is_alive()
    changing.join(DEADLINE_S)
    assert seen(lock) == {"note": 5, "clear": "a restore has begun"}[change]


def test_a_step_that_is_being_applied_is_waited_for(lock: StepLock[int]) -> None:
    optimizer_of(1.0).step()
    found: list[int | str] = []
    asking = threading.Thread(target=lambda: found.append(seen(lock, DEADLINE_S)), daemon=True)
    asking.start()
    lock.note(5)
    asking.join(DEADLINE_S)
    assert found == [5]


def test_a_closed_lock_hears_of_no_optimizer(lock: StepLock[int]) -> None:
    lock.close()
    optimizer = optimizer_of(1.0)
    optimizer.step()
    assert not lock.optimizers
    assert seen(lock) == "the Checkpointer is closed"
