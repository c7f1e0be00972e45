"""Tokens to their experts' ranks and back.

Shape suffixes: R rows sent, Q rows received, P ranks of the expert-parallel group, E experts of the layer, X experts
held here, D model dim.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from elastic_moe.model.dispatch import SortedDispatch
from elastic_moe.model.experts import Experts
from elastic_moe.parallel.collectives import carry_rows, exchange
from elastic_moe.parallel.mailbox import Mailbox
from launcher import experts_per_rank


class AllToAllDispatch(SortedDispatch):
    """Exchange rows over an expert-parallel group: counts first, then the rows themselves, and the results back.

    Nothing is padded and nothing dropped; a rank may send or receive no row, or hold no expert, and still takes part.
    The host waits once, for the numbers of rows. Rows go by a mailbox where the group has one.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int, mailbox: Mailbox | None = None) -> None:
        super().__init__(num_experts)
        self.group = group
        self.mailbox = mailbox
        self.num_ranks = group.size()
        of_rank = experts_per_rank(num_experts, self.num_ranks)
        self.num_held = of_rank[group.rank()]
        self.num_missing = self.num_ranks * of_rank[0] - num_experts

    def carry(self, x_RD: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
        sent_PX, received_PX = self._exchange_counts(counts_E)
        send_splits, receive_splits = sent_PX.sum(1).tolist(), received_PX.sum(1).tolist()
        x_QD = carry_rows(x_RD, send_splits, receive_splits, self.group, self.mailbox)
        y_QD = experts(x_QD, received_PX[:, : self.num_held])
        return carry_rows(y_QD.contiguous(), receive_splits, send_splits, self.group, self.mailbox)

    def _exchange_counts(self, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        """How many rows go out and come in, each (P, most experts of a rank) on the CPU, for the splits are needed as
        Python numbers. Ranks that hold fewer experts get no row for those that they lack."""
        sent = F.pad(counts_E, (0, self.num_missing))
        each = [len(sent) // self.num_ranks] * self.num_ranks
        received = exchange(sent, each, each, self.group, self.mailbox)
        both_PX = torch.stack((sent, received)).cpu().view(2, self.num_ranks, -1)
        return both_PX[0], both_PX[1]
