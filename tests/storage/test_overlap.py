"""Saves of a Checkpointer that returns before all is copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from storage import Checkpointer, CheckpointEvent, Staging, UsageError
from storage.arena import arena as arenas
from storage.arena import pending
from storage.arena.moves import pieces_of
from storage.arena.slot import Slot


class Run:
    """A model with a buffer that changes in each forward pass, trained with saves."""

    def __init__(self, folder: Path, **options: Any) -> None:
        torch.manual_seed(3)
        self.events: list[tuple[CheckpointEvent, dict[str, Any]]] = []
        self.model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Linear(64, 1000))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.checkpointer = Checkpointer(
            str(folder), on_event=lambda event, fields: self.events.append((event, fields)), **options
        ).start()

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def step(self) -> None:
        self.model(torch.randn(8, 16)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def copy(self) -> dict[str, torch.Tensor]:
        found = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for number, state in enumerate(self.optimizer.state.values()):
            found |= {f"{number}.{name}": tensor.clone() for name, tensor in state.items()}
        return found

    def told(self, event: CheckpointEvent) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    made: list[Run] = []

    def start(**options: Any) -> Run:
        made.append(Run(tmp_path, **options))
        return made[-1]

    yield start
    for run in made:
        run.checkpointer.close()


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("staging", ["overlapped", Staging.SYNC])
def test_what_is_restored_is_the_state_of_the_save(start: Callable[..., Run], staging: Any) -> None:
    run = start(staging=staging)
    run.step()
    for step in range(1, 6):
        expected = run.copy()
        run.checkpointer.save(step, run.state)
        run.step()
        assert run.checkpointer.restore(run.state) == step
        assert equal(run.copy(), expected)
        run.step()
    assert [fields.get("overlapped", False) for fields in run.told(CheckpointEvent.STAGED)] == [
        staging == "overlapped"
    ] * 5
    assert not run.told(CheckpointEvent.STATE_CHANGED)


def test_the_default_is_to_return_when_all_is_copied(start: Callable[..., Run]) -> None:
    run = start()
    run.step()
    run.checkpointer.save(1, run.state, wait=True)
    assert "overlapped" not in run.told(CheckpointEvent.STAGED)[0]


def test_a_broken_rule_fails_that_save_alone(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(staging="overlapped")
    run.step()
    run.checkpointer.save(1, run.state, wait=True)
    expected = run.copy()

    def change() -> None:
        run.model.get_parameter("2.weight").data.fill_(7)

    def changes_first(moves: Any) -> list[Callable[[], None]]:
        return [change, *pieces_of(moves)]

    monkeypatch.setattr(pending, "pieces_of", changes_first)
    run.checkpointer.save(2, run.state, wait=True)
    monkeypatch.undo()
    (changed,) = run.told(CheckpointEvent.STATE_CHANGED)
    assert (changed["step"], changed["name"]) == (2, "model.2.weight")
    (failed,) = run.told(CheckpointEvent.FAILED)
    assert failed["step"] == 2
    assert "'model.2.weight' was changed before the next step of its optimizer" in failed["reason"]
    run.step()
    assert run.checkpointer.restore(run.state) == 1
    assert equal(run.copy(), expected)
    run.checkpointer.save(3, run.state, wait=True)
    assert "overlapped" not in run.told(CheckpointEvent.STAGED)[-1]
    assert run.told(CheckpointEvent.COMMITTED)[-1]["step"] == 3


def test_a_save_without_memory_fails_and_the_next_one_commits(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoSlot:
        @classmethod
        def create(cls, size_bytes: int) -> Slot:
            return Slot.create(1 << 50)

    run = start(staging="overlapped")
    run.step()
    monkeypatch.setattr(arenas, "Slot", NoSlot)
    run.checkpointer.save(1, run.state, wait=True)
    monkeypatch.undo()
    assert "no room to stage" in run.told(CheckpointEvent.FAILED)[0]["reason"]
    run.step()
    run.checkpointer.save(2, run.state, wait=True)
    assert [fields["step"] for fields in run.told(CheckpointEvent.COMMITTED)] == [2]


def test_the_script_ends_while_a_save_is_copied(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start(staging="overlapped")
    run.step()
    expected = run.copy()
    run.checkpointer.save(1, run.state)
    run.checkpointer.close()
    run.step()
    again = Run(tmp_path)
    with again.checkpointer:
        assert again.checkpointer.restore(again.state) == 1
    assert equal(again.copy(), expected)


def test_a_staging_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"staging is 'late'; it must be 'sync' or 'overlapped'"):
        Checkpointer(str(tmp_path), staging="late")  # type: ignore[arg-type]
