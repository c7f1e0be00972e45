"""What the mesh planner has to know of a job and of its machines. Pure: no torch."""

from __future__ import annotations

import dataclasses
import math

FLOAT32_BYTES, FLOAT64_BYTES = 4, 8


@dataclasses.dataclass(frozen=True, slots=True)
class MeshSpec:
    """A job and its machines, as far as they decide which mesh is fast and fits.

    The defaults of the machine (flops and bandwidths *achieved*, per rank) are those of a node of eight H100
    with 200 Gbit/s per rank between nodes; only their ratios decide a plan.
    """

    global_batch: int
    """Samples in a step, over all ranks."""
    num_experts: int = 0
    """Experts in an MoE layer; 0 for a dense model."""
    top_k: int = 2
    """Experts that process each token."""
    dense_params: int = 0
    """Parameters outside the experts."""
    expert_params: int = 0
    """Parameters of all experts of all layers together."""
    num_layers: int = 1
    model_dim: int = 1
    ffn_dim: int = 1
    """Hidden width of an expert; with `model_dim` it decides whether an expert can be cut evenly."""
    shared_dim: int = 0
    """Hidden width of an expert that processes every token; 0 for none."""
    query_dim: int = 0
    """Width of all query heads together; 0 takes `model_dim`."""
    key_dim: int = 0
    """Width of all key heads together; 0 takes `query_dim`."""
    vocab_size: int = 0
    """Token ids. Embedding and head are a unit of their own, gathered from the start of a pass to its end; 0 counts
    them as parts of the layers, and no memory for logits."""
    tokens_per_sample: int = 1
    max_idle: int = 0
    """Slots that may stay without a worker when fewer ranks step as fast."""
    max_micro_batch: int | None = None
    """Most samples in one forward pass; None leaves it to the memory cap."""
    recompute: bool = False
    """Layers keep their input alone for the backward pass, and are computed again there."""
    counts_first: bool = False
    """Where a step has several rounds, all go forward once before the first: the whole batch's loads are counted."""
    keep_gathered: bool = False
    """Parameters stay gathered from the first to the last pass of a step."""
    expert_replicas: int = 0
    """Experts of others that an expert-parallel rank may compute in a layer beside its own."""
    memory_cap_bytes: int | None = None
    """Memory of one rank; None plans without a limit."""
    expert: int | None = None
    """Pin: this many expert-parallel ways."""
    shard: int | None = None
    """Pin: this many FSDP shards."""
    replicate: int | None = None
    """Pin: this many replicas."""
    flops_per_s: float = 3e14
    memory_bytes_per_s: float = 2.5e12
    """Bytes that a rank reads or writes in its own memory."""
    intra_node_bytes_per_s: float = 2e11
    inter_node_bytes_per_s: float = 2e10
    replica_bytes_per_s: float | None = None
    """Of the all-reduce over replicas within a node, where it goes another way than what ranks exchange."""
    latency_s: float = 2e-5
    """Fixed cost of one collective."""
    hop_s: float = 1e-6
    """Cost of each further rank of a collective: it goes round a ring."""
    layer_launch_s: float = 3e-4
    """Fixed cost of one layer's forward and backward, whatever its size: about sixty kernels launched."""
    cores_per_node: int | None = None
    """Processor cores that the ranks of a node share where they compute on them; None where each has a device."""
    activation_bytes: int = 2
    """Bytes of one activation or communicated parameter: 2 for bf16, 4 for fp32."""
    reduce_bytes: int = 4
    """Bytes of one gradient that is accumulated and reduced: 8 where that is exact."""

    def __post_init__(self) -> None:
        at_least_0 = {"num_experts", "dense_params", "expert_params", "max_idle", "expert_replicas"}
        at_least_0 |= {"shared_dim", "query_dim", "key_dim", "vocab_size"}
        optional = {"max_micro_batch", "memory_cap_bytes", "expert", "shard", "replicate", "cores_per_node"}
        optional |= {"replica_bytes_per_s"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) or (field.name in optional and value is None):
                continue
            if field.name.endswith("_s"):
                if not (math.isfinite(value) and value > 0):
                    raise ValueError(f"MeshSpec.{field.name} is {value!r}; it must be a number above 0")
            else:
                check_whole("MeshSpec", field.name, value, 0 if field.name in at_least_0 else 1)

    def replace(self, **changes: int | float | None) -> MeshSpec:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]  # checked by __post_init__

    @property
    def is_exact(self) -> bool:
        """Whether gradients are added up in float64, in which the experts' weights are gathered as well."""
        return self.reduce_bytes == FLOAT64_BYTES

    @property
    def root_params(self) -> int:
        """Parameters of the embedding, the head and the last norm, which are one unit outside the layers."""
        return min(self.dense_params, (2 * self.vocab_size + 1) * self.model_dim) if self.vocab_size else 0

    @property
    def layer_dense_params(self) -> float:
        """Parameters of one layer outside its experts."""
        return (self.dense_params - self.root_params) / self.num_layers

    @property
    def apart_router_params(self) -> int:
        """Parameters of a layer's router where it is a unit of its own, as the layer's would round it; or 0."""
        return self.num_experts * self.model_dim if self.activation_bytes < FLOAT32_BYTES else 0

    @property
    def layer_expert_params(self) -> float:
        """Parameters of the experts of one layer."""
        return self.expert_params / self.num_layers


def check_whole(owner: str, name: str, value: object, least: int) -> None:
    """Raises ValueError where a field is no whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{owner}.{name} is {value!r}; it must be a whole number >= {least}")
