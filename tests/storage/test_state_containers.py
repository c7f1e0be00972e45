"""Dicts and lists of a state: keys, kinds and order come back as they were, or are refused at save."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from storage import Checkpointer, PerRank
from storage.errors import Corrupt, UnsupportedValue, UsageError, WrongModel
from storage.format.containers import Container
from storage.state.tree import tree_of
from tests.storage.states import Box, plain, same, saved_then_restored

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
