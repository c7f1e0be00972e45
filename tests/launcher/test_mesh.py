"""The mesh planner: hard constraints at every world size, optimality against a brute force, stability."""

from __future__ import annotations

import itertools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.rounds.layouts import expert_padding
from launcher.rounds.memory import memory_use
from launcher.rounds.mesh import TIE, Infeasible, MeshPlan, idle_to_fit, plan, price
from launcher.rounds.redundancy import NodeLoss, node_loss
from launcher.rounds.spec import MeshSpec
from launcher.rounds.speed import step_time

# Makes nearly every layout equally fast, so that the order among equals decides.
FREE_COMMUNICATION = {
    "intra_node_bytes_per_s": 1e30,
    "inter_node_bytes_per_s": 1e30,
    "memory_bytes_per_s": 1e30,
    "latency_s": 1e-30,
    "hop_s": 1e-30,
}


def memory_bytes(mesh: MeshPlan, spec: MeshSpec) -> int:
    return memory_use(mesh, spec).total


@st.composite
def specs(draw: st.DrawFn, max_batch: int = 4096) -> MeshSpec:
    """Jobs of every kind: dense and sparse, pinned and free, with and without a memory cap."""
    num_experts = draw(st.sampled_from([0, 1, 2, 6, 7, 8, 12, 60, 64, 128]))
    pin = st.one_of(st.none(), st.sampled_from([1, 2, 3, 4, 8]))
    few_pins = draw(st.sampled_from([(), ("expert",), ("shard",), ("replicate",), ("expert", "shard")]))
    return MeshSpec(
        global_batch=draw(st.integers(1, max_batch)),
        num_experts=num_experts,
        top_k=draw(st.integers(1, max(1, min(8, num_experts)))),
        dense_params=draw(st.integers(0, 10**10)),
        expert_params=draw(st.integers(1, 10**11)) if num_experts else 0,
        num_layers=draw(st.integers(1, 64)),
        model_dim=draw(st.sampled_from([32, 100, 4096])),
        ffn_dim=draw(st.sampled_from([64, 96, 14336])),
        tokens_per_sample=draw(st.sampled_from([1, 128, 4096])),
        recompute=draw(st.booleans()),
        keep_gathered=draw(st.booleans()),
        max_idle=draw(st.integers(0, 8)),
        max_micro_batch=draw(st.one_of(st.none(), st.integers(1, 64))),
        memory_cap_bytes=draw(st.one_of(st.none(), st.integers(1 << 24, 1 << 40))),
        **{name: draw(pin) for name in few_pins},  # type: ignore[arg-type]
        **draw(st.sampled_from([{}, FREE_COMMUNICATION])),  # type: ignore[arg-type]
    )


nodes = st.one_of(st.integers(1, 16), st.lists(st.integers(1, 8), min_size=1, max_size=12))


def slots(ranks_per_node: int | list[int], world_size: int) -> int:
    """The world, no larger than the listed nodes are."""
    return world_size if isinstance(ranks_per_node, int) else min(world_size, sum(ranks_per_node))


def node_of_rank(ranks_per_node: int | list[int], rank: int) -> int:
    if isinstance(ranks_per_node, int):
        return rank // ranks_per_node
    return next(node for node, end in enumerate(itertools.accumulate(ranks_per_node)) if rank < end)


def lies(spec: MeshSpec, mesh: MeshPlan) -> bool:
    """Every part has as many experts, or is not cut between them by several shards."""
    most = math.ceil(spec.num_experts / mesh.expert)
    widths_divide = spec.model_dim % mesh.shard == 0 and spec.ffn_dim % mesh.shard == 0
    each_holds_one = most * (mesh.expert - 1) < spec.num_experts
    return mesh.expert <= max(1, spec.num_experts) and (
        spec.num_experts % mesh.expert == 0 or mesh.shard == 1 or (widths_divide and each_holds_one)
    )


def broken_rules(mesh: MeshPlan, world_size: int, spec: MeshSpec, ranks_per_node: int | list[int]) -> list[str]:
    """Every hard constraint, written out once more in the slowest and plainest way."""
    rules = {
        "every slot is a rank or idle": mesh.world_size + mesh.idle == world_size,
        "idle within its limit": mesh.idle <= spec.max_idle,
        "the experts can lie on it": lies(spec, mesh),
        "the batch is covered": mesh.micro_batch * mesh.rounds * mesh.world_size >= spec.global_batch,
        "no round is all padding": mesh.micro_batch * (mesh.rounds - 1) * mesh.world_size < spec.global_batch,
        "micro-batch within its limit": mesh.micro_batch <= (spec.max_micro_batch or mesh.micro_batch),
        "memory": spec.memory_cap_bytes is None or memory_bytes(mesh, spec) <= spec.memory_cap_bytes,
        "pins": all(getattr(spec, name) in (None, getattr(mesh, name)) for name in ("replicate", "shard", "expert")),
    }
    widest = ranks_per_node if isinstance(ranks_per_node, int) else max(ranks_per_node)
    if mesh.expert <= widest:
        groups = [range(first, first + mesh.expert) for first in range(0, mesh.world_size, mesh.expert)]
        rules["an expert group lies in one node"] = all(
            len({node_of_rank(ranks_per_node, rank) for rank in group}) == 1 for group in groups
        )
    return [rule for rule, holds in rules.items() if not holds]


def is_held_elsewhere(mesh: MeshPlan, ranks_per_node: int | list[int]) -> bool:
    """Whether the others hold each node's parts of the state, rank by rank."""
    block = mesh.shard * mesh.expert
    homes = [(rank % block, node_of_rank(ranks_per_node, rank)) for rank in range(mesh.world_size)]
    return all(len({node for part, node in homes if part == wanted}) > 1 for wanted in range(block))


def brute_force(world_size: int, spec: MeshSpec, ranks_per_node: int | list[int]) -> list[MeshPlan]:
    """Every plan that breaks no rule, micro-batches that waste a round's worth of samples included."""
    found = []
    for size in range(max(1, world_size - spec.max_idle), world_size + 1):
        for replicate, shard, expert in itertools.product(range(1, size + 1), repeat=3):
            if replicate * shard * expert != size:
                continue
            for micro_batch in range(1, math.ceil(spec.global_batch / size) + 1):
                rounds = math.ceil(math.ceil(spec.global_batch / size) / micro_batch)
                mesh = MeshPlan(replicate, shard, expert, world_size - size, micro_batch, rounds)
                if not broken_rules(mesh, world_size, spec, ranks_per_node):
                    found.append(mesh)
    return found


@given(world_size=st.integers(1, 512), spec=specs(), ranks_per_node=nodes)
@settings(max_examples=300, deadline=None)
def test_no_plan_breaks_a_hard_constraint(world_size: int, spec: MeshSpec, ranks_per_node: int | list[int]) -> None:
    world_size = slots(ranks_per_node, world_size)
    mesh = None
    try:
        mesh = plan(world_size, spec, ranks_per_node=ranks_per_node)
    except Infeasible as error:
        reason = str(error)
    else:
        reason = None
    assert reason is None or re.fullmatch(rf"no mesh for {world_size} slots?: .+", reason)
    assert mesh is None or broken_rules(mesh, world_size, spec, ranks_per_node) == []


@given(world_size=st.integers(1, 12), spec=specs(max_batch=40), ranks_per_node=nodes, data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_other_plan_is_better(
    world_size: int, spec: MeshSpec, ranks_per_node: int | list[int], data: st.DataObject
) -> None:
    world_size = slots(ranks_per_node, world_size)
    everything = brute_force(world_size, spec, ranks_per_node)
    if not everything:
        with pytest.raises(Infeasible):
            plan(world_size, spec, ranks_per_node=ranks_per_node)
        return
    previous = data.draw(st.one_of(st.none(), st.sampled_from(everything)))
    chosen = plan(world_size, spec, ranks_per_node=ranks_per_node, previous=previous)

    times_s = {mesh: step_time(mesh, spec, ranks_per_node=ranks_per_node).total for mesh in everything}
    close = [mesh for mesh in everything if times_s[mesh] <= min(times_s.values()) * (1 + TIE)]
    assert chosen in close
    if previous is not None and any(mesh.expert == previous.expert for mesh in close):
        close = [mesh for mesh in close if mesh.expert == previous.expert]
        assert chosen in close
    if any(is_held_elsewhere(mesh, ranks_per_node) for mesh in close):
        close = [mesh for mesh in close if is_held_elsewhere(mesh, ranks_per_node)]
        assert chosen in close
    assert chosen.idle == min(mesh.idle for mesh in close)
    close = [mesh for mesh in close if mesh.idle == chosen.idle]
    if any(expert_padding(mesh, spec) == 1 for mesh in close):
        close = [mesh for mesh in close if expert_padding(mesh, spec) == 1]
        assert chosen in close
    assert chosen.replicate == max(mesh.replicate for mesh in close)
    close = [mesh for mesh in close if mesh.replicate == chosen.replicate]
    assert chosen.micro_batch == min(mesh.micro_batch for mesh in close)


def moe(**changes: int | float | None) -> MeshSpec:
    """A model of Mixtral's shape."""
    return MeshSpec(
        global_batch=512,
        num_experts=8,
        dense_params=1_600_000_000,
        expert_params=45_000_000_000,
        num_layers=32,
        model_dim=4096,
        ffn_dim=14336,
        tokens_per_sample=4096,
        recompute=True,
    ).replace(**changes)


def test_the_expert_degree_is_kept_only_while_that_costs_nothing() -> None:
    free = moe(**FREE_COMMUNICATION)
    for expert in (1, 2, 4, 8):
        previous = MeshPlan(1, 1, expert, 0, 1, 1)
        assert plan(8, free, ranks_per_node=8, previous=previous).expert == expert
    costly = moe(expert_params=8000, latency_s=1.0)  # each exchange costs a second: only one part avoids it
    assert plan(8, costly, ranks_per_node=8, previous=MeshPlan(1, 1, 8, 0, 1, 1)).expert == 1


def test_an_idle_slot_costs_nothing_where_the_batch_does_not_divide() -> None:
    """16 samples on 9 ranks take two rounds of one, as on 8; nine ranks would only pay the wider collectives."""
    spec = moe(global_batch=16, max_micro_batch=1, memory_cap_bytes=120 << 30, max_idle=1)
    chosen = plan(9, spec, ranks_per_node=9)
    assert (chosen.idle, chosen.world_size, chosen.rounds) == (1, 8, 2)


def test_memory_forces_shards() -> None:
    roomy = price(16, moe(), ranks_per_node=8)
    tight = price(16, moe(memory_cap_bytes=80 << 30), ranks_per_node=8)
    assert tight.memory_bytes <= 80 << 30 < roomy.memory_bytes
    assert tight.plan.shard * tight.plan.expert > roomy.plan.shard * roomy.plan.expert


@pytest.mark.parametrize("fits", range(1, 41))
def test_the_largest_micro_batch_that_fits_memory(fits: int) -> None:
    """Each round gathers the parameters again, so of all that fit the plan has the fewest rounds."""
    spec = moe(global_batch=80, shard=2, latency_s=100.0)
    of_rounds = {
        -(-40 // micro_batch): memory_bytes(MeshPlan(1, 2, 1, 0, micro_batch, -(-40 // micro_batch)), spec)
        for micro_batch in range(40, 0, -1)  # the smallest of each number of rounds is the last
    }
    cap_bytes = memory_bytes(MeshPlan(1, 2, 1, 0, fits, math.ceil(40 / fits)), spec)
    fewest = min(rounds for rounds, need_bytes in of_rounds.items() if need_bytes <= cap_bytes)
    assert plan(2, spec.replace(memory_cap_bytes=cap_bytes), ranks_per_node=2).rounds == fewest


def test_a_live_copy_is_preferred_among_equals() -> None:
    spec = moe(**FREE_COMMUNICATION, expert=2)
    assert plan(4, spec, ranks_per_node=2).replicate == 2
    assert plan(8, spec, ranks_per_node=2).replicate == 4


@given(replicate=st.integers(1, 6), shard=st.integers(1, 6), expert=st.integers(1, 4), ranks_per_node=nodes)
@settings(max_examples=200, deadline=None)
def test_what_a_lost_node_costs(replicate: int, shard: int, expert: int, ranks_per_node: int | list[int]) -> None:
    mesh = MeshPlan(replicate, shard, expert, 0, 1, 1)
    if slots(ranks_per_node, mesh.world_size) < mesh.world_size:
        return
    num_nodes = len({node_of_rank(ranks_per_node, rank) for rank in range(mesh.world_size)})
    expected = NodeLoss.PEER_SAVE if num_nodes > 1 else NodeLoss.CHECKPOINT
    if is_held_elsewhere(mesh, ranks_per_node):
        expected = NodeLoss.NO_STEP
    assert node_loss(mesh, ranks_per_node) is expected


def test_replicas_across_nodes_are_preferred_among_equals() -> None:
    """Seven ranks fit memory as one replica only, six as three; six sequences take as long on either."""
    spec = moe(**FREE_COMMUNICATION, num_experts=0, expert_params=0, global_batch=6, max_micro_batch=1)
    cap_bytes = memory_bytes(MeshPlan(3, 2, 1, 0, 1, 1), spec)
    spec = spec.replace(memory_cap_bytes=cap_bytes)
    assert plan(7, spec, ranks_per_node=[4, 3]) == MeshPlan(1, 7, 1, 0, 1, 1)
    assert plan(7, spec.replace(max_idle=1), ranks_per_node=[4, 3]) == MeshPlan(3, 2, 1, 1, 1, 1)


@pytest.mark.parametrize(("world_size", "cap_gib"), [(3, 300), (5, 200), (7, 200)])
def test_a_world_that_divides_no_experts_holds_them_unevenly(world_size: int, cap_gib: int) -> None:
    """Mixtral where memory is short: parts of unequal size need less of it than all experts gathered."""
    mesh = plan(world_size, moe(memory_cap_bytes=cap_gib << 30), ranks_per_node=8)
    assert (mesh.expert, mesh.idle) == (world_size, 0)
    with pytest.raises(Infeasible):
        plan(world_size, moe(memory_cap_bytes=cap_gib << 30, expert=1), ranks_per_node=8)


def test_uneven_parts_are_taken_where_they_are_faster() -> None:
    """Few tokens: then to gather all experts takes longer than the busiest rank's further rows."""
    spec = moe(global_batch=7, tokens_per_sample=64)
    found = price(7, spec, ranks_per_node=8)
    assert found.plan.expert == 7
    assert found.step_s < price(7, spec.replace(expert=1), ranks_per_node=8).step_s
    assert plan(7, moe(), ranks_per_node=8).expert == 1  # many tokens: there it is not


@pytest.mark.parametrize(
    ("world_size", "ranks_per_node", "spec", "reason"),
    [
        (0, 2, moe(), "no mesh for 0 slots: at least one is needed"),
        (6, 2, moe(expert=9), "no mesh for 6 slots: 9 expert-parallel ranks for 8 experts: some would never hold one"),
        (
            6,
            3,
            moe(expert=2),
            "no mesh for 6 slots: an expert group of 2 ranks would lie across two nodes",
        ),
        (7, 8, moe(shard=2), "no mesh for 7 slots: no 7 ranks can be laid out with shard = 2"),
        (
            7,
            8,
            moe(shard=4, expert=4, max_idle=2),
            "no mesh for 7 slots: no 5 to 7 ranks can be laid out with shard = 4, expert = 4",
        ),
        (
            1,
            8,
            moe(memory_cap_bytes=1 << 30),
            r"no mesh for 1 slot: the leanest needs \d\d\d\.\d\d GiB a rank and the limit is 1\.00 GiB",
        ),
    ],
)
def test_infeasible_says_why(world_size: int, ranks_per_node: int, spec: MeshSpec, reason: str) -> None:
    with pytest.raises(Infeasible) as caught:
        plan(world_size, spec, ranks_per_node=ranks_per_node)
    assert re.fullmatch(reason, str(caught.value))


@pytest.mark.parametrize(
    ("world_size", "spec", "idle"),
    [
        (7, moe(shard=2), 1),
        (24, moe(memory_cap_bytes=80 << 30, max_idle=3), 8),
        (24, moe(shard=16), 8),
        (1, moe(memory_cap_bytes=1 << 30), None),
        (8, moe(shard=16), None),
    ],
)
def test_how_many_slots_would_have_to_stay_idle(world_size: int, spec: MeshSpec, idle: int | None) -> None:
    with pytest.raises(Infeasible):
        plan(world_size, spec, ranks_per_node=8)
    assert idle_to_fit(world_size, spec, 8) == idle
    if idle is not None:
        assert plan(world_size, spec.replace(max_idle=idle), ranks_per_node=8).idle == idle


def test_nodes_of_different_sizes() -> None:
    """Boundaries at 4 and 6 allow pairs, not fours; a single larger node allows them again."""
    with pytest.raises(Infeasible, match="an expert group of 4 ranks would lie across two nodes"):
        plan(8, moe(expert=4), ranks_per_node=[4, 2, 2])
    assert plan(8, moe(expert=2), ranks_per_node=[4, 2, 2]).expert == 2
    assert plan(8, moe(expert=4), ranks_per_node=[4, 4]).expert == 4
    assert plan(8, moe(expert=8), ranks_per_node=[4, 2, 2]).expert == 8  # larger than every node: must cross


def test_json_round_trip() -> None:
    mesh = MeshPlan(replicate=2, shard=1, expert=2, idle=1, micro_batch=4, rounds=3)
    assert MeshPlan.from_json(mesh.to_json()) == mesh
    assert mesh.to_json() == '{"replicate":2,"shard":1,"expert":2,"idle":1,"micro_batch":4,"rounds":3}'
    assert str(mesh) == "replicate 2 x shard 1 x expert 2, 1 idle"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"replicate":2}',
        '{"replicate":0,"shard":1,"expert":1,"idle":0,"micro_batch":1,"rounds":1}',
        '{"replicate":true,"shard":1,"expert":1,"idle":0,"micro_batch":1,"rounds":1}',
        '{"replicate":1,"shard":1.0,"expert":1,"idle":0,"micro_batch":1,"rounds":1}',
        '{"replicate":1,"shard":1,"expert":1,"idle":0,"micro_batch":1,"rounds":1,"more":1}',
    ],
)
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"mesh plan|MeshPlan"):
        MeshPlan.from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [("global_batch", 0), ("num_experts", -1), ("expert", 0), ("flops_per_s", 0.0), ("latency_s", math.inf)],
)
def test_a_spec_names_its_bad_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"MeshSpec.{field} is {value}"):
        moe(**{field: value})
