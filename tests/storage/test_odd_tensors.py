"""Tensors of any dtype, shape and strides come back into tensors of any strides, or the save says no in one line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from storage import Checkpointer, ShardReader, ShardWriter
from storage.arena.moves import lies_plainly
from storage.errors import UnsupportedValue, WrongModel
from storage.format.tensors import bytes_of, oddity, overlaps
from storage.loading.targets import fill
from tests import sample

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested"),
    pytest.mark.filterwarnings("ignore:Sparse CSR"),
    pytest.mark.filterwarnings("ignore:ComplexHalf"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:Sparse invariant"),
]
_names = itertools.count()
KEPT = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64, torch.complex32),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
]


def url() -> str:
    return f"memory://odd-{next(_names)}/step-000000001"


def bits(tensor: torch.Tensor) -> bytes:
    """Its elements, row-major."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return bytes(bytes_of(torch.empty(plain.shape, dtype=plain.dtype).copy_(plain)))


def random(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    high = 2 if dtype is torch.bool else 256
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, high, (num_bytes,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return torch.empty(tuple(shape), dtype=dtype).copy_(raw.view(dtype).reshape(tuple(shape)))


LAYOUTS = ("plain", "permuted", "stepped", "odd", "conjugated", "negative", "inference", "parameter", "expanded")


def laid_out(tensor: torch.Tensor, kind: str, seed: int) -> torch.Tensor:
    """A tensor of the same elements that lies otherwise; as it is where that kind is not for it."""
    dims = tensor.dim()
    if kind == "permuted" and dims:
        order = torch.randperm(dims, generator=torch.Generator().manual_seed(seed)).tolist()
        turned = torch.empty([tensor.shape[dim] for dim in order], dtype=tensor.dtype)
        return turned.permute([order.index(dim) for dim in range(dims)]).copy_(tensor)
    if kind == "stepped" and dims:
        large = torch.zeros([2 * size + 1 for size in tensor.shape], dtype=tensor.dtype)
        return large[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
    if kind == "odd" and 1 in tensor.shape:  # a dimension of 1 may have any stride, and is contiguous all the same
        strides = [
            7 * seed + 5 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ]
        return tensor.clone().as_strided(tensor.shape, strides)
    if kind in ("conjugated", "negative") and tensor.dtype in (torch.complex64, torch.complex128):
        return tensor.conj().clone().conj()
    if kind == "negative" and tensor.dtype in (torch.float32, torch.float64):
        twice = torch.complex(torch.zeros_like(tensor), torch.zeros_like(tensor)).conj().imag
        return twice.copy_(tensor)
    if kind == "inference":
        with torch.inference_mode():
            return tensor.clone()
    if kind == "parameter" and (tensor.is_floating_point() or tensor.is_complex()):
        return nn.Parameter(tensor.clone())
    if kind == "expanded" and dims and tensor.shape[0] > 1:
        return tensor[:1].clone().expand(tensor.shape)
    return tensor.clone()


cases = st.lists(
    st.tuples(
        st.sampled_from(KEPT),
        st.lists(st.integers(0, 3) | st.just(1), max_size=4),
        st.sampled_from(LAYOUTS),
        st.sampled_from(LAYOUTS[:-1]),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=5,
)


def save(by: str, where: str, state: dict[str, Any]) -> None:
    if by == "ours":
        with Checkpointer(where.rpartition("/")[0]) as ckpt:
            ckpt.save(1, state, wait=True)
            assert ckpt.wait()
    else:
        dcp.save(state, storage_writer=ShardWriter(where), no_dist=True)


def load(by: str, where: str, state: dict[str, Any]) -> None:
    if by == "ours":
        with Checkpointer(where.rpartition("/")[0]) as ckpt:
            assert ckpt.restore(state) == 1
    else:
        dcp.load(state, storage_reader=ShardReader(where), no_dist=True)


@given(cases, st.sampled_from(["ours", "dcp"]), st.sampled_from(["ours", "dcp"]))
@settings(deadline=None, max_examples=120 if sample.IS_WHOLE else 60)
def test_any_dtype_shape_and_strides(drawn: list[Any], saver: str, loader: str) -> None:
    where = url()
    saved, state = {}, {}
    for number, (dtype, shape, kind, of_target, seed) in enumerate(drawn):
        saved[f"t{number}"] = laid_out(random(shape, dtype, seed), kind, seed)
        state[f"t{number}"] = laid_out(random(shape, dtype, seed + 100), of_target, seed)
    expected = {key: bits(tensor) for key, tensor in saved.items()}
    strides = {key: tensor.stride() for key, tensor in state.items()}
    save(saver, where, saved)
    load(loader, where, state)
    for key, tensor in state.items():
        assert bits(tensor) == expected[key], key
        assert tensor.stride() == strides[key]


def test_an_empty_tensor_of_more_dimensions_than_its_neighbours(tmp_path: Any) -> None:
    state = {"w": torch.ones(2, 3), "e": torch.empty(2, 0, 3, 1, 4), "f": torch.empty(0), "v": torch.ones(())}
    for by in ("ours", "dcp"):
        where = url()
        save(by, where, state)
        load("ours", where, {key: torch.zeros_like(tensor) for key, tensor in state.items()})
        load("dcp", where, {key: torch.zeros_like(tensor) for key, tensor in state.items()})
    dcp.save(state, checkpoint_id=tmp_path / "step-000000001", no_dist=True)
    for loader in ("ours", "dcp"):
        load(loader, f"{tmp_path}/step-000000001", {key: torch.zeros_like(tensor) for key, tensor in state.items()})


class Wrapper(torch.Tensor):
    """As torchao's: a tensor that is made of others, and says that it is float32."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if function is torch.ops.aten.detach.default:
            return Wrapper(args[0].inner)
        args = [arg.inner.float() if isinstance(arg, Wrapper) else arg for arg in args]
        return function(*args, **(kwargs or {}))


class Plain(torch.Tensor):
    """A subclass that is no more than its numbers."""


BASE = torch.arange(12.0).reshape(3, 4)
ODD: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "quantized": (lambda: torch.quantize_per_tensor(BASE, 0.1, 0, torch.quint8), "quantized"),
    "by channel": (
        lambda: torch.quantize_per_channel(BASE, torch.ones(3), torch.zeros(3), 0, torch.qint8),
        "quantized",
    ),
    "sparse": (BASE.to_sparse, "sparse_coo"),
    "rows": (BASE.to_sparse_csr, "sparse_csr"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "nested|jagged",
    ),
    "oneDNN": (BASE.to_mkldnn, "mkldnn"),
    "meta": (lambda: BASE.to("meta"), "meta device"),
    "lazy": (lambda: nn.UninitializedParameter(), "no shape yet"),
    "wrapper": (lambda: Wrapper(BASE.to(torch.int8)), r"test_odd_tensors\.Wrapper"),
    "wrapped parameter": (lambda: nn.Parameter(Wrapper(BASE.to(torch.int8))), "Wrapper"),
    "int4": (lambda: torch.zeros(3, 4, dtype=torch.uint8).view(torch.int4), "torch.int4"),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_more_than_numbers_is_refused_at_once(name: str) -> None:
    make, told = ODD[name]
    where = url()
    with pytest.raises(UnsupportedValue, match=f"^state 'deep.w' is a tensor .*({told})"):
        save("ours", where, {"a": torch.ones(2), "deep": {"w": make()}})
    with pytest.raises(dcp.CheckpointException):
        save("dcp", where, {"w": make()})
    with pytest.raises(dcp.CheckpointException, match="no checkpoint at"):
        load("dcp", where, {"a": torch.ones(2)})


def test_a_shard_writer_names_what_it_refuses() -> None:
    for name in ("quantized", "sparse", "wrapper", "meta"):
        with pytest.raises(
            dcp.CheckpointException, match=f"UnsupportedValue: state 'w' is a tensor .*({ODD[name][1]})"
        ):
            save("dcp", url(), {"w": ODD[name][0]()})


DESTINATIONS: dict[str, Callable[[], torch.Tensor]] = {
    "expanded": lambda: torch.zeros(1).expand(3, 4),
    "expanded rows": lambda: torch.zeros(1, 4).expand(3, 4),
    "windows": lambda: torch.zeros(6).unfold(0, 4, 1),
    "zeros without memory": lambda: torch._efficientzerotensor(3, 4),
    "sparse": lambda: torch.zeros(3, 4).to_sparse(),
    "oneDNN": lambda: torch.zeros(3, 4).to_mkldnn(),
    "wrapper": lambda: Wrapper(torch.zeros(3, 4)),
    "meta": lambda: torch.zeros(3, 4, device="meta"),
}


@pytest.mark.parametrize("name", DESTINATIONS)
@pytest.mark.parametrize("by", ["ours", "stock"])
def test_what_cannot_be_filled_is_refused_by_name(name: str, by: str, tmp_path: Any) -> None:
    where = f"{tmp_path}/step-000000001"
    if by == "ours":
        save("ours", where, {"w": BASE})
    else:
        dcp.save({"w": BASE}, checkpoint_id=where, no_dist=True)
    with pytest.raises(UnsupportedValue, match=r"'w' cannot be restored into a tensor"):
        load("ours", where, {"w": DESTINATIONS[name]()})
    if name != "meta":  # which DCP itself gives memory to
        with pytest.raises(dcp.CheckpointException, match="'w' cannot be restored into a tensor"):
            load("dcp", where, {"w": DESTINATIONS[name]()})


def test_what_is_just_numbers_is_none_of_these() -> None:
    for tensor in (nn.Parameter(BASE), nn.Buffer(BASE), BASE.as_subclass(Plain), BASE.clone().requires_grad_() * 2):
        assert oddity(tensor) is None
        where = url()
        save("ours", where, {"w": tensor})
        state = {"w": torch.zeros_like(tensor)}
        load("ours", where, state)
        assert bits(state["w"]) == bits(tensor) and type(state["w"]) is type(torch.zeros_like(tensor))
    with torch.inference_mode():
        turned = torch.zeros(4, 3).t()
    load("ours", where, {"w": turned})
    assert bits(turned) == bits(tensor)
    fill(turned.detach()[1:], torch.ones(2, 4))  # as the rows of a large one
    assert bits(turned[1:]) == bits(torch.ones(2, 4))
    zeros = torch._efficientzerotensor(3, 4)
    assert not lies_plainly(zeros)
    save("dcp", where := url(), {"w": zeros})
    load("ours", where, state := {"w": torch.ones(3, 4)})
    assert not state["w"].any()


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), max_size=4))
def test_what_overlaps(dims: list[tuple[int, int]]) -> None:
    tensor = torch.zeros(200).as_strided([size for size, _ in dims], [stride for _, stride in dims])
    places = [
        sum(map(math.prod, zip(at, tensor.stride(), strict=True)))
        for at in itertools.product(*map(range, tensor.shape))
    ]
    assert overlaps(tensor) == (len(set(places)) < len(places))


def test_another_shape_is_another_model() -> None:
    save("ours", where := url(), {"w": BASE})
    with pytest.raises(WrongModel, match=r"'w' has shape \[4, 3\]"):
        load("ours", where, {"w": torch.zeros(4, 3)})
