"""The experts' own kernels against autograd's, whatever way they go; rows laid out and back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product as combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elastic_moe.model import ModelConfig, experts, products, swiglu
from elastic_moe.model.blocks import Blocks, DeviceBlocks, rounded
from elastic_moe.model.experts import Experts, _composed
from elastic_moe.model.moe import MoE
from elastic_moe.model.rows import RowOrder, combine_rows, gather_rows

COUNTS = {
    "one source": [[3, 0, 40, 1]],
    "three sources": [[3, 0, 4, 1], [0, 0, 0, 0], [9, 2, 0, 5]],
    "all at one": [[0, 0, 37, 0]],
    "none": [[0, 0, 0, 0], [0, 0, 0, 0]],
}

WAYS = [
    (dtype, in_one, fills, onednn)
    for dtype, in_one, fills, onednn in combinations(
        [torch.float64, torch.float32, torch.bfloat16], [False, True], [False, True], [False, True]
    )
    if not (in_one and dtype is torch.float64) and not (onednn and dtype is not torch.float32)
]


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rows_and_weights(counts: list[list[int]], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x (R, 16), gate, up (4, 24, 16), down (4, 16, 24), all to be derived by."""
    num_rows = sum(map(sum, counts))
    shapes = ((num_rows, 16), (4, 24, 16), (4, 24, 16), (4, 16, 24))
    return tuple(drawn(*shape, dtype=dtype, seed=seed).requires_grad_() for seed, shape in enumerate(shapes))


def three(weights: Sequence[Tensor]) -> swiglu.Weights:
    gate, up, down = weights
    return gate, up, down


def by_definition(x_RD: Tensor, weights: tuple[Tensor, ...], counts: list[list[int]]) -> Tensor:
    gate, up, down = weights
    expert_R = torch.tensor(
        [e for of_source in counts for e, n in enumerate(of_source) for _ in range(n)], dtype=torch.int64
    )
    hidden = F.silu(torch.einsum("rd,rfd->rf", x_RD, gate[expert_R])) * torch.einsum("rd,rfd->rf", x_RD, up[expert_R])
    return torch.einsum("rf,rdf->rd", hidden, down[expert_R])


@pytest.mark.parametrize(("dtype", "in_one", "fills", "onednn"), WAYS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_every_way_gives_the_definition_and_its_gradients(
    counts: list[list[int]],
    dtype: torch.dtype,
    in_one: bool,
    fills: bool,
    onednn: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(swiglu, "fills", lambda *_: fills)
    monkeypatch.setattr(products, "uses_onednn", lambda *_: onednn)
    monkeypatch.setattr(products, "_ONEDNN_FROM_FLOPS", 1.0)
    x_RD, *weights = rows_and_weights(counts, dtype)
    y_RD = swiglu.expert_rows(x_RD, three(weights), torch.tensor(counts), in_one=in_one)
    d_y_RD = drawn(*y_RD.shape, dtype=dtype, seed=9)
    got = (y_RD, *torch.autograd.grad(y_RD, (x_RD, *weights), d_y_RD))
    x_RD, *weights = (tensor.detach().double().requires_grad_() for tensor in (x_RD, *weights))
    y_RD = by_definition(x_RD, tuple(weights), counts)
    expected = (y_RD, *torch.autograd.grad(y_RD, (x_RD, *weights), d_y_RD.double()))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        scale = float(other.detach().abs().max()) if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * max(scale, 1e-3))


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4), st.booleans())
def test_rows_lie_by_expert_and_come_back(counts: list[list[int]], fills: bool) -> None:
    labels = [(source, expert) for source, row in enumerate(counts) for expert, n in enumerate(row) for _ in range(n)]
    x_RD = torch.tensor([[source * 10 + expert] for source, expert in labels]).reshape(-1, 1)
    laid = Blocks(counts, fills=fills)
    for expert, rows in enumerate(laid.by_expert(x_RD)):
        own = [source * 10 + expert for source, of in labels if of == expert]
        assert rows.flatten().tolist()[: len(own)] == own
        assert len(rows) == (rounded(len(own)) if fills else len(own))
        assert not rows[len(own) :].any()
    assert torch.equal(laid.back(laid.by_expert(x_RD)), x_RD)
    assert torch.equal(laid.back_together(laid.together(x_RD)), x_RD)
    on_device = DeviceBlocks(torch.tensor(counts), len(x_RD))
    assert torch.equal(on_device.together(x_RD), Blocks(counts).together(x_RD))
    assert torch.equal(on_device.back_together(on_device.together(x_RD)), x_RD)
    assert torch.equal(on_device.ends_E, Blocks(counts).ends_E)


def test_rounded_numbers_are_few_and_close() -> None:
    numbers = range(1, 5000)
    assert all(n <= rounded(n) < n + max(8, n / 8) for n in numbers)
    assert rounded(0) == 0
    assert len({rounded(n) for n in range(257, 4097)}) == 4 * 16


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gradients_of_a_whole_layer(top_k: int) -> None:
    """Against differences, in float64: gather, experts, combine and the router's weights."""
    x_TD, weights_TK = drawn(5, 8).requires_grad_(), drawn(5, top_k, seed=1).requires_grad_()
    params = [drawn(*shape, seed=2).requires_grad_() for shape in ((4, 6, 8), (4, 6, 8), (4, 8, 6))]
    chosen_TK = torch.stack([torch.arange(4).roll(token)[:top_k] for token in range(5)])
    order, counts = RowOrder.by_expert(chosen_TK), torch.bincount(chosen_TK.flatten(), minlength=4)

    def layer(x_TD: Tensor, weights_TK: Tensor, *params: Tensor) -> Tensor:
        rows = gather_rows(x_TD, order)
        return combine_rows(swiglu.expert_rows(rows, three(params), counts[None], in_one=False), weights_TK, order)

    assert torch.autograd.gradcheck(layer, (x_TD, weights_TK, *params))


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "intel", "expected"),
    [
        ("cpu", torch.float32, "AVX512", False, True),
        ("cpu", torch.float32, "AVX512", True, False),
        ("cpu", torch.float32, "AVX2", False, False),
        ("cpu", torch.bfloat16, "AVX512", False, False),
        ("cuda", torch.float32, "AVX512", False, False),
    ],
)
def test_where_onednn_is_faster(
    device: str, dtype: torch.dtype, capability: str, intel: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_is_intel", lambda: intel)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.uses_onednn.__wrapped__(device, dtype) is expected


def test_small_experts_run_in_one_kernel_and_large_ones_apart() -> None:
    gate = torch.empty(8, 256, 128)
    assert experts._goes_in_one(torch.empty(64, 128), gate)
    assert not experts._goes_in_one(torch.empty(8192, 128), gate)
    assert not experts._goes_in_one(torch.empty(64, 126), torch.empty(8, 256, 126))


def test_recomputed_layers_keep_no_rows() -> None:
    """What the kernels keep goes through autograd's hooks: activation checkpointing drops it."""
    from torch.utils.checkpoint import checkpoint

    moe = MoE(ModelConfig(dim=32, num_experts=4, top_k=2, expert_dim=64))
    for param in moe.parameters():
        torch.nn.init.normal_(param, std=0.1)
    x = drawn(2, 8, 32, dtype=torch.float32).requires_grad_()
    real = torch.ones(2, dtype=torch.bool)
    results = []
    for run in (lambda: moe(x, real)[0], lambda: checkpoint(lambda x: moe(x, real)[0], x, use_reentrant=False)):
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = run()
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y.detach(), grad, sum(sizes)))
    (y, grad, kept_all), (again, grad_again, kept_few) = results
    assert torch.equal(y, again)
    assert torch.equal(grad, grad_again)
    assert kept_few < kept_all / 4


def test_exact_mode_goes_autograds_way(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Experts(ModelConfig(dim=32, num_experts=4, top_k=2, expert_dim=64))
    mine.exact = True
    for param in mine.parameters():
        torch.nn.init.normal_(param, std=0.1)
    monkeypatch.setattr(experts, "expert_rows", None)
    counts = torch.tensor([[3, 0, 2, 1]])
    x_RD = drawn(6, 32, dtype=torch.float32)
    weights = (mine.gate_EFD, mine.up_EFD, mine.down_EDF)
    assert torch.equal(mine(x_RD, counts), _composed(x_RD, counts[0], weights))
