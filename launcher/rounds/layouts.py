"""How a number of ranks may be laid out as replicate x shard x expert, and how evenly the experts come out. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from launcher.rounds.placement import cuts_through, experts_per_rank, placement_obstacle

if TYPE_CHECKING:
    from launcher.rounds.mesh import MeshPlan
    from launcher.rounds.spec import MeshSpec


def layouts(size: int, spec: MeshSpec) -> Iterator[tuple[int, int, int]]:
    """Every (replicate, shard, expert) of ``size`` ranks that respects the pins and that the experts can lie on."""
    for expert in divisors(size):
        if spec.expert not in (None, expert) or expert > max(1, spec.num_experts):
            continue
        for shard in divisors(size // expert):
            replicate = size // expert // shard
            if spec.shard not in (None, shard) or spec.replicate not in (None, replicate):
                continue
            if not placement_obstacle(spec.num_experts, (spec.model_dim, spec.ffn_dim), expert=expert, shard=shard):
                yield replicate, shard, expert


def expert_padding(mesh: MeshPlan, spec: MeshSpec) -> float:
    """How much larger the biggest shard of the experts is than an even one; 1.0 where they divide.

    Experts are sharded by expert where the shards divide them, else inside each expert where the shards
    divide its dimensions, else unevenly by expert. Where the expert-parallel ranks do not divide them, the
    first ones hold more.
    """
    if spec.num_experts == 0:
        return 1.0
    most: float = experts_per_rank(spec.num_experts, mesh.expert)[0]
    widths = (spec.model_dim, spec.ffn_dim)
    if cuts_through(spec.num_experts, widths, expert=mesh.expert, shard=mesh.shard):
        most /= mesh.shard
    else:
        most = math.ceil(most / mesh.shard)
    return most * mesh.expert * mesh.shard / spec.num_experts


def expert_unevenness(mesh: MeshPlan, spec: MeshSpec) -> float:
    """How many times the mean number of experts the busiest expert-parallel rank holds; 1.0 where they divide."""
    if spec.num_experts == 0:
        return 1.0
    return math.ceil(spec.num_experts / mesh.expert) * mesh.expert / spec.num_experts


def divisors(number: int) -> list[int]:
    """Every divisor, the smallest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
