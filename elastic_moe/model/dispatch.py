"""How tokens get to their experts and back: the seam, and what those implementations share that sort rows.

An implementation is a `Dispatcher`. There are three: `LocalDispatch` here and `AllToAllDispatch` in
`elastic_moe.parallel.dispatch`, both a sort around a way to carry rows, and `SharingDispatch` in
`elastic_moe.parallel.sharing`, which sends rows in an order that depends on what all ranks have. One that does without
(DeepEP sends a token to a rank once, and adds up its results there) takes tokens and choices as they are; the tests in
`tests/moe/test_dispatch.py` hold for any.

Shape suffixes: T tokens, K experts a token, R = T x K rows (a token at one of its experts), E experts of the layer,
D model dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from elastic_moe.model.experts import Experts
from elastic_moe.model.rows import RowOrder, combine_rows, gather_rows


class Routes(NamedTuple):
    """Where tokens go: what a `Router` decides."""

    weights_TK: Tensor
    """fp32: how much each expert of a token weighs."""
    chosen_TK: Tensor
    """int64: these experts, all different."""


class Dispatcher(Protocol):
    """Applies a layer's experts to tokens, wherever those are."""

    def __call__(self, x_TD: Tensor, routes: Routes, experts: Experts) -> Tensor:
        """Add up, for each token, its experts' outputs by their weights, (T, D), in the order of its choices.

        No token is dropped. Differentiable in tokens, weights, and the experts' parameters, wherever those are. A
        collective where experts live on several ranks: each of them calls it for each layer, also with no token.
        """


def count_rows(chosen_TK: Tensor, num_experts: int) -> tuple[RowOrder, Tensor]:
    """Rows sorted by expert, and how many each expert has, int64 (E,)."""
    rows = chosen_TK.flatten()
    # Not by bincount, for whose size a GPU would be waited for.
    counts_E = rows.new_zeros(num_experts).scatter_add_(0, rows, torch.ones_like(rows))
    return RowOrder.by_expert(chosen_TK), counts_E


class SortedDispatch(ABC):
    """Sorts rows by their expert, once; what carries the sorted rows is left to those that derive from it."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def __call__(self, x_TD: Tensor, routes: Routes, experts: Experts) -> Tensor:
        order, counts_E = count_rows(routes.chosen_TK, self.num_experts)
        y_RD = self.carry(gather_rows(x_TD, order), counts_E, experts)
        return combine_rows(y_RD, routes.weights_TK, order)

    @abstractmethod
    def carry(self, x_RD: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
        """Apply `experts` to rows sorted by expert, `counts_E` (int64, (E,)) rows for each; the order stays."""


class LocalDispatch(SortedDispatch):
    """All experts are on this rank."""

    def carry(self, x_RD: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
        out: Tensor = experts(x_RD, counts_E[None])
        return out
