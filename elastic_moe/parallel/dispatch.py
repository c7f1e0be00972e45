"""Tokens to their experts' ranks and back.

Shape suffixes: R rows sent, Q rows received, P ranks of the expert-parallel group, E experts of the layer,
X = E / P experts held here, D model dim.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_moe.model.experts import Experts
from elastic_moe.torch_private import exchange_rows


class AllToAllDispatch:
    """Exchange rows over an expert-parallel group: counts first, then the rows themselves, and the results back.

    Nothing is padded and nothing dropped; a rank may send or receive no row at all, and still takes part.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.num_ranks = group.size()

    def __call__(self, x_RD: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
        sent_PX, received_PX = self._exchange_counts(counts_E)
        send_splits, receive_splits = sent_PX.sum(1).tolist(), received_PX.sum(1).tolist()
        x_QD = exchange_rows(x_RD, send_splits, receive_splits, self.group)
        y_QD = experts(x_QD, received_PX)
        return exchange_rows(y_QD.contiguous(), receive_splits, send_splits, self.group)

    def _exchange_counts(self, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        """How many rows go out and come in, each (P, X) on the CPU: the splits are needed as Python numbers."""
        received_E = torch.empty_like(counts_E)
        dist.all_to_all_single(received_E, counts_E.contiguous(), group=self.group)
        sent, received = torch.stack((counts_E, received_E)).cpu()
        return sent.view(self.num_ranks, -1), received.view(self.num_ranks, -1)
