"""Changes of dtype on restore: what would lose is refused, unless it is asked for; what is allowed is told once."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from storage import Checkpointer, ShardReader
from storage.errors import WrongModel
from storage.loading.casts import Casts, is_allowed, may_overflow
from tests.storage.small_runs import Events

FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu")
INTEGERS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
COMPLEX = ("complex128", "complex64", "complex32")
ALL = (*FLOATS, *INTEGERS, *COMPLEX)


def test_what_loses_nothing() -> None:
    """Written out, so that nothing is allowed by an oversight in the arithmetic."""
    found = {wanted: {stored for stored in ALL if is_allowed(stored, wanted)} - {wanted} for wanted in ALL}
    small = {"float8_e5m2", "float8_e4m3fn"}
    assert found == {
        "float64": {*FLOATS, *INTEGERS} - {"float64", "int64", "uint64"},
        "float32": {*small, "float8_e8m0fnu", "float16", "bfloat16", "bool", "int8", "uint8", "int16", "uint16"},
        "float16": {*small, "bool", "int8", "uint8"},
        "bfloat16": {*small, "float8_e8m0fnu", "float32", "bool", "int8", "uint8"},
        "float8_e5m2": {"bool"},
        "float8_e4m3fn": {"bool"},
        "float8_e8m0fnu": {"bool"},
        "bool": set(),
        "uint8": {"bool"},
        "int8": {"bool"},
        "uint16": {"bool", "uint8"},
        "int16": {"bool", "uint8", "int8"},
        "uint32": {"bool", "uint8", "uint16"},
        "int32": {"bool", "uint8", "int8", "uint16", "int16"},
        "uint64": {"bool", "uint8", "uint16", "uint32"},
        "int64": {*INTEGERS} - {"int64", "uint64"},
        "complex128": {*FLOATS, *INTEGERS, *COMPLEX} - {"int64", "uint64", "complex128"},
        "complex64": {*small, "float8_e8m0fnu", "float32", "float16", "bfloat16", "complex32"}
        | {"bool", "int8", "uint8", "int16", "uint16"},
        "complex32": {*small, "float16", "bool", "int8", "uint8"},
    }
    assert not is_allowed("quint8", "float32") and is_allowed("quint8", "quint8")


def samples(dtype: torch.dtype) -> torch.Tensor:
    """Its extremes, and some in between."""
    raw = torch.randint(0, 256, (512,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    if dtype is torch.bool:
        return raw > 127
    if dtype.is_floating_point or dtype.is_complex:
        real = {torch.complex128: torch.float64, torch.complex64: torch.float32, torch.complex32: torch.float16}
        info = torch.finfo(real.get(dtype, dtype))
        ends = torch.tensor([info.max, info.min, info.tiny, 1.0]).double().to(dtype)
        some = raw.view(dtype)[: 512 // dtype.itemsize] if not dtype.is_complex else ends
        return torch.cat([ends, some])
    return torch.cat([torch.tensor([torch.iinfo(dtype).max, torch.iinfo(dtype).min]).to(dtype), raw.view(dtype)])


EXACT = [n for n in ALL if n not in ("complex32", "float8_e8m0fnu", "uint64")]  # what torch itself converts both ways


def test_what_is_allowed_loses_nothing() -> None:
    """By torch's own word: there and back again is the same."""
    for stored, wanted in itertools.permutations(EXACT, 2):
        if is_allowed(stored, wanted) and (stored, wanted) != ("float32", "bfloat16"):
            before = samples(getattr(torch, stored))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                back = before.to(getattr(torch, wanted)).to(before.dtype)
            assert torch.equal(back.to(torch.complex128).nan_to_num(1.5), before.to(torch.complex128).nan_to_num(1.5))


def restored(url: str, state: dict[str, Any], on_event: Any = None, **options: Any) -> dict[str, Any]:
    with Checkpointer(url, on_event=on_event) as ckpt:
        assert ckpt.restore(state, strict=False, **options) == 1
    return state


def saved(tmp_path: Path, by: str, state: dict[str, Any]) -> str:
    if by == "ours":
        with Checkpointer(str(tmp_path)) as ckpt:
            ckpt.save(1, state, wait=True)
    else:
        dcp.save(state, checkpoint_id=tmp_path / "step-000000001", no_dist=True)
    return str(tmp_path)


LOSSY = [
    (torch.tensor([1 + 2j]), torch.float32),
    (torch.tensor([1.5]), torch.int64),
    (torch.tensor([300]), torch.uint8),
    (torch.tensor([-1, 2]), torch.bool),
    (torch.tensor([1e6]), torch.float16),
    (torch.tensor([1e300], dtype=torch.float64), torch.float32),
    (torch.tensor([1.0], dtype=torch.bfloat16), torch.float16),
    (torch.tensor([1.0], dtype=torch.float16), torch.bfloat16),
    (torch.tensor([2**53 + 1]), torch.float64),
    (torch.tensor([-1]), torch.uint64),
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("by", ["ours", "stock"])
def test_what_would_lose_is_refused_and_leaves_the_state_as_it_is(tmp_path: Path, by: str, events: Events) -> None:
    url = saved(tmp_path, by, {f"t{number}": tensor for number, (tensor, _) in enumerate(LOSSY)})
    for number, (tensor, dtype) in enumerate(LOSSY):
        key, name = f"t{number}", str(dtype).removeprefix("torch.")
        state = {key: torch.zeros(tensor.shape, dtype=dtype)}
        with pytest.raises(WrongModel, match=rf"step 1 .*'{key}' is .* and {name} in the state.*allow_casts"):
            restored(url, state, events[1])
        with pytest.raises(dcp.CheckpointException, match=rf"'{key}' is .* and {name} in the state"):
            dcp.load(state, storage_reader=ShardReader(url), no_dist=True)
        assert not state[key].any()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = tensor.to(dtype)
        dcp.load(state, storage_reader=ShardReader(url, allow_casts=True), no_dist=True)
        assert torch.equal(state[key], expected)
        assert torch.equal(restored(url, {key: torch.zeros_like(expected)}, allow_casts=True)[key], expected)
    assert {name for name, _ in events[0]} == {"restored_in_part"}  # of which it is one key that is asked for
    all_of_them = {f"t{number}": torch.zeros(t.shape, dtype=dtype) for number, (t, dtype) in enumerate(LOSSY)}
    with pytest.raises(WrongModel, match="and 5 more"):
        restored(url, all_of_them)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("by", ["ours", "stock"])
def test_what_is_allowed_is_told_once(
    tmp_path: Path, by: str, events: Events, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {f"w{number}": torch.rand(5, 3) for number in range(7)}
    url = saved(tmp_path, by, {**tensors, "half": torch.rand(3).bfloat16(), "same": torch.ones(2)})
    state = {key: torch.zeros(5, 3, dtype=torch.bfloat16) for key in tensors} | {
        "half": torch.zeros(3),
        "same": torch.zeros(2),
    }
    restored(url, state, events[1])
    assert torch.equal(state["w3"], tensors["w3"].bfloat16())
    ((_, told),) = [event for event in events[0] if event[0] == "checkpoint_cast"]
    assert told["casts"] == {"float32 -> bfloat16": 7, "bfloat16 -> float32": 1}
    assert len(told["keys"]) == 5 and "overflowed" not in told
    assert sum("checkpoint_cast" in record.message for record in caplog.records) == 1
    dcp.load(state, storage_reader=ShardReader(url), no_dist=True)
    assert sum("checkpoint_cast" in record.message for record in caplog.records) == 2
    caplog.clear()
    restored(url, {"same": torch.zeros(2)})
    assert "checkpoint_cast" not in caplog.text


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("by", ["ours", "stock"])
@pytest.mark.parametrize("num", [3, 5_000_000])
def test_finite_numbers_that_become_infinite_are_told(tmp_path: Path, by: str, events: Events, num: int) -> None:
    numbers = torch.ones(num)
    numbers[0], numbers[1], numbers[-1] = 1e6, float("inf"), -1e6
    url = saved(tmp_path, by, {"w": numbers, "v": numbers[:2].clone()})
    found = {"w": torch.zeros(num, dtype=torch.float16), "v": torch.zeros(2)}
    restored(url, found, events[1], allow_casts=True)
    assert torch.equal(found["w"], numbers.half())
    told = dict(events[0])["checkpoint_cast"]
    assert told["overflowed"] == {"w": 2}


def test_where_there_may_be_an_overflow() -> None:
    assert may_overflow("float32", "bfloat16") and may_overflow("float64", "complex64")
    assert not may_overflow("bfloat16", "float32") and not may_overflow("int64", "float16")
    assert Casts().told() == {}
