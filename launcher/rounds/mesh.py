"""Which device mesh a world of a given size trains on. Pure: no torch, no clocks, no processes.

A world of W slots is laid out as ``replicate x shard x expert`` ranks (HSDP x FSDP x expert parallelism) and
``idle`` slots without a worker:

- dense parameters are sharded over ``shard * expert`` ranks and held ``replicate`` times;
- the experts are split ``expert`` ways, each part sharded over ``shard`` ranks, and held ``replicate`` times.

Rank ``(r * shard + s) * expert + e`` is replica r, shard s, expert part e: the group that talks most (expert)
is the most compact. Nodes hold consecutive ranks, and the idle slots are the last ones.

`plan` enumerates every layout, drops those that break a hard constraint, prices the rest with `step_s`, and
among those within 2 % of the best prefers stability and redundancy over the last percent of a modelled speed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from launcher.rounds.redundancy import survives_node_loss

# Plans whose modelled step times differ by less are equally fast: the model is no more exact than that.
TIE = 0.02

# fp32 parameter, gradient and two Adam moments.
_STATE_BYTES_PER_PARAM = 16
_PARAM_BYTES = 4


class Infeasible(Exception):
    """No mesh satisfies the hard constraints; the message is one line that names the constraint."""


@dataclasses.dataclass(frozen=True, slots=True)
class MeshPlan:
    """The mesh of one generation, and how its ranks share the global batch.

    Every rank runs ``rounds`` forward and backward passes of ``micro_batch`` samples a step, so
    ``micro_batch * rounds * world_size`` is at least the global batch; samples beyond it are padding that
    weighs nothing.
    """

    replicate: int
    shard: int
    expert: int
    idle: int
    micro_batch: int
    rounds: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_whole("MeshPlan", field.name, getattr(self, field.name), 0 if field.name == "idle" else 1)

    @property
    def world_size(self) -> int:
        """How many ranks train; idle slots are not among them."""
        return self.replicate * self.shard * self.expert

    def to_json(self) -> str:
        """One line of JSON with every field: what an agent gives its workers (`Environment.mesh`)."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> MeshPlan:
        """The plan that `to_json` wrote. Raises ValueError when the text is not one."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not a mesh plan: {error}") from None
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, dict) or sorted(fields) != sorted(names):
            raise ValueError(f"not a mesh plan: expected an object with {', '.join(names)}")
        return cls(**fields)

    def __str__(self) -> str:
        return describe_mesh(dataclasses.asdict(self))


def describe_mesh(mesh: Mapping[str, Any]) -> str:
    """A plan's fields in words: its axes, then the idle slots."""
    idle = f", {mesh['idle']} idle" if mesh.get("idle") else ""
    return " x ".join(f"{axis} {mesh[axis]}" for axis in ("replicate", "shard", "expert") if axis in mesh) + idle


@dataclasses.dataclass(frozen=True, slots=True)
class MeshSpec:
    """What the planner has to know of a job and of its machines.

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
    tokens_per_sample: int = 1
    max_idle: int = 0
    """Slots that may stay without a worker when fewer ranks step as fast."""
    max_micro_batch: int | None = None
    """Most samples in one forward pass; None leaves it to the memory cap."""
    memory_cap_bytes: int | None = None
    """Memory of one rank; None plans without a limit."""
    expert: int | None = None
    """Pin: this many expert-parallel ways."""
    shard: int | None = None
    """Pin: this many FSDP shards."""
    replicate: int | None = None
    """Pin: this many replicas."""
    flops_per_s: float = 3e14
    intra_node_bytes_per_s: float = 2e11
    inter_node_bytes_per_s: float = 2e10
    latency_s: float = 2e-5
    """Fixed cost of one collective."""
    layer_launch_s: float = 3e-4
    """Fixed cost of one layer's forward and backward, whatever its size: about sixty kernels launched."""
    activation_bytes: int = 2
    """Bytes of one activation or communicated parameter: 2 for bf16, 4 for fp32."""

    def __post_init__(self) -> None:
        at_least_0 = {"num_experts", "dense_params", "expert_params", "max_idle"}
        optional = {"max_micro_batch", "memory_cap_bytes", "expert", "shard", "replicate"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in optional and value is None:
                continue
            if field.name.endswith("_s"):
                if not (math.isfinite(value) and value > 0):
                    raise ValueError(f"MeshSpec.{field.name} is {value!r}; it must be a number above 0")
            else:
                _check_whole("MeshSpec", field.name, value, 0 if field.name in at_least_0 else 1)

    def replace(self, **changes: int | float | None) -> MeshSpec:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]  # checked by __post_init__


class Priced(NamedTuple):
    """A plan with what the model says of it."""

    plan: MeshPlan
    step_s: float
    memory_bytes: int


def plan(
    world_size: int,
    spec: MeshSpec,
    *,
    ranks_per_node: int | Sequence[int],
    previous: MeshPlan | None = None,
) -> MeshPlan:
    """The mesh for ``world_size`` slots.

    Args:
        world_size: Slots that could run a worker.
        spec: The job and its machines.
        ranks_per_node: Slots of each node in rank order, or one number where all nodes are alike.
        previous: The mesh before this one: its expert-parallel degree is kept where that costs nothing,
            because a change moves every expert.

    Returns:
        A plan with ``plan.world_size + plan.idle == world_size``.

    Raises:
        Infeasible: No layout satisfies the hard constraints (pins, experts divisible by the expert-parallel
            degree, no expert group across nodes unless it is larger than every node, memory).
    """
    return price(world_size, spec, ranks_per_node=ranks_per_node, previous=previous).plan


def price(
    world_size: int,
    spec: MeshSpec,
    *,
    ranks_per_node: int | Sequence[int],
    previous: MeshPlan | None = None,
) -> Priced:
    """As `plan`, with the modelled step time and memory of the chosen plan."""
    priced: list[Priced] = []
    leanest_bytes: int | None = None
    straddling: set[int] = set()
    for size in range(world_size, max(0, world_size - spec.max_idle - 1), -1):
        stride, widest = _node_stride(ranks_per_node, size)
        for replicate, shard, expert in _layouts(size, spec):
            if stride % expert and expert <= widest:
                straddling.add(expert)
                continue
            for micro_batch, rounds in _rounds(size, spec):
                candidate = MeshPlan(replicate, shard, expert, world_size - size, micro_batch, rounds)
                need_bytes = memory_bytes(candidate, spec)
                if spec.memory_cap_bytes is not None and need_bytes > spec.memory_cap_bytes:
                    leanest_bytes = min(need_bytes, leanest_bytes or need_bytes)
                else:
                    time_s = step_s(candidate, spec, ranks_per_node=ranks_per_node)
                    priced.append(Priced(candidate, time_s, need_bytes))
    if not priced:
        raise Infeasible(_why_infeasible(world_size, spec, straddling, leanest_bytes))
    limit_s = min(option.step_s for option in priced) * (1 + TIE)
    close = [option for option in priced if option.step_s <= limit_s]
    return min(close, key=lambda option: preference(option, spec, previous, ranks_per_node))


def preference(
    option: Priced, spec: MeshSpec, previous: MeshPlan | None, ranks_per_node: int | Sequence[int]
) -> tuple[float, ...]:
    """The order among plans that are equally fast; the smallest wins."""
    mesh = option.plan
    return (
        previous is not None and mesh.expert != previous.expert,  # a new degree moves every expert
        not survives_node_loss(mesh, ranks_per_node),  # or a lost node costs steps, each time
        mesh.idle,
        expert_padding(mesh, spec) > 1,
        mesh.replicate < 2,  # no live copy of the state
        -mesh.replicate,
        mesh.micro_batch,
        option.step_s,
        -mesh.expert,  # only to be deterministic: the above differ wherever it matters
    )


def step_s(mesh: MeshPlan, spec: MeshSpec, *, ranks_per_node: int | Sequence[int]) -> float:
    """Modelled seconds of one optimizer step, nothing overlapped.

    A round computes (6 floating-point operations per active parameter and token, as in Kaplan et al. 2020, and a
    fixed cost per layer), exchanges tokens among the expert ranks four times a layer (there and back, forward and
    backward), and gathers parameters twice and reduces gradients once over the shards. A step ends with one
    all-reduce over the replicas. A collective moves ``(n - 1) / n`` of its bytes at the speed of its group's
    slowest link.
    """
    tokens = mesh.micro_batch * spec.tokens_per_sample
    sparsity = min(1.0, spec.top_k / spec.num_experts) if spec.num_experts else 1.0
    compute_s = 6 * (spec.dense_params + spec.expert_params * sparsity) * tokens / spec.flops_per_s
    compute_s += spec.num_layers * spec.layer_launch_s

    stride, _ = _node_stride(ranks_per_node, mesh.world_size)
    block = mesh.shard * mesh.expert
    wire = spec.activation_bytes

    def collective_s(num_ranks: int, span: int, size_bytes: float) -> float:
        if num_ranks == 1:
            return 0.0
        bandwidth = spec.inter_node_bytes_per_s if stride % span else spec.intra_node_bytes_per_s
        return spec.latency_s + size_bytes * (num_ranks - 1) / num_ranks / bandwidth

    tokens_bytes = tokens * spec.top_k * spec.model_dim * wire
    exchange_s = 4 * spec.num_layers * collective_s(mesh.expert, mesh.expert, tokens_bytes)
    dense_bytes = spec.dense_params / spec.num_layers * wire
    experts_bytes = spec.expert_params / spec.num_layers / mesh.expert * expert_padding(mesh, spec) * wire
    gather_s = collective_s(block, block, dense_bytes)
    if spec.expert_params:
        gather_s += collective_s(mesh.shard, block, experts_bytes)
    state_bytes = (dense_bytes / block + experts_bytes / mesh.shard) * spec.num_layers
    replicas_s = 2 * collective_s(mesh.replicate, mesh.world_size, state_bytes)
    return mesh.rounds * (compute_s + exchange_s + 3 * spec.num_layers * gather_s) + replicas_s


def memory_bytes(mesh: MeshPlan, spec: MeshSpec) -> int:
    """Modelled memory of one rank: its share of the state, two layers gathered, and the activations.

    Activations of a layer take ``(15 + 19 * top_k) / 2`` numbers per token and model dimension: Korthikanti
    et al. 2022, section 4.1, without the attention matrix (flash attention), the MLP's share once per expert
    that a token is sent to.
    """
    block = mesh.shard * mesh.expert
    experts = spec.expert_params / mesh.expert * expert_padding(mesh, spec)
    state = _STATE_BYTES_PER_PARAM * (spec.dense_params / block + experts / mesh.shard)
    whole = (spec.dense_params if block > 1 else 0) + (experts if mesh.shard > 1 else 0)
    gathered = 2 * _PARAM_BYTES * whole / spec.num_layers
    tokens = mesh.micro_batch * spec.tokens_per_sample
    copies = spec.top_k if spec.num_experts else 1
    activations = tokens * spec.num_layers * spec.model_dim * (15 + 19 * copies) / 2 * spec.activation_bytes
    return math.ceil(state + gathered + activations)


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


def _layouts(size: int, spec: MeshSpec) -> Iterator[tuple[int, int, int]]:
    """Every (replicate, shard, expert) of ``size`` ranks that respects the pins and divides the experts."""
    for expert in _divisors(math.gcd(size, spec.num_experts) if spec.num_experts else 1):
        if spec.expert not in (None, expert):
            continue
        for shard in _divisors(size // expert):
            replicate = size // expert // shard
            if spec.shard in (None, shard) and spec.replicate in (None, replicate):
                yield replicate, shard, expert


def _rounds(size: int, spec: MeshSpec) -> Iterator[tuple[int, int]]:
    """Every number of rounds that some micro-batch needs, with the smallest micro-batch for it.

    A larger micro-batch of as many rounds computes only more padding.
    """
    per_rank = math.ceil(spec.global_batch / size)
    largest = min(per_rank, spec.max_micro_batch or per_rank)
    micro_batch = largest
    while micro_batch >= 1:
        rounds = math.ceil(per_rank / micro_batch)
        smallest = math.ceil(per_rank / rounds)
        yield smallest, rounds
        micro_batch = smallest - 1


def _node_stride(ranks_per_node: int | Sequence[int], size: int) -> tuple[int, int]:
    """The largest block of ranks that no node boundary cuts (0: one node holds all), and the widest node.

    Blocks of n ranks that start at multiples of n stay inside nodes exactly when n divides every boundary,
    that is, when it divides their greatest common divisor.
    """
    if isinstance(ranks_per_node, int):
        return (ranks_per_node if size > ranks_per_node else 0), ranks_per_node
    boundaries = [end for end in itertools.accumulate(ranks_per_node) if end < size]
    return math.gcd(*boundaries), max(ranks_per_node)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _why_infeasible(world_size: int, spec: MeshSpec, straddling: set[int], leanest_bytes: int | None) -> str:
    """One line for the constraint that stopped the layouts that came furthest."""
    start = f"no mesh for {world_size} slot{'' if world_size == 1 else 's'}: "
    if world_size < 1:
        return f"{start}at least one is needed"
    if leanest_bytes is not None and spec.memory_cap_bytes is not None:
        gib = 1 << 30
        return (
            f"{start}the leanest needs {leanest_bytes / gib:.2f} GiB a rank and "
            f"the limit is {spec.memory_cap_bytes / gib:.2f} GiB"
        )
    if straddling:
        ways = ", ".join(map(str, sorted(straddling)))
        return f"{start}an expert group of {ways} ranks would lie across two nodes"
    if spec.expert is not None and (spec.num_experts or 1) % spec.expert:
        return f"{start}{spec.num_experts} experts do not divide into {spec.expert} parts"
    pins = ", ".join(f"{name} = {value}" for name in ("replicate", "shard", "expert") if (value := getattr(spec, name)))
    least = max(1, world_size - spec.max_idle)
    sizes = f"{least} to {world_size}" if least < world_size else f"{world_size}"
    return f"{start}no {sizes} ranks can be laid out with {pins}"


def _check_whole(owner: str, name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{owner}.{name} is {value!r}; it must be a whole number >= {least}")
