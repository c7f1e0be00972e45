"""How long a step takes on a mesh, term by term. Pure: nothing overlaps, and only ratios decide a plan."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.rounds.guests import ShareRule, copy_rows, row_flops, share_rows
from launcher.rounds.layouts import expert_padding, expert_unevenness
from launcher.rounds.spec import FLOAT64_BYTES

if TYPE_CHECKING:
    from launcher.rounds.mesh import MeshPlan
    from launcher.rounds.spec import MeshSpec

# Passes over a layer's parameters: a gather reads and writes them, a pass reads them, backward writes a gradient.
_PASSES_OF_GATHER = 2
# AdamW reads parameter, gradient and two moments and writes three of them; clipping reads the gradient.
_STEP_BYTES_PER_PARAM = 4 * 8
_PARAM_BYTES = 4
_UNEVEN = 1.001  # below it sharing is not thought through: a rank then holds hundreds of experts, or they divide
# For so long Linux leaves a core to one of those who share it; who waits for what others have waits for them to run.
_SLICE_S = 1.5e-3


@dataclasses.dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    """Products of matrices."""
    launch: float
    """What each layer costs whatever its size."""
    weights: float
    """Parameters that pass through memory, however few tokens meet them."""
    exchange: float
    """Rows between expert-parallel ranks, and weights where these take guests."""
    gather: float
    """Parameters gathered for each pass, but for what stays from the forward pass to the backward one."""
    reduce: float
    """Gradients over the shards, once a step."""
    replicas: float
    """Gradients over the replicas, once a step."""
    optimizer: float
    """The update of this rank's shards."""

    @property
    def total(self) -> float:
        """All of it."""
        return math.fsum(dataclasses.astuple(self))


def step_time(mesh: MeshPlan, spec: MeshSpec, *, ranks_per_node: int | Sequence[int]) -> StepTime:
    """Modelled time of one optimizer step, nothing overlapped.

    A round computes (6 floating-point operations per active parameter and token, as in Kaplan et al. 2020, and a
    fixed cost per layer), exchanges tokens among the expert ranks four times a layer (there and back, forward and
    backward; twice more where a layer is computed again), and gathers parameters for each pass. A step ends with
    gradients reduced over the shards and over the replicas, and with the optimizer. Every expert is taken to get as
    many rows as any other: where ranks may take guests, these level what an uneven number of experts leaves. A
    collective moves ``(n - 1) / n`` of its bytes at the speed of its group's slowest link, round a ring. Ranks that
    share fewer cores than they are take turns.
    """
    tokens = mesh.micro_batch * spec.tokens_per_sample
    links = _Links(mesh, spec, ranks_per_node)
    uneven, copies_s = links.shared()
    sparsity = min(1.0, spec.top_k / spec.num_experts) * uneven if spec.num_experts else 1.0
    block = mesh.shard * mesh.expert

    looked_up = spec.vocab_size * spec.model_dim  # the embedding is no product
    active = max(0, spec.dense_params - looked_up) + spec.expert_params * sparsity
    whole = spec.dense_params + spec.expert_params / mesh.expert * expert_unevenness(mesh, spec)
    experts_own = spec.expert_params / mesh.expert / mesh.shard * expert_padding(mesh, spec)
    own = spec.dense_params / block + experts_own
    rows_bytes = tokens * spec.top_k * uneven * spec.model_dim * spec.activation_bytes
    # Experts are a unit of their own where they are sharded otherwise than what is around them, or exact: in float64.
    exact = spec.is_exact
    apart = mesh.expert > 1 or exact
    router = spec.apart_router_params
    num_units = (1 + apart + bool(router)) * spec.num_layers + bool(spec.root_params)

    def over_shards(bytes_per_param: int, layers: int, roots: int) -> float:
        """Gather the parameters, or reduce the gradients, of so many layers over their shards, and of the root."""
        of_experts = FLOAT64_BYTES if exact else bytes_per_param
        dense_params = max(0.0, spec.layer_dense_params - router)
        dense, root = (params * bytes_per_param for params in (dense_params, spec.root_params))
        experts = experts_own * mesh.shard / spec.num_layers * of_experts
        if apart:
            layer_s = links.collective_s(block, block, dense) + links.collective_s(mesh.shard, block, experts)
        else:
            layer_s = links.collective_s(block, block, dense + experts)
        if router:
            layer_s += links.collective_s(block, block, router * _PARAM_BYTES)
        return layers * layer_s + (roots * links.collective_s(block, block, root) if root else 0.0)

    rounds, turns = mesh.rounds, links.turns
    # Of a round's work a third is the forward pass, which is done again where layers are computed anew, and where loads
    # are counted ahead of the rounds.
    counts = spec.counts_first and rounds > 1
    num_forward = 1 + spec.recompute + counts
    again = (num_forward + 2) / 3
    # What the backward pass begins with stays gathered: the last layer and the root. Counting is a forward pass alone.
    num_gathered = (2 + counts) * spec.num_layers - 1, 1 + counts
    once, kept = (spec.num_layers, 1), spec.keep_gathered
    passes = rounds * (num_forward + 2) + _PASSES_OF_GATHER * (1 if kept else rounds * (2 + counts))
    return StepTime(
        compute=turns * rounds * again * 6 * active * tokens / spec.flops_per_s,
        launch=turns * rounds * again * spec.num_layers * spec.layer_launch_s,
        weights=turns * passes * whole * spec.activation_bytes / spec.memory_bytes_per_s,
        exchange=rounds * spec.num_layers * (links.exchange_s(rows_bytes, num_forward) + turns * copies_s),
        gather=(1 if kept else rounds) * over_shards(spec.activation_bytes, *(once if kept else num_gathered)),
        reduce=over_shards(spec.reduce_bytes, *once),
        replicas=num_units * links.replicas_s(own * spec.reduce_bytes / num_units),
        optimizer=turns * own * _STEP_BYTES_PER_PARAM / spec.memory_bytes_per_s,
    )


class _Links:
    """What it costs ranks of a mesh to talk, and how many of them take turns on a core."""

    def __init__(self, mesh: MeshPlan, spec: MeshSpec, ranks_per_node: int | Sequence[int]) -> None:
        self.spec, self.mesh = spec, mesh
        self.stride, widest = node_stride(ranks_per_node, mesh.world_size)
        fullest = min(widest, mesh.world_size)
        self.turns = max(1.0, fullest / spec.cores_per_node) if spec.cores_per_node else 1.0

    def collective_s(self, num_ranks: int, span: int, size_bytes: float) -> float:
        """A collective of `num_ranks` ranks that lie within `span` consecutive ones."""
        return self._ring_s(num_ranks, size_bytes, self.bandwidth(span), 1)

    def replicas_s(self, size_bytes: float) -> float:
        """An all-reduce over the replicas, which goes round their ring twice."""
        num_ranks, size, own = self.mesh.replicate, self.mesh.world_size, self.spec.replica_bytes_per_s
        bytes_per_s = self.bandwidth(size) if own is None or self.stride % size else own
        return 2 * self._ring_s(num_ranks, size_bytes, bytes_per_s, num_ranks - 1)

    def _ring_s(self, num_ranks: int, size_bytes: float, bytes_per_s: float, num_waits: int) -> float:
        if num_ranks == 1:
            return 0.0
        fixed_s = self.spec.latency_s + (num_ranks - 1) * self.spec.hop_s
        moved_s = size_bytes * (num_ranks - 1) / num_ranks / bytes_per_s
        return self.turns * (fixed_s + moved_s) + num_waits * (self.turns - 1) * _SLICE_S

    def bandwidth(self, span: int) -> float:
        """Bytes per second between ranks that lie within `span` consecutive ones."""
        return self.spec.inter_node_bytes_per_s if self.stride % span else self.spec.intra_node_bytes_per_s

    def shared(self) -> tuple[float, float]:
        """How many times the mean number of rows the busiest rank computes, and the seconds that a layer's guests take.

        Of loads that are level: only where the experts do not divide is there anything to share.
        """
        mesh, spec = self.mesh, self.spec
        uneven = expert_unevenness(mesh, spec)
        rows = round(mesh.micro_batch * spec.tokens_per_sample * spec.top_k * mesh.expert / max(1, spec.num_experts))
        if not spec.expert_replicas or not rows or uneven < _UNEVEN:
            return uneven, 0.0
        rule = ShareRule(
            spec.expert_replicas, copy_rows(spec, self.bandwidth(mesh.expert)), num_parallel=mesh.expert / self.turns
        )
        sharing = share_rows([rows] * spec.num_experts, mesh.expert, rule)
        row_s = row_flops(spec) / spec.flops_per_s
        return (
            sharing.busiest_rows * mesh.expert / (rows * spec.num_experts),
            sharing.most_copies * rule.copy_rows * row_s,
        )

    def exchange_s(self, rows_bytes: float, num_forward: int) -> float:
        """A layer's exchanges: of each forward pass how many rows, and rows there and back; and gradients both ways."""
        size = self.mesh.expert
        rows_s = self.collective_s(size, size, rows_bytes)
        return num_forward * self.collective_s(size, size, 0) + 2 * (num_forward + 1) * rows_s


def node_stride(ranks_per_node: int | Sequence[int], size: int) -> tuple[int, int]:
    """The largest block of ranks that no node boundary cuts (0: one node holds all), and the widest node.

    Blocks of n ranks that start at multiples of n stay inside nodes exactly when n divides every boundary,
    that is, when it divides their greatest common divisor.
    """
    if isinstance(ranks_per_node, int):
        return (ranks_per_node if size > ranks_per_node else 0), ranks_per_node
    boundaries = [end for end in itertools.accumulate(ranks_per_node) if end < size]
    return math.gcd(*boundaries), max(ranks_per_node)
