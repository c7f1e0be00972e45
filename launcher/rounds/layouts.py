"""How a number of ranks may be laid out as replicate x shard x expert, and how evenly the experts come out. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.rounds.mesh import MeshPlan
    from launcher.rounds.spec import MeshSpec


def layouts(size: int, spec: MeshSpec) -> Iterator[tuple[int, int, int]]:
    """Every (replicate, shard, expert) of ``size`` ranks that respects the pins and divides the experts."""
    for expert in divisors(math.gcd(size, spec.num_experts) if spec.num_experts else 1):
        if spec.expert not in (None, expert):
            continue
        for shard in divisors(size // expert):
            replicate = size // expert // shard
            if spec.shard in (None, shard) and spec.replicate in (None, replicate):
                yield replicate, shard, expert


def expert_padding(mesh: MeshPlan, spec: MeshSpec) -> float:
    """How much larger the biggest shard of the experts is than an even one; 1.0 where they divide.

    Experts are sharded by expert where the shards divide them, else inside each expert where the shards
    divide its dimensions, else unevenly by expert.
    """
    if spec.num_experts == 0:
        return 1.0
    per_part = spec.num_experts // mesh.expert
    divides_inside = spec.model_dim % mesh.shard == 0 and spec.ffn_dim % mesh.shard == 0
    if per_part % mesh.shard == 0 or divides_inside:
        return 1.0
    return math.ceil(per_part / mesh.shard) * mesh.shard / per_part


def expert_unevenness(mesh: MeshPlan, spec: MeshSpec) -> float:
    """How many times the mean number of experts the busiest expert-parallel rank holds; 1.0 where they divide."""
    if spec.num_experts == 0:
        return 1.0
    return math.ceil(spec.num_experts / mesh.expert) * mesh.expert / spec.num_experts


def divisors(number: int) -> list[int]:
    """Every divisor, the smallest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
