"""Which experts an expert-parallel rank holds, where their number does not divide too. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def experts_per_rank(num_experts: int, num_ranks: int) -> list[int]:
    """How many experts each rank of an expert-parallel group holds, which are consecutive ones.

    As many on all but the last ranks, which hold fewer or none: as torch's DTensor cuts a dimension, so that a
    checkpoint says the same of every layout.
    """
    most = -(-num_experts // num_ranks)
    return [max(0, min(most, num_experts - rank * most)) for rank in range(num_ranks)]


def cuts_through(num_experts: int, widths: Sequence[int], *, expert: int, shard: int) -> bool:
    """Whether FSDP cuts each expert of a part, and not between experts.

    Between experts where that is even. Else through each of them, where the shards divide its widths and no part is
    empty: FSDP2 wants that evenly.
    """
    held = experts_per_rank(num_experts, expert)
    is_even = held[0] == held[-1] and held[0] % shard == 0
    return not is_even and held[-1] > 0 and not any(width % shard for width in widths)


def placement_obstacle(num_experts: int, widths: Sequence[int], *, expert: int, shard: int) -> str:
    """Why experts cannot be laid out so; "" where they can.

    Parts of unequal size cannot be cut between experts: DTensor would look for their shards in other places than those
    where FSDP2 puts them.

    Args:
        num_experts: of a layer.
        widths: of one expert: the model's and its hidden one.
        expert: the expert-parallel degree.
        shard: the number of shards of each part.
    """
    if expert > max(1, num_experts):
        return f"{expert} expert-parallel ranks for {num_experts} experts: some would never hold one"
    if num_experts % expert and shard > 1 and not cuts_through(num_experts, widths, expert=expert, shard=shard):
        return (
            f"{num_experts} experts on {expert} expert-parallel ranks make unequal parts, which {shard} shards can "
            f"only cut through experts: each part needs one, and {' and '.join(map(str, widths))} must divide"
        )
    return ""
