"""A training script's own objects: what is saved is what is there after a restore, and what does not fit is refused."""

from __future__ import annotations

import copy
import logging
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from storage import Checkpointer, PerRank, open_store
from storage.errors import Corrupt, UnsupportedValue, UsageError, WrongModel
from storage.format.containers import Container
from storage.run import catalog
from storage.state.tree import tree_of
from tests.storage.states import OPTIMIZERS, SCHEDULERS, Box, model, plain, same, train

Events = tuple[list[tuple[str, dict[str, Any]]], Callable[[str, dict[str, Any]], None]]


def saved_then_restored(folder: Path, saved: dict[Any, Any], fresh: dict[Any, Any], **options: Any) -> dict[Any, Any]:
    with Checkpointer(str(folder)) as checkpointer:
        checkpointer.save(1, saved, wait=True)
    with Checkpointer(str(folder)) as checkpointer:
        assert checkpointer.restore(fresh, **options) == 1
    return fresh


# objects ----------------------------------------------------------------------------------------------------------


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
        made = {"nets": {"a": model(seed), "b": model(seed + 1)}, "loose": nn.Parameter(torch.full((3,), float(seed)))}
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
        checkpointer.save(1, {"loader": torch.utils.data.DataLoader([1, 2])})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stock_dcp_reads_what_is_saved_and_its_own_is_read(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    one, other = _Net("a", "b"), _Net("a", "b")
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
        third = _Net("a", "b")
        last = torch.optim.AdamW(third.parameters())
        with Checkpointer(str(tmp_path / f"stock{number}")) as checkpointer:
            assert checkpointer.restore({"model": third, "optimizer": last}) == 1
        assert same(plain(third), plain(one)) and same(plain(last), plain(first))


# what does not fit -------------------------------------------------------------------------------------------------


class _Net(nn.Module):
    def __init__(self, *layers: str) -> None:
        super().__init__()
        for name in layers:
            self.add_module(name, nn.Linear(2, 2))


SURPLUS_AND_VAIN: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"m": _Net("a", "b")}, {"m": _Net("a")}, r"does not ask for its 'm.b.weight', 'm.b.bias' \("),
    ({"m": _Net("a")}, {"m": _Net("a", "b")}, r"it has no 'm.b.weight', 'm.b.bias' \("),
    ({"m": _Net("a"), "n": 1}, {"m": _Net("a")}, "does not ask for its 'n'"),
    ({"m": _Net("a")}, {"m": _Net("a"), "n": 1}, "it has no 'n'"),
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


@pytest.mark.parametrize("ignore", ["m.b", "m.b.*", ["m.b.weight", "m.b.bias"], "*.b.*"])
def test_patterns_leave_names_alone(ignore: Any, tmp_path: Path) -> None:
    one, other = _Net("a", "b"), _Net("a", "b")
    before = other.b.weight.detach().clone()
    saved_then_restored(tmp_path / "alone", {"m": one}, {"m": other}, ignore=ignore)
    assert torch.equal(other.a.weight, one.a.weight) and torch.equal(other.b.weight, before)
    saved_then_restored(tmp_path / "surplus", {"m": _Net("a", "b")}, {"m": _Net("a")}, ignore=ignore)
    saved_then_restored(tmp_path / "vain", {"m": _Net("a")}, {"m": _Net("a", "b")}, ignore=ignore)


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
    net = _Net("a")
    wrapped = {f"{wrapper}.{name}": value for name, value in net.state_dict().items()}
    with pytest.raises(WrongModel, match=f"the names in the checkpoint have '{wrapper}.' in them") as caught:
        saved_then_restored(tmp_path / "1", {"m": wrapped}, {"m": _Net("a")})
    assert "'m.a.weight'" in str(caught.value)
    with pytest.raises(WrongModel, match=f"the names in the state have '{wrapper}.' in them"):
        saved_then_restored(tmp_path / "2", {"m": net}, {"m": wrapped})
    found = _Net("a")  # as the hint says
    saved_then_restored(tmp_path / "3", {"m": {wrapper: net}}, {"m": {wrapper: found}})
    assert same(plain(found), plain(net))


def test_an_optimizer_with_other_groups_is_refused(tmp_path: Path) -> None:
    net = model(1)
    one = torch.optim.SGD(net.parameters(), lr=0.1)
    two = torch.optim.SGD([{"params": [p]} for p in net.parameters()], lr=0.1)
    with pytest.raises(WrongModel, match="groups of parameters, the checkpoint 1"):
        saved_then_restored(tmp_path, {"m": net, "o": one}, {"m": net, "o": two})


# keys and containers -----------------------------------------------------------------------------------------------

CONTAINERS: list[Any] = [
    {1: "a", "1": "b", False: "c", None: "d", "None": "e", 2.5: "f", (1, "x"): "g", b"z": "h", "": "i", "a.b": "j"},
    {1: torch.ones(2), "1": torch.zeros(2), -3: {0: [torch.ones(1), {5: None}]}},
    OrderedDict([("z", torch.ones(1)), ("a", 1), ("b", torch.zeros(1))]),
    {"z": 1, "a": torch.ones(1), "b": {"y": 2, "x": torch.ones(2)}},
    Counter({3: 1, 5: 2}),
    defaultdict(list, {"a": [1]}),
    defaultdict(None, {}),
    {},
    [],
    [{}, {}, {"a": 1}, [], [{}]],
    {"a": {}, "b": [], "c": None, "d": {"e": {}}},
    [torch.ones(1), 5, {"x": torch.ones(2)}, [torch.zeros(3)]],
    (1, [torch.ones(2)], {"a": (None,)}),
]


@pytest.mark.parametrize("value", CONTAINERS)
@pytest.mark.parametrize("fresh", [None, {}, [], {"other": 5}, [1, 2, 3], 7], ids=str)
def test_containers_come_back_as_they_were_whatever_is_there(value: Any, fresh: Any, tmp_path: Path) -> None:
    found = saved_then_restored(tmp_path, {"v": value, "b": Box(value)}, {"v": copy.deepcopy(fresh), "b": Box(fresh)})
    assert same(plain(found["v"]), plain(value))
    assert same(plain(found["b"]), plain(value))
    with Checkpointer(str(tmp_path)) as checkpointer:
        checkpointer.save(2, found, wait=True)  # not "duplicated flatten key"
        assert checkpointer.restore({"v": None, "b": Box(None)}) == 2


def test_keys_at_the_top_may_be_of_any_type(tmp_path: Path) -> None:
    found = saved_then_restored(tmp_path, {0: torch.ones(2), "0": 3, None: [4]}, {0: torch.zeros(2), "0": 0, None: []})
    assert found == {0: found[0], "0": 3, None: [4]} and found[0].sum() == 2


def test_dicts_and_lists_of_the_caller_are_filled_in_place(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"a": 0}
    rows: list[int] = [9, 9]
    saved_then_restored(
        tmp_path, {"d": {"inner": {"a": 5, "b": 6}, "rows": [1]}}, {"d": {"inner": inner, "rows": rows}}
    )
    assert inner == {"a": 5, "b": 6}


class _Odd(dict[str, Any]):
    pass


class _Key:
    pass


def _endless() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["self"] = made
    return made


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (_Odd(a=1), "state 'v' is a _Odd, a dict that could not be built again"),
        ({_Key(): 1}, "state 'v' is a dict with a key of type _Key"),
        ({"x": {"\ud800": 1}}, "state 'v.x' is a dict with a key that is no valid Unicode"),
        (defaultdict(lambda: 0), "state 'v' is a defaultdict with a factory"),
        (_endless(), "nested 64 deep, or holds itself"),
        ({"a.b": {"c": 1}, "a": {"b.c": 2}}, "two entries of the state have the name 'v.a.b.c'"),
        (lambda: 0, "state 'v'"),
        (torch.ones(2).to_sparse(), "state 'v' is a tensor of layout"),
    ],
)
def test_what_could_not_be_built_again_is_refused_at_save(value: Any, told: str, tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as checkpointer:
        with pytest.raises(UsageError, match=told) as caught:
            checkpointer.save(1, {"v": value})
        assert "\n" not in str(caught.value)
        assert checkpointer.restore({"v": 0}) == 0


def test_a_state_that_is_no_dict_is_refused(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as checkpointer, pytest.raises(UsageError, match="the state is a Linear"):
        checkpointer.save(1, nn.Linear(1, 1))  # type: ignore[arg-type]


def test_what_each_rank_has_of_its_own_on_one_process(tmp_path: Path) -> None:
    own = PerRank({"rng": torch.get_rng_state(), "position": 7})
    found = saved_then_restored(tmp_path, {"own": own}, {"own": PerRank(None)})
    assert same(plain(found["own"].value), plain(own.value))
    with pytest.raises(WrongModel, match="'own' was saved by each rank for itself; wrap it in PerRank"):
        saved_then_restored(tmp_path / "other", {"own": own}, {"own": 0})
    kept = saved_then_restored(tmp_path / "shared", {"own": 5}, {"own": PerRank(0)})
    assert kept["own"].value == 5


# what a fresh look has found -----------------------------------------------------------------------------------------


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
    one, other = _Net("a"), _Net("a")
    first, second = torch.optim.AdamW(one.parameters(), lr=0.1), torch.optim.AdamW(other.parameters(), lr=0.7)
    for parameter in one.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.step()
    saved_then_restored(
        tmp_path, {"epoch": 1, "m": one, "o": first}, {"epoch": 0, "m": other, "o": second}, ignore=ignore
    )
    assert second.param_groups[0]["lr"] == (0.1 if ignore == "o.state" else 0.7)
    assert len(second.state) == (2 if ignore == "o.param_groups" else 0)


def test_modules_in_lists_give_names(tmp_path: Path) -> None:
    def started() -> dict[str, Any]:
        nets = [_Net("a"), _Net("a")]
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
        return made, torch.optim.AdamW([{"params": [made[1]]}, {"params": [made[0]], "lr": 0.5}])

    (one, first), (other, second) = started(), started()
    one[0].grad, one[1].grad = torch.ones(1), torch.full((1,), 9.0)
    first.step()
    saved_then_restored(tmp_path, {"m": one, "o": first}, {"m": other, "o": second})
    for number in range(2):
        assert same(plain(second.state[other[number]]), plain(first.state[one[number]]))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stock_checkpoints_with_keys_that_are_no_strings(tmp_path: Path) -> None:
    net = _Net("a")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    stock = {"s": schedule, "d": {1: torch.ones(1), "x": {2: 5}}, "c": Counter({3: 1})}
    dcp.save(stock, checkpoint_id=tmp_path / "step-000000001", no_dist=True)
    other = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD(net.parameters(), lr=0.1), [2, 4])
    state = {"s": other, "d": {1: torch.zeros(1), "x": {2: 0}}, "c": Counter({3: 0})}
    with Checkpointer(str(tmp_path)) as checkpointer:
        assert checkpointer.restore(state) == 1
    assert same(plain(state), plain(stock))


def test_a_parameter_in_another_group_is_told(tmp_path: Path) -> None:
    one, other = _Net("a", "b"), _Net("a", "b")

    def grouped(made: _Net, names: set[str]) -> torch.optim.Optimizer:
        first = [p for name, p in made.named_parameters() if name in names]
        return torch.optim.AdamW(
            [
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
        assert len(fresh["o"].state) == 0 and before is not None
        assert checkpointer.restore(fresh, strict=False) == 1
        alone = {"m": other, "o": torch.optim.AdamW(other.b.parameters())}
        with pytest.raises(WrongModel, match="groups of parameters"):
            checkpointer.restore(alone)


def test_what_an_object_gives_may_hold_other_tensors_by_then(tmp_path: Path) -> None:
    found = saved_then_restored(
        tmp_path,
        {"e": Box({"shadow": {"a": torch.ones(1), "b": torch.ones(2)}})},
        {"e": Box({"shadow": {"a": torch.zeros(1), "c": torch.zeros(1)}})},
    )
    assert same(plain(found["e"]), plain({"shadow": {"a": torch.ones(1), "b": torch.ones(2)}}))


def test_lists_of_what_each_rank_has_become_as_long_as_they_were(tmp_path: Path) -> None:
    found = saved_then_restored(tmp_path, {"a": [PerRank(1), PerRank(torch.ones(2))]}, {"a": []})
    assert [type(entry) for entry in found["a"]] == [PerRank, PerRank] and found["a"][0].value == 1


def test_empty_text_is_a_key_like_any_other(tmp_path: Path) -> None:
    assert saved_then_restored(tmp_path, {"": 5, 1: 6}, {"": 0, 1: 0}) == {"": 5, 1: 6}


def _own_list() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


@pytest.mark.parametrize(("value", "told"), [({10**5000: 1}, "of more than 4096 bits"), (_own_list(), "holds itself")])
def test_numbers_and_lists_without_end_are_refused(value: Any, told: str, tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as checkpointer, pytest.raises(UnsupportedValue, match=told):
        checkpointer.save(1, {"v": value})


def test_arguments_that_are_none_are_refused(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as checkpointer:
        with pytest.raises(UsageError, match="the state is a list"):
            checkpointer.restore([1])  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="ignore is 5"):
            checkpointer.restore({}, ignore=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "containers",
    [
        (Container(path=("d",), kind="list"),),
        (Container(path=("l",), kind="dict"),),
        (Container(path=("d",), kind="dict", keys=("a", "b"), names=("a",)),),
        (Container(path=("d",), kind="dict", keys=("a", "b"), names=("a", "a")),),
        (Container(path=("d",), kind="dict", keys=("a", "a"), names=("a", "b")),),
        (Container(path=("d",), kind="dict"), Container(path=("d",), kind="Counter")),
        (Container(path=("d", "a", "x"), kind="dict"),),
    ],
)
def test_containers_that_contradict_are_damage(containers: tuple[Container, ...]) -> None:
    with pytest.raises(Corrupt):
        tree_of({"d.a": ("d", "a"), "l.0": ("l", 0)}, containers)
