"""Which experts a rank holds: as torch's DTensor says, whose word checkpoints take."""

from __future__ import annotations

import pytest
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from launcher.rounds.placement import cuts_through, experts_per_rank, placement_obstacle

WIDTHS = (6, 10)


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "held"),
    [
        (8, 4, [2, 2, 2, 2]),
        (8, 3, [3, 3, 2]),
        (5, 2, [3, 2]),
        (8, 5, [2, 2, 2, 2, 0]),
        (5, 4, [2, 2, 1, 0]),
        (1, 1, [1]),
    ],
)
def test_ranks_hold_as_many_but_for_the_last(num_experts: int, num_ranks: int, held: list[int]) -> None:
    assert experts_per_rank(num_experts, num_ranks) == held


def places(num_experts: int, expert: int, shard: int) -> list[tuple[int, int, int, int]]:
    """Of each rank (shard, part), first expert, number of experts, first row and number of rows of an expert."""
    held = experts_per_rank(num_experts, expert)
    found = []
    for s in range(shard):
        for part in range(expert):
            first, count = sum(held[:part]), held[part]
            if cuts_through(num_experts, WIDTHS, expert=expert, shard=shard):
                rows = WIDTHS[0] // shard
                found.append((first, count, s * rows, rows))
            else:  # FSDP2 cuts along dimension 0 as torch.chunk does
                most = -(-count // shard)
                start = min(s * most, count)
                found.append((first + start, min(most, count - start), 0, WIDTHS[0]))
    return found


def by_dtensor(num_experts: int, expert: int, shard: int) -> list[tuple[int, int, int, int]]:
    """The same as a checkpoint would have it."""
    if cuts_through(num_experts, WIDTHS, expert=expert, shard=shard):
        placements = (Shard(1), Shard(0))
    else:
        placements = (_StridedShard(0, split_factor=expert) if expert > 1 else Shard(0), Shard(0))
    found = []
    for s in range(shard):
        for part in range(expert):
            sizes, starts = _compute_local_shape_and_global_offset(
                (num_experts, *WIDTHS), (shard, expert), [s, part], placements
            )
            found.append((starts[0], sizes[0], starts[1], sizes[1]))
    return found


def test_dtensor_and_fsdp_agree_on_every_layout_that_is_allowed() -> None:
    num_allowed = 0
    for num_experts in range(1, 17):
        for expert in range(1, num_experts + 1):
            for shard in (1, 2, 3, 4):
                if placement_obstacle(num_experts, WIDTHS, expert=expert, shard=shard):
                    continue
                num_allowed += 1
                ours, theirs = places(num_experts, expert, shard), by_dtensor(num_experts, expert, shard)
                for mine, its in zip(ours, theirs, strict=True):
                    assert mine[1] == its[1]
                    assert not mine[1] or mine == its, (num_experts, expert, shard)  # of nothing the place is any
    assert num_allowed > 200


@pytest.mark.parametrize(
    ("num_experts", "expert", "shard", "obstacle"),
    [
        (8, 3, 1, ""),
        (8, 5, 1, ""),
        (8, 3, 2, ""),
        (8, 4, 4, ""),  # no unequal parts: shards may be unequal
        (8, 3, 4, "8 experts on 3 expert-parallel ranks make unequal parts, which 4 shards can only cut through"),
        (8, 5, 2, "8 experts on 5 expert-parallel ranks make unequal parts"),
        (8, 9, 1, "9 expert-parallel ranks for 8 experts: some would never hold one"),
        (0, 1, 3, ""),
        (0, 2, 1, "2 expert-parallel ranks for 0 experts"),
    ],
)
def test_layouts_that_cannot_be_told_in_one_line(num_experts: int, expert: int, shard: int, obstacle: str) -> None:
    found = placement_obstacle(num_experts, WIDTHS, expert=expert, shard=shard)
    assert found.startswith(obstacle)
    assert bool(found) == bool(obstacle)
    assert "\n" not in found
