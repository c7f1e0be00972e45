"""Which device mesh a world of a given size trains on. Pure: no torch, no clocks, no processes.

A world of W slots is laid out as ``replicate x shard x expert`` ranks (HSDP x FSDP x expert parallelism) and
``idle`` slots without a worker:

- dense parameters are sharded over ``shard * expert`` ranks and held ``replicate`` times;
- the experts are split ``expert`` ways, each part sharded over ``shard`` ranks, and held ``replicate`` times.

Rank ``(r * shard + s) * expert + e`` is replica r, shard s, expert part e: the group that talks most (expert)
is the most compact. Nodes hold consecutive ranks, and the idle slots are the last ones.

`plan` enumerates every layout, drops those that break a hard constraint, prices the rest (`speed`, `memory`), and
among those within 2 % of the best prefers stability and redundancy over the last percent of a modelled speed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from launcher.rounds.layouts import expert_padding, layouts
from launcher.rounds.memory import MemoryUse, memory_use
from launcher.rounds.placement import placement_obstacle
from launcher.rounds.redundancy import survives_node_loss
from launcher.rounds.spec import MeshSpec, check_whole
from launcher.rounds.speed import StepTime, node_stride, step_time

# Plans whose modelled step times differ by less are equally fast: the model is no more exact than that.
TIE = 0.02
_IDLE_TRIED, _NODES_TRIED = 64, 8
_ALL_MICRO_BATCHES = 64  # up to which each that needs another number of rounds is tried


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
            check_whole("MeshPlan", field.name, getattr(self, field.name), 0 if field.name == "idle" else 1)

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


class Priced(NamedTuple):
    """A plan with what the model says of it."""

    plan: MeshPlan
    step: StepTime
    memory: MemoryUse

    @property
    def step_s(self) -> float:
        """Modelled seconds of one optimizer step."""
        return self.step.total

    @property
    def memory_bytes(self) -> int:
        """Modelled memory of one rank when it holds the most."""
        return self.memory.total


class Infeasible(Exception):
    """No mesh satisfies the hard constraints; the message is one line that names the constraint.

    Attributes:
        leanest: where memory is what does not suffice, the plan that takes the least of it.
    """

    def __init__(self, message: str, leanest: Priced | None = None) -> None:
        super().__init__(message)
        self.leanest = leanest


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
        Infeasible: No layout satisfies the hard constraints (pins, experts that can lie on it, no expert
            group across nodes unless it is larger than every node, memory).
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
    leanest: tuple[MeshPlan, MemoryUse] | None = None
    straddling: set[int] = set()
    for size in range(world_size, max(0, world_size - spec.max_idle - 1), -1):
        stride, widest = node_stride(ranks_per_node, size)
        for replicate, shard, expert in layouts(size, spec):
            if stride % expert and expert <= widest:
                straddling.add(expert)
                continue
            for micro_batch, rounds in _rounds(size, spec):
                candidate = MeshPlan(replicate, shard, expert, world_size - size, micro_batch, rounds)
                use = memory_use(candidate, spec)
                if spec.memory_cap_bytes is None or use.total <= spec.memory_cap_bytes:
                    priced.append(Priced(candidate, step_time(candidate, spec, ranks_per_node=ranks_per_node), use))
                elif leanest is None or use.total < leanest[1].total:
                    leanest = candidate, use
    if not priced:
        found = None
        if leanest is not None:
            found = Priced(leanest[0], step_time(leanest[0], spec, ranks_per_node=ranks_per_node), leanest[1])
        raise Infeasible(_why_infeasible(world_size, spec, straddling, found), found)
    limit_s = min(option.step_s for option in priced) * (1 + TIE)
    close = [option for option in priced if option.step_s <= limit_s]
    return min(close, key=lambda option: preference(option, spec, previous, ranks_per_node))


def idle_to_fit(world_size: int, spec: MeshSpec, ranks_per_node: int) -> int | None:
    """How many slots would have to stay idle for a mesh where `spec.max_idle` are too few; None if that is not known.

    Looked at are up to a node's slots, and then whole nodes, a few of them: to say what would help, not what is best.
    """
    within_node = range(spec.max_idle + 1, ranks_per_node + 1)[:_IDLE_TRIED]
    nodes = range(2 * ranks_per_node, (1 + _NODES_TRIED) * ranks_per_node + 1, ranks_per_node)
    for idle in itertools.chain(within_node, nodes):
        if not spec.max_idle < idle < world_size:
            continue
        with contextlib.suppress(Infeasible):
            price(world_size - idle, spec.replace(max_idle=0), ranks_per_node=ranks_per_node)
            return idle
    return None


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


def _rounds(size: int, spec: MeshSpec) -> Iterator[tuple[int, int]]:
    """Every number of rounds that some micro-batch needs, with the smallest micro-batch for it.

    A larger micro-batch of as many rounds computes only more padding. Of very many, one in each sixteenth of the
    micro-batch: a mistyped batch is no reason to think for hours.
    """
    per_rank = -(-spec.global_batch // size)
    largest = min(per_rank, spec.max_micro_batch or per_rank)
    micro_batch = largest
    while micro_batch >= 1:
        rounds = -(-per_rank // micro_batch)
        smallest = -(-per_rank // rounds)
        yield smallest, rounds
        micro_batch = smallest - (1 if smallest <= _ALL_MICRO_BATCHES else max(1, smallest // 16))


def _why_infeasible(world_size: int, spec: MeshSpec, straddling: set[int], leanest: Priced | None) -> str:
    """One line for the constraint that stopped the layouts that came furthest."""
    start = f"no mesh for {world_size} slot{'' if world_size == 1 else 's'}: "
    if world_size < 1:
        return f"{start}at least one is needed"
    if leanest is not None and spec.memory_cap_bytes is not None:
        gib = 1 << 30
        return (
            f"{start}the leanest needs {leanest.memory_bytes / gib:.2f} GiB a rank and "
            f"the limit is {spec.memory_cap_bytes / gib:.2f} GiB"
        )
    if straddling:
        ways = ", ".join(map(str, sorted(straddling)))
        return f"{start}an expert group of {ways} ranks would lie across two nodes"
    if spec.expert is not None:
        widths = (spec.model_dim, spec.ffn_dim)
        if why := placement_obstacle(spec.num_experts, widths, expert=spec.expert, shard=spec.shard or 1):
            return f"{start}{why}"
    pins = ", ".join(f"{name} = {value}" for name in ("replicate", "shard", "expert") if (value := getattr(spec, name)))
    least = max(1, world_size - spec.max_idle)
    sizes = f"{least} to {world_size}" if least < world_size else f"{world_size}"
    return f"{start}no {sizes} ranks can be laid out with {pins}"
