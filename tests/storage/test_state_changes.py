"""A state that changes while it is copied behind the training's back is found, and told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from storage.arena.changes import StateChanged, check_samples, sample_of, witnesses
from storage.arena.moves import Move
from tests.storage.staging_rig import Rig, copies, same


@pytest.fixture
def rig() -> Iterator[Rig]:
    with contextlib.closing(Rig()) as made:
        yield made


@pytest.mark.parametrize("how", ["in place", "data", "numpy", "a few numbers of many"])
def test_a_change_before_the_optimizers_step_fails_the_save_and_the_next_ones_are_not_late(rig: Rig, how: str) -> None:
    optimizer = torch.optim.SGD(rig.model.parameters(), lr=0.1)
    rig.train(optimizer)
    weight = rig.model[2].weight
    staged = rig.stage(rig.named())
    match how:
        case "in place":
            with torch.no_grad():
                weight.mul_(2)
        case "data":
            weight.data.mul_(2)
        case "numpy":
            weight.detach().numpy()[:] = 0
        case _:
            with torch.no_grad():
                weight[100, 3] = 5
    with pytest.raises(StateChanged, match=r"'2.weight' was changed before the next step of its optimizer"):
        staged.wait()
    rig.train(optimizer)
    assert rig.heard.changes == ["2.weight"]
    with pytest.raises(StateChanged):
        staged.wait()
    staged.release()
    expected = copies(rig.named())
    staged = rig.stage(rig.named())
    assert not staged.is_pending
    assert same(staged, expected)


def test_a_change_that_the_step_finds_does_not_harm_the_step(rig: Rig) -> None:
    optimizer = torch.optim.SGD(rig.model.parameters(), lr=0.1)
    rig.train(optimizer)
    staged = rig.stage(rig.named())
    rig.model[0].weight.data.add_(1)
    rig.train(optimizer)
    assert rig.heard.changes == ["0.weight"]
    with pytest.raises(StateChanged):
        staged.wait()


def test_a_change_after_all_is_copied_is_no_change(rig: Rig) -> None:
    optimizer = torch.optim.SGD(rig.model.parameters(), lr=0.1)
    rig.train(optimizer)
    expected = copies(rig.named())
    staged = rig.stage(rig.named())
    staged.wait()
    rig.model[0].weight.data.add_(1)
    rig.train(optimizer)
    staged.wait()
    assert same(staged, expected)


def test_what_was_swapped_and_swapped_back_is_found_in_the_copy() -> None:
    tensor = torch.randn(5000)
    move = Move("w", tensor, torch.empty(5000))
    seen = witnesses([move], 0)
    move.target.copy_(tensor * 0.5)
    with pytest.raises(StateChanged, match="'w'"):
        check_samples(seen)
    move.target.copy_(tensor)
    check_samples(seen)


def test_samples_are_of_every_part_and_of_other_tensors_each_turn() -> None:
    tensor = torch.zeros(1 << 16)
    before = sample_of(tensor)
    for part in tensor.chunk(8):
        part.fill_(1)
        assert sample_of(tensor) != before
        part.fill_(0)
    tensor[-1] = 1
    assert sample_of(tensor) != before
    assert sample_of(tensor.reshape(256, 256).t()) is None
    many = [Move(str(n), torch.zeros(1), torch.zeros(1)) for n in range(2000)]
    sampled = [{w.move.name for w in witnesses(many, turn) if w.sample is not None} for turn in range(4)]
    assert all(len(names) <= 512 for names in sampled)
    assert set().union(*sampled) == {move.name for move in many}
