"""Rows by their experts: how they lie, how they are laid together for the products, and back.

Shape suffixes: R rows, P source ranks, E experts held here, D model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SIZES_PER_OCTAVE = 16
_LEAST_STEP = 8


def rounded(num_rows: int) -> int:
    """The number of rows that so many are filled up to: one of sixteen between a power of two and the next.

    oneDNN makes code for each shape that it meets, half a millisecond's work, and keeps it; the numbers of an expert's
    rows are others in every step.
    """
    step = max(_LEAST_STEP, (1 << max(0, num_rows - 1).bit_length()) // (2 * _SIZES_PER_OCTAVE))
    return -(-num_rows // step) * step


@dataclass(frozen=True)
class Blocks:
    """Rows ordered by source, and by expert within a source.

    Attributes:
        counts: by source, the number of rows for each expert.
        fills: lay each expert's rows out with zeros behind them, up to a number from `rounded`.
        in_one: all experts run in one kernel for each product, and not one after the other.
    """

    counts: Sequence[Sequence[int]]
    fills: bool = False
    in_one: bool = False

    @property
    def sizes(self) -> list[int]:
        """Rows of each expert, what they are filled up with among them."""
        sums = [sum(of_expert) for of_expert in zip(*self.counts, strict=True)]
        return [rounded(size) for size in sums] if self.fills else sums

    @property
    def ends_E(self) -> Tensor:
        """Where each expert's rows end that are laid together, int32."""
        return torch.tensor(self.sizes).cumsum(0).to(torch.int32)

    def by_expert(self, x_RD: Tensor) -> list[Tensor]:
        """Each expert's rows, from all sources; views of `x_RD` where they lie together already."""
        parts = x_RD.split([count for of_source in self.counts for count in of_source])
        num_experts = len(self.counts[0])
        if len(self.counts) == 1 and not self.fills:
            return list(parts)
        sizes = self.sizes
        longest = max(size - sum(of) for size, of in zip(sizes, zip(*self.counts, strict=True), strict=True))
        zeros = x_RD.new_zeros(longest, x_RD.shape[1])
        found = []
        for expert, size in enumerate(sizes):
            own = parts[expert::num_experts]
            found.append(torch.cat([*own, zeros[: size - sum(map(len, own))]]))
        return found

    def together(self, x_RD: Tensor) -> Tensor:
        """The rows of all experts, one expert after the other."""
        if len(self.counts) == 1 and not self.fills:
            return x_RD
        return torch.cat(self.by_expert(x_RD))

    def back(self, by_expert: Sequence[Tensor]) -> Tensor:
        """What `by_expert` gives, in the order of the rows again."""
        if len(self.counts) == 1:
            return torch.cat([y[:count] for y, count in zip(by_expert, self.counts[0], strict=True)])
        parts = [
            y[: sum(of_expert)].split(of_expert)
            for y, of_expert in zip(by_expert, zip(*self.counts, strict=True), strict=True)
        ]
        return torch.cat([part for of_source in zip(*parts, strict=True) for part in of_source])

    def back_together(self, y_RD: Tensor) -> Tensor:
        """What `together` gives, in the order of the rows again."""
        if len(self.counts) == 1 and not self.fills:
            return y_RD
        return self.back(y_RD.split(self.sizes))


class DeviceBlocks:
    """The same for a device that one does not want to wait for: the numbers of rows stay there, unknown to the host."""

    def __init__(self, counts_PE: Tensor, num_rows: int) -> None:
        self.ends_E = counts_PE.sum(0).cumsum(0).to(torch.int32)
        self._order_R: Tensor | None = None
        if counts_PE.shape[0] > 1:
            here_PE = _starts(counts_PE)
            there_PE = _starts(counts_PE.T).T
            place_R = torch.arange(num_rows, device=counts_PE.device)
            self._order_R = place_R + _spread((here_PE - there_PE).T, counts_PE.T, num_rows)
            self._back_R = place_R + _spread(there_PE - here_PE, counts_PE, num_rows)

    def together(self, x_RD: Tensor) -> Tensor:
        """As `Blocks.together`."""
        return x_RD if self._order_R is None else x_RD.index_select(0, self._order_R)

    def back_together(self, y_RD: Tensor) -> Tensor:
        """As `Blocks.back_together`."""
        return y_RD if self._order_R is None else y_RD.index_select(0, self._back_R)


def _starts(counts: Tensor) -> Tensor:
    """Where each block begins, blocks lying row by row."""
    flat = counts.flatten()
    return (flat.cumsum(0) - flat).view(counts.shape)


def _spread(of_block: Tensor, counts: Tensor, num_rows: int) -> Tensor:
    """A block's number for each of its rows, blocks lying row by row."""
    return torch.repeat_interleave(of_block.flatten(), counts.flatten(), output_size=num_rows)
