"""Tokens to their experts' ranks and back, where ranks share the rows of hot experts.

Shape suffixes: R rows sent, Q rows received, P ranks of the expert-parallel group, E experts of the layer, X experts
computed here, D model dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_moe.model.decoder import Decoder
from elastic_moe.model.dispatch import Routes, count_rows
from elastic_moe.model.experts import Experts
from elastic_moe.model.rows import combine_rows, gather_rows
from elastic_moe.parallel.collectives import carry_rows, exchange
from elastic_moe.parallel.loans import GroupLoan
from elastic_moe.parallel.mailbox import Mailbox
from launcher import Itinerary, ShareRule, Sharing, share_rows


class Shared(NamedTuple):
    """What passes through layers have had; adds up over passes, layers and ranks."""

    owned_rows: float = 0.0
    """Rows of the busiest rank of a group if each rank computed those of its own experts."""
    busiest_rows: float = 0.0
    """Rows of the busiest rank of a group."""
    level_rows: float = 0.0
    """Rows of a rank on the average."""
    copies: float = 0.0
    """Copies of experts, this rank's part of those that the group has made."""

    def plus(self, other: Shared) -> Shared:
        return Shared(*(mine + its for mine, its in zip(self, other, strict=True)))


class SharingDispatch:
    """As `AllToAllDispatch`, and hot experts' weights travel to ranks that compute some of their rows.

    Each rank learns of the counts of all ranks, in one exchange as before, and decides from them alone who takes which
    rows (`launcher.rounds.guests`): the same in a forward pass that is done again, and after a restart.

    Attributes:
        shared: what this layer's passes have had since it was last taken.
    """

    def __init__(
        self, group: dist.ProcessGroup, num_experts: int, rule: ShareRule, mailbox: Mailbox | None = None
    ) -> None:
        self.num_experts = num_experts
        self.group = group
        self.mailbox = mailbox
        self.num_ranks = group.size()
        self.rank = group.rank()
        self.rule = rule
        self.shared = Shared()

    def __call__(self, x_TD: Tensor, routes: Routes, experts: Experts) -> Tensor:
        order, counts_E = count_rows(routes.chosen_TK, self.num_experts)
        counts_PE = self._all_counts(counts_E).tolist()
        sharing = share_rows([sum(of_expert) for of_expert in zip(*counts_PE, strict=True)], self.num_ranks, self.rule)
        self._count(sharing, counts_PE)
        way = Itinerary.of(counts_PE, sharing, self.rank)
        loan = None
        if sharing.num_copies:
            order = order.rearranged(way.runs)
            loan = GroupLoan(self.group, self.mailbox, way.lent, way.copies_sent, way.copies_taken)
        received_PX = torch.tensor(way.received, dtype=torch.int64).view(self.num_ranks, len(way.received[0]))
        receive_splits = list(map(sum, way.received))
        x_QD = carry_rows(gather_rows(x_TD, order), way.sent, receive_splits, self.group, self.mailbox)
        y_QD = experts(x_QD, received_PX, loan)
        y_RD = carry_rows(y_QD.contiguous(), receive_splits, way.sent, self.group, self.mailbox)
        return combine_rows(y_RD, routes.weights_TK, order)

    def _all_counts(self, counts_E: Tensor) -> Tensor:
        """Each rank's counts, (P, E), on the CPU, where it is decided."""
        each = [self.num_experts] * self.num_ranks
        received = exchange(counts_E.repeat(self.num_ranks), each, each, self.group, self.mailbox)
        return received.cpu().view(self.num_ranks, self.num_experts)

    def _count(self, sharing: Sharing, counts_PE: list[list[int]]) -> None:
        self.shared = self.shared.plus(
            Shared(
                owned_rows=sharing.owned_rows,
                busiest_rows=sharing.busiest_rows,
                level_rows=sum(map(sum, counts_PE)) / self.num_ranks,
                copies=sharing.num_copies / self.num_ranks,
            )
        )


def take_shared(model: Decoder) -> Shared:
    """What all layers have had on this rank since the last call; zeros where no rank takes guests."""
    total = Shared()
    for block in model.blocks:
        dispatch = block.moe.dispatch
        if isinstance(dispatch, SharingDispatch):
            total = total.plus(dispatch.shared)
            dispatch.shared = Shared()
    return total
