"""What one rank's memory holds when it holds the most. Pure: from a mesh and a spec to bytes, term by term.

FSDP2 (torch/distributed/fsdp/_fully_shard, 2.13) has units: the root (embedding, head, last norm) and the layers, whose
experts are units of their own where ranks hold parts of them. A unit is gathered where it computes: the root from the
start of a pass to its end, a layer's while it runs. Gradients are reduced and cut into shards with the last pass of a
step; those of the passes before it are added up whole. So a step holds the most at one of a few moments, each of which
is counted: at the loss, in the last layer's backward pass or the first's (there at the experts, or as their gradients
are reduced), as the root's are reduced, or in the optimizer.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from launcher.rounds.guests import guest_params
from launcher.rounds.layouts import expert_padding, expert_unevenness
from launcher.rounds.spec import FLOAT64_BYTES

if TYPE_CHECKING:
    from launcher.rounds.mesh import MeshPlan
    from launcher.rounds.spec import MeshSpec

_PARAM_BYTES = 4
_MOMENTS_BYTES = 8
_LOSS_BYTES = 4  # logits are made fp32 for the loss
_MATRICES_OF_EXPERT = 3
_MAILBOX_SLOTS = 2
# Of glibc's malloc: found by measuring resident memory (docs/benchmarks.md), one number for all.
_TIMES_AGAIN = 2.0  # a layer's activations: what is left in the heap of a layer that is computed twice
# Pages of libraries that a first step touches, buffers of gloo, kernels made at run time, huge pages that are not full.
_CPU_RUNTIME_BYTES = 160 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of one rank, at the moment at which they are the most."""

    params: int
    """fp32 parameters, this rank's shards."""
    optimizer: int
    """The two moments of AdamW, fp32."""
    gradients: int
    """Gradients, fp32: of passes before the last one whole, then in shards."""
    activations: int
    """What layers keep for the backward pass, the weights of as many guests as they may have among it."""
    logits: int
    """Logits, their softmax, and the gradients of both."""
    gathered: int
    """Parameters of the units that compute, whole."""
    working: int
    """What a unit's backward pass or the optimizer takes for a moment: gradients that are being reduced, products."""
    runtime: int
    """What libraries and the memory's allocator take along with a step."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


def memory_use(mesh: MeshPlan, spec: MeshSpec) -> MemoryUse:
    """Modelled memory of one rank in the fullest moment of a step."""
    sizes = _Sizes(mesh, spec)
    if spec.cores_per_node:
        return sizes.on_processors()
    layers = [of(last=last) for last in (True, False) for of in (sizes.in_layer, sizes.in_reduction)]
    return max((sizes.at_loss(), *layers, sizes.at_end(), sizes.in_step()), key=lambda use: use.total)


class _Sizes:
    """The numbers that the moments of a step are made of, in bytes unless their name says otherwise."""

    def __init__(self, mesh: MeshPlan, spec: MeshSpec) -> None:
        self.mesh, self.spec = mesh, spec
        self.num_shards = mesh.shard * mesh.expert
        self.layer_experts_num = spec.layer_expert_params / mesh.expert * expert_unevenness(mesh, spec)
        self.whole_num = spec.dense_params + self.layer_experts_num * spec.num_layers
        experts = spec.expert_params / mesh.expert / mesh.shard * expert_padding(mesh, spec)
        self.own_num = spec.dense_params / self.num_shards + experts
        self.tokens = mesh.micro_batch * spec.tokens_per_sample
        exact = spec.is_exact
        self.expert_bytes = FLOAT64_BYTES if exact else spec.activation_bytes

        wide = spec.activation_bytes
        self.root = spec.root_params * wide
        self.layer = spec.layer_dense_params * wide
        self.experts = self.layer_experts_num * self.expert_bytes
        self.accumulated = self.whole_num * spec.reduce_bytes if mesh.rounds > 1 else 0
        # Guests' weights stay for the backward pass, like what is computed with them.
        self.guests = guest_params(spec) * wide if mesh.expert > 1 else 0
        self.of_layer = self.tokens * layer_activation_bytes(spec) + self.guests
        inputs = self.tokens * spec.model_dim * wide * spec.num_layers
        self.activations = inputs if spec.recompute else self.of_layer * spec.num_layers
        self.runtime = _holes(self) + _CPU_RUNTIME_BYTES if spec.cores_per_node else 0
        self.logits = self.tokens * spec.vocab_size * wide
        # Softmax, its gradient and that of the logits, beside the logits themselves.
        self.at_the_loss = self.tokens * spec.vocab_size * 3 * _LOSS_BYTES

    def use(
        self,
        *,
        gradients: float = 0,
        activations: float = 0,
        logits: float = 0,
        gathered: float = 0,
        working: float = 0,
    ) -> MemoryUse:
        """What is held at any time, and the terms of one moment."""
        if self.spec.keep_gathered:
            everything = (self.whole_num - self.layer_experts_num * self.spec.num_layers) * self.spec.activation_bytes
            gathered = everything + self.experts * self.spec.num_layers
        terms = (
            self.own_num * _PARAM_BYTES,
            self.own_num * _MOMENTS_BYTES,
            gradients,
            activations,
            logits,
            gathered,
            working,
            self.runtime,
        )
        return MemoryUse(*map(math.ceil, terms))

    def on_processors(self) -> MemoryUse:
        """Where ranks compute on processors.

        There all that a step has taken stays with the process, for the same in the next one (`elastic_moe.pool`,
        `elastic_moe.heap`): shards of gradients beside what layers keep for the backward pass, whichever came first.
        """
        spec, layer = self.spec, self.layer + self.experts
        # The last layer has a place of its own, and the others take turns in one (`elastic_moe.parallel.turns`).
        num_gathered = spec.num_layers if spec.keep_gathered else min(spec.num_layers, 2)
        unit_num = spec.layer_dense_params + self.layer_experts_num
        sent = (unit_num + spec.root_params) * spec.reduce_bytes
        exchanged = 0.0
        if self.num_shards > 1:
            # What is gathered at once, as one tensor, for two layers; and the mailbox's slots.
            flat = self.layer + (self.experts if self.mesh.shard > 1 else 0)
            largest = max(unit_num, spec.root_params) * spec.reduce_bytes
            exchanged = 2 * flat + self.root + _MAILBOX_SLOTS * largest * (1 - 1 / self.num_shards)
        elif self.mesh.replicate > 1:
            exchanged = unit_num * spec.reduce_bytes * spec.num_layers  # divided by a factor, into a copy from malloc
        kept = self.activations + (self.of_layer if spec.recompute else 0)
        work = self.guests + self.tokens * _expert_work_bytes(spec)
        largest = max(
            self.layer_experts_num / _MATRICES_OF_EXPERT / self.mesh.shard,
            spec.vocab_size * spec.model_dim / self.num_shards,
        )
        of_step = 2 * _PARAM_BYTES * largest if spec.is_exact else 0.0
        return self.use(
            gradients=self.own_num * _PARAM_BYTES + self.accumulated,
            activations=kept,
            logits=self.logits + self.at_the_loss,
            gathered=self.root + num_gathered * layer,
            working=sent + exchanged + self.experts + max(0.0, work - self.at_the_loss) + of_step,
        )

    def at_loss(self) -> MemoryUse:
        """The forward pass is done, and the logits' gradient is made."""
        return self.use(
            gradients=self.accumulated,
            activations=self.activations,
            logits=self.logits + self.at_the_loss,
            gathered=self.root,
        )

    def in_layer(self, *, last: bool) -> MemoryUse:
        """The backward pass of the last layer's experts, the first of all; or of the first one's."""
        return self.use(
            gradients=self.gradients(last=last),
            activations=self.kept_activations(last=last),
            logits=self.logits,
            gathered=self.root + self.layer + self.experts,
            working=self.experts + self.guests + self.tokens * _expert_work_bytes(self.spec),
        )

    def in_reduction(self, *, last: bool) -> MemoryUse:
        """A unit's gradients are reduced: its parameters are gone, and those of the next one on their way.

        Where ranks hold parts of the experts those are a unit of their own, of which autograd holds one of three
        gradients until it has told of it; else a layer is one unit, and its experts' gradients wait for the others.
        """
        apart = self.mesh.expert > 1 or self.spec.is_exact
        numbers, shards, held = self.layer_experts_num, self.mesh.shard, self.experts / _MATRICES_OF_EXPERT
        if not apart:
            numbers, shards, held = numbers + self.spec.layer_dense_params, self.num_shards, self.experts
        return self.use(
            gradients=self.gradients(last=last),
            activations=self.kept_activations(last=last),
            logits=self.logits,
            gathered=self.root + self.layer + (self.experts if shards > 1 else 0.0),
            working=held + self.reducing(numbers, shards),
        )

    def at_end(self) -> MemoryUse:
        """The root's gradients are reduced, after those of all layers."""
        spec = self.spec
        return self.use(
            gradients=self.own_num * _PARAM_BYTES,
            logits=self.logits,
            gathered=self.root,
            working=self.reducing(spec.root_params, self.num_shards),
        )

    def in_step(self) -> MemoryUse:
        """The optimizer: one that is exact computes a tensor's update by steps, each of which makes another one."""
        largest = max(
            self.layer_experts_num / _MATRICES_OF_EXPERT / self.mesh.shard,
            self.spec.vocab_size * self.spec.model_dim / self.num_shards,
        )
        working = 2 * _PARAM_BYTES * largest if self.spec.is_exact else 0.0
        return self.use(gradients=self.own_num * _PARAM_BYTES, working=working)

    def gradients(self, *, last: bool) -> float:
        """Whole ones of the layers that are still to come in the last round, and the others' in shards."""
        left = self.left(last=last)
        of_root = self.root / 2  # the head's; the embedding comes at the end
        return self.accumulated * left + (1 - left) * self.own_num * _PARAM_BYTES + of_root

    def kept_activations(self, *, last: bool) -> float:
        """What the layers still to come keep, and what of this one is computed again."""
        return self.activations * self.left(last=last) + (self.of_layer if self.spec.recompute else 0)

    def left(self, *, last: bool) -> float:
        """The part of all layers whose backward pass is not done."""
        return 1.0 if last else 1 / self.spec.num_layers

    def reducing(self, numbers: float, num_shards: int) -> float:
        """What of so many gradients is sent, and what comes out of it.

        A group of one sends nothing, and copies once more where it divides by a factor, as with replicas.
        """
        spec = self.spec
        copies = 1 + 1 / num_shards + (num_shards == 1 and self.mesh.replicate > 1)
        cast = _PARAM_BYTES / num_shards if spec.reduce_bytes != _PARAM_BYTES else 0.0
        return numbers * (spec.reduce_bytes * copies + cast)


def _holes(sizes: _Sizes) -> float:
    """What glibc's malloc keeps of freed blocks: what each layer leaves for the backward pass settles in their midst.

    So of each layer stays what it took for itself: rows and tokens on their way, gradients of what are no experts; and
    once, of what is computed again one layer's.
    """
    spec, wide = sizes.spec, sizes.spec.activation_bytes
    rows = spec.top_k if spec.num_experts else 1
    of_tokens = sizes.tokens * spec.model_dim * wide
    copies = 2 + (4 if sizes.mesh.expert > 1 else 0)  # sorted and back, and once more each where they are exchanged
    kept = (2 + copies * rows) * of_tokens + sizes.layer
    once = _TIMES_AGAIN * sizes.of_layer if spec.recompute else 0.0
    return spec.num_layers * kept + once + sizes.root


def layer_activation_bytes(spec: MeshSpec) -> float:
    """Bytes that one layer keeps for each token: the inputs of what has a gradient.

    Of each of two norms its input, the normalised one and its output; queries, keys, values and what attention makes of
    them, twice; of each row its input, gate, up, the activation of the gate, and its output; in fp32 the router's
    input, where that is not what it is anyway, logits, scores and shares. (`Experts` computes the last product's input
    again.)
    """
    router = 3 * spec.num_experts + (spec.model_dim if spec.activation_bytes < _LOSS_BYTES else 0)
    return (_attention_numbers(spec) + _expert_numbers(spec)) * spec.activation_bytes + router * _LOSS_BYTES


def _attention_numbers(spec: MeshSpec) -> int:
    query_dim = spec.query_dim or spec.model_dim
    return 6 * spec.model_dim + 3 * query_dim + 2 * (spec.key_dim or query_dim)


def _expert_numbers(spec: MeshSpec) -> int:
    rows = spec.top_k if spec.num_experts else 1
    return rows * (2 * spec.model_dim + 3 * spec.ffn_dim) + 4 * spec.shared_dim


def _expert_work_bytes(spec: MeshSpec) -> float:
    """Bytes that the experts' backward pass takes for each token: gradients of what they have kept.

    On CPUs one expert goes after the other, and only the ends of all rows are there at once: the gradients that come,
    the same in the order of the experts, and those that go.
    """
    rows = spec.top_k if spec.num_experts else 1
    numbers = 2 * spec.model_dim + 4 * spec.ffn_dim
    if spec.cores_per_node:
        numbers = 3 * spec.model_dim + 4 * spec.ffn_dim // max(1, spec.num_experts)
    return rows * numbers * spec.activation_bytes
