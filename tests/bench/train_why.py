"""What each part of our layer of experts is worth: its time with that part taken away, over its time with all."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor

from elastic_moe.model import dispatch, experts, products, swiglu
from elastic_moe.model.rows import RowOrder
from tests.bench.train_layers import NUM_INPUTS, NUM_SEQUENCES, LayerTask, fresh, once
from tests.bench.train_models import OURS, layer

WITHOUT = ("oneDNN", "rounded rows", "own SwiGLU", "own rows")


def measure_parts(task: LayerTask) -> dict[str, float]:
    """By part, in turn with the whole."""
    torch.set_num_threads(task.num_threads)
    module = layer(task.shape.config, OURS, getattr(torch, task.dtype))
    draw = torch.Generator().manual_seed(1)
    size = (NUM_SEQUENCES, task.shape.num_tokens // NUM_SEQUENCES, task.shape.dim)
    inputs = [torch.randn(size, generator=draw).to(getattr(torch, task.dtype)) for _ in range(NUM_INPUTS)]
    seconds: dict[str, list[float]] = {part: [] for part in ("", *WITHOUT)}
    for repeat in range(task.repeats + 1):
        for part, found in seconds.items():
            with ExitStack() as stack:
                _take_away(part, stack)
                took_s = sum(once(module, fresh(inputs[(repeat + i) % NUM_INPUTS], repeat)) for i in range(2)) / 2
            if repeat:
                found.append(took_s)
    whole = statistics.median(seconds.pop(""))
    return {part: statistics.median(found) / whole for part, found in seconds.items()}


def _take_away(part: str, stack: ExitStack) -> None:
    if part == "oneDNN":
        stack.enter_context(mock.patch.object(products, "uses_onednn", return_value=False))
        stack.enter_context(mock.patch.object(swiglu, "uses_onednn", return_value=False))
    elif part == "rounded rows":
        stack.enter_context(mock.patch.object(swiglu, "fills", return_value=False))
    elif part == "own SwiGLU":
        stack.enter_context(mock.patch.object(experts, "expert_rows", _grouped))
    elif part == "own rows":
        stack.enter_context(mock.patch.object(dispatch, "gather_rows", _gathered))
        stack.enter_context(mock.patch.object(dispatch, "combine_rows", _combined))


def _grouped(x_RD: Tensor, weights: swiglu.Weights, counts_PE: Tensor, *, in_one: bool) -> Tensor:
    return experts._composed(x_RD, counts_PE[0], weights)


def _gathered(x_TD: Tensor, order: RowOrder) -> Tensor:
    return x_TD[order.token_R]


def _combined(y_RD: Tensor, weights_TK: Tensor, order: RowOrder) -> Tensor:
    weighted = y_RD * weights_TK.flatten()[order.slot_R].to(y_RD.dtype)[:, None]
    return weighted.new_zeros(len(weights_TK), y_RD.shape[1]).index_add_(0, order.token_R, weighted)
