"""Which way of an expert's products is fastest, by their size: what two constants of `elastic_moe.model` rest on.

library  one product of one expert in fp32: by oneDNN, or by what torch takes for it (MKL). `_ONEDNN_FROM_FLOPS`.
apart    a layer of experts forward and backward: one after the other, or all in one kernel for each product.
         `_APART_FROM_FLOPS`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from elastic_moe.model.swiglu import expert_rows
from elastic_moe.torch_private import onednn_linear

WIDTHS = ((64, 128), (128, 256), (256, 512), (512, 1024))
ROWS = (8, 16, 32, 64, 128, 256, 512, 1024)
NUM_EXPERTS = 8
MOST_FLOPS = 128e6
_AT_LEAST_S = 0.004


@dataclass(frozen=True)
class ProductTask:
    """What is compared."""

    what: str
    dtype: str
    num_threads: int
    repeats: int


@dataclass(frozen=True)
class ProductCell:
    """One size: floating-point operations of one expert in one product, and how much faster the second way is."""

    rows: int
    widths: tuple[int, int]
    flops: float
    gain: float


def measure_products(task: ProductTask) -> list[ProductCell]:
    """Compare the two ways for each size, in turn."""
    torch.set_num_threads(task.num_threads)
    cells = []
    for widths in WIDTHS:
        for rows in ROWS:
            flops = 2.0 * rows * widths[0] * widths[1]
            if flops <= MOST_FLOPS:
                ways = _of_library(rows, *widths) if task.what == "library" else _apart(rows, *widths, task.dtype)
                cells.append(ProductCell(rows, widths, flops, _gain(ways, task.repeats)))
    return cells


def by_octave(cells: list[ProductCell]) -> dict[float, float]:
    """By operations, rounded down to a power of two: the geometric mean of the gains."""
    found: dict[float, list[float]] = {}
    for cell in cells:
        found.setdefault(2.0 ** math.floor(math.log2(cell.flops)), []).append(cell.gain)
    return {flops: statistics.geometric_mean(found[flops]) for flops in sorted(found)}


def _of_library(rows: int, width: int, to_width: int) -> tuple[Callable[[], object], Callable[[], object]]:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, width, generator=draw), torch.randn(to_width, width, generator=draw)
    return lambda: torch.mm(x, weight.T), lambda: onednn_linear(x, weight)


def _apart(rows: int, width: int, hidden: int, dtype: str) -> tuple[Callable[[], object], Callable[[], object]]:
    draw, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)
    # Not all alike, as they never are.
    counts_PE = torch.tensor([[max(1, rows + (expert % 3 - 1) * rows // 4) for expert in range(NUM_EXPERTS)]])
    x = torch.randn(int(counts_PE.sum()), width, generator=draw).to(kind).requires_grad_()
    shapes = ((NUM_EXPERTS, hidden, width), (NUM_EXPERTS, hidden, width), (NUM_EXPERTS, width, hidden))
    gate, up, down = (torch.randn(shape, generator=draw).to(kind).requires_grad_() for shape in shapes)
    ones = torch.ones_like(x)

    def once(*, in_one: bool) -> object:
        y = expert_rows(x, (gate, up, down), counts_PE, in_one=in_one)
        return torch.autograd.grad(y, (x, gate, up, down), ones)

    return lambda: once(in_one=True), lambda: once(in_one=False)


def _gain(ways: tuple[Callable[[], object], Callable[[], object]], repeats: int) -> float:
    """The first way's time over the second's, of medians."""
    seconds: tuple[list[float], list[float]] = ([], [])
    times = [0, 0]
    for i, way in enumerate(ways):
        way()
        times[i] = max(1, round(_AT_LEAST_S / max(1e-6, _took_s(way, 3))))
    for _ in range(repeats):
        for i, way in enumerate(ways):
            seconds[i].append(_took_s(way, times[i]))
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


def _took_s(way: Callable[[], object], times: int) -> float:
    began_s = time.perf_counter()
    for _ in range(times):
        way()
    return (time.perf_counter() - began_s) / times
