"""What FSDP2 and the experts' dispatch ask of ranks that compute on processors, cheaper than gloo has it.

Shape suffixes: R rows sent, Q rows received, D model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from elastic_moe.parallel.mailbox import Mailbox
from elastic_moe.pool import Pool
from elastic_moe.torch_private import exchange_rows


class _Allocates:
    pool: Pool

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what goes in or comes out."""
        return self.pool.take([int(length) for length in size], dtype)


class GatherByMailbox(_Allocates):
    """FSDP2's all-gather, for `FSDPModule.set_custom_all_gather`."""

    def __init__(self, mailbox: Mailbox, pool: Pool) -> None:
        self.mailbox, self.pool = mailbox, pool

    def __call__(
        self, *, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Lay the ranks' inputs together; this rank's lies in the output already."""
        found = self.mailbox.exchange([input_tensor] * group.size())
        for part, of_rank in zip(output_tensor.view(group.size(), -1), found, strict=True):
            if of_rank is not None:
                part.copy_(of_rank.view(part.dtype))
            elif part.data_ptr() != input_tensor.data_ptr():  # FSDP2 has it there already
                part.copy_(input_tensor)


class ReduceByExchange(_Allocates):
    """FSDP2's reduce-scatter, for `FSDPModule.set_custom_reduce_scatter`: ranks add what is theirs, in order of ranks.

    Gloo's own is an all-reduce of a copy, of which each rank keeps its part (torch 2.13): twice the bytes.
    """

    def __init__(self, mailbox: Mailbox | None, pool: Pool) -> None:
        self.mailbox, self.pool = mailbox, pool

    def __call__(
        self,
        *,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Give each rank the sum of its part of all inputs, parts being equal."""
        assert op == dist.ReduceOp.SUM, "parallelize() asks for sums"
        parts = list(input_tensor.view(group.size(), -1))
        if self.mailbox is None:
            received = self.pool.like(input_tensor)
            dist.all_to_all_single(received, input_tensor, group=group)
            first, second, *others = received.view(group.size(), -1)
        else:
            own = parts[group.rank()]
            parts[group.rank()] = own.new_empty(0)  # nobody reads it
            first, second, *others = (
                own if found is None else found.view(own.dtype) for found in self.mailbox.exchange(parts)
            )
        torch.add(first, second, out=output_tensor)
        for part in others:
            output_tensor.add_(part)


def add_up(tensor: Tensor, group: dist.ProcessGroup, mailbox: Mailbox | None) -> None:
    """Add up, in place, what the ranks of a group have, who have little; by the group's mailbox where it has one."""
    if mailbox is None:
        dist.all_reduce(tensor, group=group)
        return
    own = tensor.clone()
    for turn, found in enumerate(mailbox.exchange([own] * group.size())):
        part = own if found is None else found.view(own.dtype).view_as(own)
        if turn:
            tensor.add_(part)
        else:
            tensor.copy_(part)


def carry_rows(
    x_RD: Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: dist.ProcessGroup,
    mailbox: Mailbox | None,
) -> Tensor:
    """As `torch_private.exchange_rows`, by the group's mailbox where it has one."""
    if mailbox is None:
        return exchange_rows(x_RD, send_splits, receive_splits, group)
    out: Tensor = RowsByMailbox.apply(x_RD, send_splits, receive_splits, mailbox)
    return out


class RowsByMailbox(torch.autograd.Function):
    """Rows to the ranks that they are for, and their gradients back."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], mailbox: Mailbox
    ) -> Tensor:
        ctx.splits, ctx.mailbox = (send_splits, receive_splits), mailbox
        return _exchanged(x_RD, send_splits, receive_splits, mailbox)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QD: Tensor) -> tuple[Tensor, None, None, None]:
        send_splits, receive_splits = ctx.splits
        return _exchanged(grad_QD.contiguous(), receive_splits, send_splits, ctx.mailbox), None, None, None


def exchange(
    x_RD: Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: dist.ProcessGroup,
    mailbox: Mailbox | None,
) -> Tensor:
    """As `carry_rows`, without a gradient; also of numbers, (R,)."""
    if mailbox is not None:
        return _exchanged(x_RD, send_splits, receive_splits, mailbox)
    y_QD = x_RD.new_empty(sum(receive_splits), *x_RD.shape[1:])
    dist.all_to_all_single(y_QD, x_RD, list(receive_splits), list(send_splits), group=group)
    return y_QD


def _exchanged(x_RD: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], mailbox: Mailbox) -> Tensor:
    parts = list(x_RD.split(list(send_splits)))
    rank = mailbox.rank
    own = parts[rank]
    parts[rank] = own[:0]
    y_QD = x_RD.new_empty(sum(receive_splits), *x_RD.shape[1:])
    for part, found in zip(y_QD.split(list(receive_splits)), mailbox.exchange(parts), strict=True):
        part.copy_(own if found is None else found.view(part.dtype).view_as(part))
    return y_QD
