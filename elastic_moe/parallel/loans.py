"""Weights of hot experts, lent to ranks that compute some of their rows, and the gradients that come back.

Shape suffixes: R rows, E experts held here, G guests, N copies exchanged, D model dim, F expert dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from elastic_moe.model.swiglu import Weights
from elastic_moe.parallel.collectives import exchange
from elastic_moe.parallel.mailbox import Mailbox


@dataclass(frozen=True)
class GroupLoan:
    """A `model.experts.Loan` within an expert-parallel group, for one pass through a layer.

    Attributes:
        mailbox: of the group, where it has one.
        lent: by copy, in the order of the takers, which of the experts held here it is of.
        copies_sent: by rank of the group, how many copies it takes from here.
        copies_taken: by rank of the group, how many copies it sends here.
    """

    group: dist.ProcessGroup
    mailbox: Mailbox | None
    lent: Sequence[int]
    copies_sent: Sequence[int]
    copies_taken: Sequence[int]

    @property
    def num_guests(self) -> int:
        """Experts of other ranks that come here."""
        return sum(self.copies_taken)

    def __call__(self, x_RD: Tensor, weights: Weights) -> tuple[Tensor, Weights, Weights]:
        """Exchange weights. A collective, and another one in the backward pass."""
        x, gate, up, down, *guests = LendExperts.apply(x_RD, *weights, self)
        return x, (gate, up, down), (guests[0], guests[1], guests[2])

    def there(self, matrices: Sequence[Tensor]) -> Tensor:
        """Send the experts that are lent, (G, 3, D x F): the guests; each expert's matrices lie together."""
        sent = matrices[0].new_empty((len(self.lent), len(matrices), matrices[0].shape[1] * matrices[0].shape[2]))
        for copy, expert in zip(sent, self.lent, strict=True):
            for row, of_all in zip(copy, matrices, strict=True):
                row.view_as(of_all[expert]).copy_(of_all[expert])
        return exchange(sent, self.copies_sent, self.copies_taken, self.group, self.mailbox)

    def back(self, d_guests: Tensor, d_matrices: Sequence[Tensor]) -> None:
        """Add the guests' gradients, (G, 3, D x F), to those of the experts that are lent.

        One after another, so that no sum depends on what a GPU does first.
        """
        returned = exchange(d_guests, self.copies_taken, self.copies_sent, self.group, self.mailbox)
        for copy, expert in zip(returned, self.lent, strict=True):
            for row, d_all in zip(copy, d_matrices, strict=True):
                d_all[expert].add_(row.view_as(d_all[expert]))


class LendExperts(torch.autograd.Function):
    """Guests' weights, (G, ...) each, beside what else is computed with, which passes through.

    So the gradients of all that come to one place: it is passed on every rank, also where nothing is lent or taken;
    what the owner's experts have got from their own rows is there to be added to; and FSDP2 cannot be ahead of it.
    """

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, gate: Tensor, up: Tensor, down: Tensor, loan: GroupLoan) -> tuple[Tensor, ...]:
        ctx.loan = loan
        ctx.set_materialize_grads(False)
        matrices = (gate, up, down)
        ctx.like = gate.new_empty((0, len(matrices), gate.shape[1] * gate.shape[2]))
        taken = loan.there(matrices)
        guests = (part.view(-1, *of_all.shape[1:]) for part, of_all in zip(taken.unbind(1), matrices, strict=True))
        return x_RD.view_as(x_RD), *(of_all.view_as(of_all) for of_all in matrices), *guests

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x_RD: Tensor, *d_matrices: Tensor) -> tuple[Tensor | None, ...]:
        own, guests = d_matrices[:3], d_matrices[3:]
        d_guests = torch.stack([d.flatten(1) for d in guests], dim=1) if ctx.loan.num_guests else ctx.like
        # In place: the gradients come from the experts' backward pass, which keeps none of them. A rank without experts
        # has none for its own, as FSDP2 wants it, which cannot reduce gradients of nothing.
        ctx.loan.back(d_guests, own)
        return d_x_RD, *own, None
