"""A training script's own objects: what is saved is what is there after a restore, and what does not fit is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from storage import Checkpointer, open_store
from storage.errors import UnsupportedValue, UsageError
from storage.run import catalog
from tests.storage.states import OPTIMIZERS, SCHEDULERS, Box, Net, model, plain, same, saved_then_restored, train


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fresh_optimizer_goes_on_as_the_saved_one(name: str, tmp_path: Path) -> None:
    def started(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        made = model(seed)
        return made, OPTIMIZERS[name](made.parameters())

    (one, first), (other, second) = started(1), started(2)
    train(one, first, 3)
    saved_then_restored(tmp_path, {"model": one, "optimizer": first}, {"model": other, "optimizer": second})
    assert same(plain(second), plain(first))
    assert train(one, first, 3, seed=5) == train(other, second, 3, seed=5)
    assert same(plain(other), plain(one))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_fresh_scheduler_goes_on_as_the_saved_one(name: str, tmp_path: Path) -> None:
    def started() -> dict[str, Any]:
        made = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
        return {"model": made, "optimizer": optimizer, "scheduler": SCHEDULERS[name](optimizer)}

    def rates(state: dict[str, Any], num_steps: int) -> list[float]:
        found = []
        for _ in range(num_steps):
            state["optimizer"].step()
            state["scheduler"].step()
            found.append(state["optimizer"].param_groups[0]["lr"])
        return found

    one, other = started(), started()
    rates(one, 3)
    saved_then_restored(tmp_path, one, other)
    assert rates(other, 6) == rates(one, 6)


def test_parameter_groups_are_found_by_names(tmp_path: Path) -> None:
    def grouped(made: nn.Module, decayed_first: bool) -> torch.optim.Optimizer:
        decayed = {"params": [p for p in made.parameters() if p.ndim > 1], "weight_decay": 0.1}
        rest = {"params": [p for p in made.parameters() if p.ndim == 1], "weight_decay": 0.0}
        return torch.optim.AdamW([decayed, rest] if decayed_first else [rest, decayed], lr=0.01)

    one, other = model(1), model(2)
    first, second = grouped(one, True), grouped(other, False)
    train(one, first, 2)
    second.param_groups[0]["mine"] = 7  # what an older optimizer did not save
    saved_then_restored(tmp_path, {"m": one, "o": first}, {"m": other, "o": second})
    assert [group["weight_decay"] for group in second.param_groups] == [0.0, 0.1]
    assert second.param_groups[0]["mine"] == 7
    for name, parameter in other.named_parameters():
        saved = first.state[dict(one.named_parameters())[name]]
        assert same(plain(second.state[parameter]), plain(saved)), name


def test_two_models_one_optimizer_and_an_optimizer_of_nothing_that_is_saved(tmp_path: Path) -> None:
    def started(seed: int) -> dict[str, Any]:
        made: dict[str, Any] = {
            "nets": {"a": model(seed), "b": model(seed + 1)},
            "loose": nn.Parameter(torch.full((3,), float(seed))),
        }
        both = [*made["nets"]["a"].parameters(), *made["nets"]["b"].parameters()]
        made["both"] = torch.optim.AdamW(both, lr=0.01)
        made["own"] = torch.optim.SGD([made["loose"]], lr=0.1, momentum=0.9)
        for parameter in [*both, made["loose"]]:
            parameter.grad = torch.full_like(parameter, float(seed))
        return made

    one, other = started(1), started(5)
    one["both"].step(), one["own"].step()
    saved_then_restored(tmp_path, one, other)
    assert same(plain(other["both"]), plain(one["both"])) and same(plain(other["own"]), plain(one["own"]))
    assert same(plain(other["nets"]["b"]), plain(one["nets"]["b"]))


def test_a_state_keeps_its_own_dtype_and_its_text(tmp_path: Path) -> None:
    """torch's `load_state_dict` casts to the parameter's dtype, and makes "<generator object ...>" of a string."""
    one, other = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4).bfloat16()
    first, second = torch.optim.SGD(one.parameters(), lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1)
    first.state[one.weight] = {"master": torch.randn(4, 4), "kind": "fp32", "step": torch.tensor(3)}
    saved_then_restored(tmp_path, {"m": one, "o": first}, {"m": other, "o": second})
    assert same(plain(second.state[other.weight]), plain(first.state[one.weight]))


def test_wrappers_leave_no_trace_in_names(tmp_path: Path) -> None:
    one, other = model(1), model(2)
    first, second = torch.optim.AdamW(one.parameters()), torch.optim.AdamW(other.parameters())
    train(one, first, 2)
    compiled = torch.compile(one, backend="eager")
    saved_then_restored(
        tmp_path, {"model": nn.DataParallel(compiled), "optimizer": first}, {"model": other, "optimizer": second}
    )
    assert same(plain(other), plain(one)) and same(plain(second), plain(first))


def test_gradient_scalers(tmp_path: Path) -> None:
    def scaler(enabled: bool, scale: float) -> torch.amp.GradScaler:
        made = torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)
        made.scale(torch.ones(()))
        return made

    for number, enabled in enumerate((True, False)):
        one, other = scaler(enabled, 512.0), scaler(enabled, 2.0)
        saved_then_restored(tmp_path / str(number), {"scaler": one}, {"scaler": other})
        assert other.state_dict() == one.state_dict()
    with pytest.raises(UsageError, match=r"state 'scaler': GradScaler.load_state_dict refuses what was saved"):
        saved_then_restored(tmp_path / "2", {"scaler": scaler(False, 1.0)}, {"scaler": scaler(True, 1.0)})


class _Extra(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.extra, self.w = extra, nn.Parameter(torch.zeros(1))

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("extra", [[1, 2, 3], torch.arange(5), {"a": torch.ones(2), 3: None}, b"xy", None])
@pytest.mark.parametrize("fresh", [[1], torch.arange(2), {"a": torch.ones(1)}, b"", None])
def test_extra_state_of_another_length(extra: Any, fresh: Any, tmp_path: Path) -> None:
    found = saved_then_restored(tmp_path, {"m": nn.ModuleList([_Extra(extra)])}, {"m": nn.ModuleList([_Extra(fresh)])})
    assert same(plain(found["m"][0].extra), plain(extra))


@pytest.mark.filterwarnings("ignore:'set_vital'")
def test_a_loader_goes_on_where_it_was(tmp_path: Path) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader() -> Any:
        torch.manual_seed(0)
        return StatefulDataLoader(list(range(20)), batch_size=2, shuffle=True)

    one, other = loader(), loader()
    batches = iter(one)
    for _ in range(4):
        next(batches)
    saved_then_restored(tmp_path, {"loader": one}, {"loader": other})
    assert [b.tolist() for b in other] == [b.tolist() for b in batches]


def test_a_plain_loader_is_refused_with_advice(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as checkpointer, pytest.raises(UnsupportedValue, match="StatefulDataLoader"):
        checkpointer.save(1, {"loader": torch.utils.data.DataLoader([1, 2])})  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stock_dcp_reads_what_is_saved_and_its_own_is_read(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    one, other = Net("a", "b"), Net("a", "b")
    first, second = torch.optim.AdamW(one.parameters()), torch.optim.AdamW(other.parameters())
    for parameter in one.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.step()
    with Checkpointer(str(tmp_path / "ours")) as checkpointer:
        checkpointer.save(1, {"model": one, "optimizer": first, "seen": Counter({3: 1, "x": 2})}, wait=True)
    weights, moments = get_state_dict(other, second)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "seen": {"3": 0, "x": 0}}
    dcp.load(state, checkpoint_id=tmp_path / "ours" / "step-000000001", no_dist=True)
    set_state_dict(other, second, model_state_dict=weights, optim_state_dict=moments)
    assert same(plain(other), plain(one)) and same(plain(second), plain(first)) and state["seen"] == {"3": 1, "x": 2}

    for number, stock in enumerate(
        ({"model": one, "optimizer": first}, dict(zip(("model", "optimizer"), get_state_dict(one, first), strict=True)))
    ):
        dcp.save(stock, checkpoint_id=tmp_path / f"stock{number}" / "step-000000001", no_dist=True)
        third = Net("a", "b")
        last = torch.optim.AdamW(third.parameters())
        with Checkpointer(str(tmp_path / f"stock{number}")) as checkpointer:
            assert checkpointer.restore({"model": third, "optimizer": last}) == 1
        assert same(plain(third), plain(one)) and same(plain(last), plain(first))


def test_modules_in_lists_give_names(tmp_path: Path) -> None:
    def started() -> dict[str, Any]:
        nets = [Net("a"), Net("a")]
        return {"nets": nets, "o": torch.optim.SGD([p for net in nets for p in net.parameters()], lr=0.1, momentum=0.9)}

    one, other = started(), started()
    for net in one["nets"]:
        for parameter in net.parameters():
            parameter.grad = torch.rand_like(parameter)
    one["o"].step()
    with Checkpointer(str(tmp_path)) as checkpointer:
        checkpointer.save(1, one, wait=True)
        checkpointer.restore(other)
    assert same(plain(other["o"]), plain(one["o"]))
    assert same(plain(other["nets"][1]), plain(one["nets"][1]))
    assert (
        "o.state.nets.1.a.weight.momentum_buffer"
        in catalog.open_checkpoint(open_store(str(tmp_path)), "step-000000001/").entries
    )


def test_names_that_are_digits_are_no_numbers(tmp_path: Path) -> None:
    def started() -> tuple[nn.ParameterList, torch.optim.Optimizer]:
        made = nn.ParameterList([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))])
        return made, torch.optim.AdamW([{"params": [made[1]]}, {"params": [made[0]], "lr": 0.5}])  # type: ignore[arg-type]

    (one, first), (other, second) = started(), started()
    one[0].grad, one[1].grad = torch.ones(1), torch.full((1,), 9.0)
    first.step()
    saved_then_restored(tmp_path, {"m": one, "o": first}, {"m": other, "o": second})
    for number in range(2):
        assert same(plain(second.state[other[number]]), plain(first.state[one[number]]))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stock_checkpoints_with_keys_that_are_no_strings(tmp_path: Path) -> None:
    net = Net("a")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    stock = {"s": schedule, "d": {1: torch.ones(1), "x": {2: 5}}, "c": Counter({3: 1})}
    dcp.save(stock, checkpoint_id=tmp_path / "step-000000001", no_dist=True)
    other = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD(net.parameters(), lr=0.1), [2, 4])
    state = {"s": other, "d": {1: torch.zeros(1), "x": {2: 0}}, "c": Counter({3: 0})}
    with Checkpointer(str(tmp_path)) as checkpointer:
        assert checkpointer.restore(state) == 1
    assert same(plain(state), plain(stock))


def test_what_an_object_gives_may_hold_other_tensors_by_then(tmp_path: Path) -> None:
    found = saved_then_restored(
        tmp_path,
        {"e": Box({"shadow": {"a": torch.ones(1), "b": torch.ones(2)}})},
        {"e": Box({"shadow": {"a": torch.zeros(1), "c": torch.zeros(1)}})},
    )
    assert same(plain(found["e"]), plain({"shadow": {"a": torch.ones(1), "b": torch.ones(2)}}))


def test_two_parameters_of_one_name_are_refused(tmp_path: Path) -> None:
    """A loose one goes by its number, and another may be called so by its module."""
    listed, loose = nn.ParameterList([nn.Parameter(torch.zeros(1))]), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([loose, listed[0]], lr=0.1, momentum=0.9)
    with (
        Checkpointer(str(tmp_path)) as checkpointer,
        pytest.raises(UnsupportedValue, match="two parameters of one name"),
    ):
        checkpointer.save(1, {"m": listed, "o": optimizer})
