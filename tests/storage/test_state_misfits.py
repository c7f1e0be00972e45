"""What a state and a checkpoint do not have in common is told, and can be allowed."""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from storage import Checkpointer, PerRank
from storage.errors import UsageError, WrongModel
from tests.storage.small_runs import Events
from tests.storage.states import Box, Net, model, plain, same, saved_then_restored, train

SURPLUS_AND_VAIN: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"m": Net("a", "b")}, {"m": Net("a")}, r"does not ask for its 'm.b.weight', 'm.b.bias' \("),
    ({"m": Net("a")}, {"m": Net("a", "b")}, r"it has no 'm.b.weight', 'm.b.bias' \("),
    ({"m": Net("a"), "n": 1}, {"m": Net("a")}, "does not ask for its 'n'"),
    ({"m": Net("a")}, {"m": Net("a"), "n": 1}, "it has no 'n'"),
    ({"d": {"x": torch.ones(1), "y": torch.ones(1)}}, {"d": {"x": torch.ones(1)}}, "does not ask for its 'd.y'"),
    ({"d": {"x": torch.ones(1)}}, {"d": {"x": torch.ones(1), "y": torch.ones(1)}}, "it has no 'd.y'"),
    (
        {"d": {str(i): torch.ones(1) for i in range(9)}},
        {"d": {"x": torch.ones(1)}},
        r"its 'd.0', 'd.1', 'd.2', 'd.3', 'd.4', and 4 more",
    ),
]


@pytest.mark.parametrize(("saved", "fresh", "told"), SURPLUS_AND_VAIN)
def test_what_either_side_lacks_is_an_error_that_says_how_to_allow_it(
    saved: dict[str, Any],
    fresh: dict[str, Any],
    told: str,
    tmp_path: Path,
    events: Events,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Checkpointer(str(tmp_path), on_event=events[1]) as checkpointer:
        checkpointer.save(1, saved, wait=True)
        before = plain({key: Box(plain(part)) for key, part in fresh.items()})
        with pytest.raises(WrongModel, match=told) as caught:
            checkpointer.restore(fresh)
        assert "strict=False" in str(caught.value) and "\n" not in str(caught.value)
        assert same(plain({key: Box(plain(part)) for key, part in fresh.items()}), before)
        with caplog.at_level(logging.WARNING):
            assert checkpointer.restore(fresh, strict=False) == 1
        assert "not strict" in caplog.text
    ((fields),) = [fields for name, fields in events[0] if name == "restored_in_part"]
    assert fields["num_missing"] + fields["num_left_out"] > 0


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("saved", "fresh", "told"),
    [
        ({"x": ONE, "y": ONE}, torch.zeros(1), "'s' is a tensor, the checkpoint has a dict"),
        ({"lr": 0.1}, torch.zeros(1), "'s' is a tensor, the checkpoint has a dict"),
        ([ONE, ONE], torch.zeros(1), "'s' is a tensor, the checkpoint has a list"),
        ({"x": ONE, "y": ONE}, [torch.zeros(1), torch.zeros(1)], "'s' is a list, the checkpoint has a dict"),
        ([ONE, ONE], {"x": torch.zeros(1)}, "'s' is a dict, the checkpoint has a list"),
        ({"a": {"b": ONE}}, {"a": torch.zeros(1)}, "'s.a' is a tensor, the checkpoint has a dict"),
    ],
)
def test_a_tensor_is_not_replaced_by_what_cannot_fill_it(saved: Any, fresh: Any, told: str, memory_url: str) -> None:
    """The model may use that very tensor, and would go on with what was in it."""
    with Checkpointer(memory_url) as checkpointer:
        checkpointer.save(1, {"s": saved}, wait=True)
        state = {"s": fresh}
        for strict in (True, False):
            with pytest.raises(WrongModel, match=told):
                checkpointer.restore(state, strict=strict)
        assert state["s"] is fresh
        assert checkpointer.restore({"s": None}) == 1
        assert checkpointer.restore({"s": 5}) == 1


@pytest.mark.parametrize("ignore", ["m.b", "m.b.*", ["m.b.weight", "m.b.bias"], "*.b.*"])
def test_patterns_leave_names_alone(ignore: Any, tmp_path: Path) -> None:
    one, other = Net("a", "b"), Net("a", "b")
    before = other.b.weight.detach().clone()
    saved_then_restored(tmp_path / "alone", {"m": one}, {"m": other}, ignore=ignore)
    assert torch.equal(other.a.weight, one.a.weight) and torch.equal(other.b.weight, before)  # type: ignore[arg-type]
    saved_then_restored(tmp_path / "surplus", {"m": Net("a", "b")}, {"m": Net("a")}, ignore=ignore)
    saved_then_restored(tmp_path / "vain", {"m": Net("a")}, {"m": Net("a", "b")}, ignore=ignore)


def test_a_part_can_be_left_alone_or_be_new(tmp_path: Path) -> None:
    one, other = model(1), model(2)
    first, second = torch.optim.AdamW(one.parameters()), torch.optim.SGD(other.parameters(), lr=0.5)
    train(one, first, 2)
    saved_then_restored(tmp_path, {"m": one, "o": first}, {"m": other, "o": second}, ignore="o")
    assert second.param_groups[0]["lr"] == 0.5 and not second.state
    third = model(3)
    with Checkpointer(str(tmp_path)) as checkpointer:
        checkpointer.restore({"m": third, "new": second}, strict=False)
    assert same(plain(third), plain(one)) and second.param_groups[0]["lr"] == 0.5


def test_another_shape_is_an_error_however_lenient(tmp_path: Path) -> None:
    with pytest.raises(WrongModel, match=r"'m.weight' has shape \[3, 2\], the checkpoint \[2, 2\]"):
        saved_then_restored(tmp_path, {"m": nn.Linear(2, 2)}, {"m": nn.Linear(2, 3)}, strict=False)


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod"])
def test_names_that_differ_by_a_wrapper_are_seen_through(wrapper: str, tmp_path: Path) -> None:
    net = Net("a")
    wrapped = {f"{wrapper}.{name}": value for name, value in net.state_dict().items()}
    with pytest.raises(WrongModel, match=f"the names in the checkpoint have '{wrapper}.' in them") as caught:
        saved_then_restored(tmp_path / "1", {"m": wrapped}, {"m": Net("a")})
    assert "'m.a.weight'" in str(caught.value)
    with pytest.raises(WrongModel, match=f"the names in the state have '{wrapper}.' in them"):
        saved_then_restored(tmp_path / "2", {"m": net}, {"m": wrapped})
    found = Net("a")  # as the hint says
    saved_then_restored(tmp_path / "3", {"m": {wrapper: net}}, {"m": {wrapper: found}})
    assert same(plain(found), plain(net))


def test_an_optimizer_with_other_groups_is_refused(tmp_path: Path) -> None:
    net = model(1)
    one = torch.optim.SGD(net.parameters(), lr=0.1)
    two = torch.optim.SGD([{"params": [p]} for p in net.parameters()], lr=0.1)
    with pytest.raises(WrongModel, match="groups of parameters, the checkpoint 1"):
        saved_then_restored(tmp_path, {"m": net, "o": one}, {"m": net, "o": two})


@pytest.mark.parametrize(
    ("saved", "fresh", "ignore", "expected"),
    [
        (
            {"epoch": 1, "w": torch.ones(1)},
            {"epoch": 9, "w": torch.zeros(1)},
            "epoch",
            {"epoch": 9, "w": torch.ones(1)},
        ),
        (
            {"a": 1, "w": torch.ones(1), "r": PerRank(5)},
            {"a": 0, "w": torch.ones(1), "r": PerRank(7)},
            "r",
            {"a": 1, "w": torch.ones(1), "r": 7},
        ),
        (
            {"d": {1: torch.ones(1), 2: torch.ones(1)}},
            {"d": {1: torch.zeros(1), 2: torch.zeros(1)}},
            "d.2",
            {"d": {1: torch.ones(1), 2: torch.zeros(1)}},
        ),
        (
            {"o": OrderedDict(a=torch.ones(1), b=3)},
            {"o": OrderedDict(a=torch.zeros(1), b=4)},
            ["o.b"],
            {"o": OrderedDict(a=torch.ones(1), b=4)},
        ),
    ],
)
def test_what_is_ignored_stays_as_it_is_in_any_dict(
    saved: Any, fresh: Any, ignore: Any, expected: Any, tmp_path: Path
) -> None:
    found = saved_then_restored(tmp_path, saved, fresh, ignore=ignore)
    assert same(plain(found), plain(expected))


@pytest.mark.parametrize("ignore", ["o", "o.param_groups", "o.state"])
def test_an_optimizer_or_a_part_of_it_is_ignored(ignore: str, tmp_path: Path) -> None:
    one, other = Net("a"), Net("a")
    first, second = torch.optim.AdamW(one.parameters(), lr=0.1), torch.optim.AdamW(other.parameters(), lr=0.7)
    for parameter in one.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.step()
    saved_then_restored(
        tmp_path, {"epoch": 1, "m": one, "o": first}, {"epoch": 0, "m": other, "o": second}, ignore=ignore
    )
    assert second.param_groups[0]["lr"] == (0.1 if ignore == "o.state" else 0.7)
    assert len(second.state) == (2 if ignore == "o.param_groups" else 0)


def test_a_parameter_in_another_group_is_told(tmp_path: Path) -> None:
    one, other = Net("a", "b"), Net("a", "b")

    def grouped(made: Net, names: set[str]) -> torch.optim.Optimizer:
        first = [p for name, p in made.named_parameters() if name in names]
        return torch.optim.AdamW(
            [  # type: ignore[arg-type]
                {"params": first, "weight_decay": 0.5},
                {"params": [p for p in made.parameters() if all(p is not q for q in first)]},
            ]
        )

    saved = {"m": one, "o": grouped(one, {"a.weight", "b.weight"})}
    fresh = {"m": other, "o": grouped(other, {"a.weight"})}
    before = plain(fresh["m"])
    with Checkpointer(str(tmp_path)) as checkpointer:
        checkpointer.save(1, saved, wait=True)
        with pytest.raises(WrongModel, match=r"'o.param_groups.0': parameter 'b.weight' is in this group"):
            checkpointer.restore(fresh)
        assert len(fresh["o"].state) == 0 and before is not None  # type: ignore[attr-defined]
        assert checkpointer.restore(fresh, strict=False) == 1
        alone = {"m": other, "o": torch.optim.AdamW(other.b.parameters())}
        with pytest.raises(WrongModel, match="groups of parameters"):
            checkpointer.restore(alone)


def test_arguments_that_are_none_are_refused(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as checkpointer:
        with pytest.raises(UsageError, match="the state is a list"):
            checkpointer.restore([1])  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="ignore is 5"):
            checkpointer.restore({}, ignore=5)  # type: ignore[arg-type]
