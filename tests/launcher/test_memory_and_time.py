"""What the planner says of a rank's memory and a step's time, term by term."""

from __future__ import annotations

import dataclasses

import pytest

from elastic_moe.cli import plan
from launcher.rounds.memory import memory_use
from launcher.rounds.mesh import Infeasible, MeshPlan, price
from launcher.rounds.speed import step_time

GIB = 1 << 30
# In bf16, whole sequences kept.
MIXTRAL = dataclasses.replace(plan.mixtral(), global_batch=256, recompute=False, memory_cap_bytes=None)


def mesh(replicate: int = 1, shard: int = 1, expert: int = 1, micro_batch: int = 1, rounds: int = 1) -> MeshPlan:
    return MeshPlan(replicate, shard, expert, 0, micro_batch, rounds)


def test_parameters_and_moments_are_shards() -> None:
    whole, part = memory_use(mesh(), MIXTRAL), memory_use(mesh(1, 4, 8), MIXTRAL)
    total = MIXTRAL.dense_params + MIXTRAL.expert_params
    assert whole.params == 4 * total and whole.optimizer == 8 * total
    assert (part.params, part.optimizer) == (4 * total // 32, 8 * total // 32)
    assert memory_use(mesh(4, 1, 8), MIXTRAL).params == 4 * (MIXTRAL.dense_params // 8 + MIXTRAL.expert_params // 8)


def test_gradients_of_several_rounds_are_whole() -> None:
    """Only the last round's are reduced: until then a rank holds those of all that it computes with, in fp32."""
    one, two = (memory_use(mesh(1, 4, 8, rounds=rounds), MIXTRAL) for rounds in (1, 2))
    whole = 4 * (MIXTRAL.dense_params + MIXTRAL.expert_params // 8)
    assert two.gradients >= whole > one.gradients
    exact = memory_use(mesh(1, 4, 8, rounds=2), MIXTRAL.replace(reduce_bytes=8))
    assert exact.gradients >= 2 * whole


def test_logits_are_counted() -> None:
    spec = MIXTRAL.replace(vocab_size=1 << 20, num_layers=1, expert_params=0, num_experts=0)
    logits_bytes = 4096 * (1 << 20) * (2 + 3 * 4)
    assert memory_use(mesh(1, 32), spec.replace(dense_params=1 << 20)).logits == logits_bytes


def test_layers_that_are_computed_again_keep_their_input() -> None:
    kept, again = (memory_use(mesh(1, 4, 8, 4), MIXTRAL.replace(recompute=flag)) for flag in (False, True))
    inputs = 4 * 4096 * 4096 * 2 * 32
    of_layer = kept.activations / 32
    assert of_layer < again.activations <= inputs + of_layer < kept.activations / 10


def test_gathered_layers() -> None:
    """The root, and one layer; all of them where they stay gathered."""
    once = memory_use(mesh(1, 4, 8), MIXTRAL)
    kept = memory_use(mesh(1, 4, 8), MIXTRAL.replace(keep_gathered=True))
    dense, experts = MIXTRAL.layer_dense_params, MIXTRAL.layer_expert_params / 8
    assert once.gathered == pytest.approx(2 * (MIXTRAL.root_params + dense + experts), rel=1e-6)
    assert kept.gathered == pytest.approx(2 * (MIXTRAL.root_params + 32 * (dense + experts)), rel=1e-6)


def test_what_does_not_fit_is_not_offered() -> None:
    spec = MIXTRAL.replace(memory_cap_bytes=80 * GIB, recompute=True)
    for slots in (16, 32, 64, 128):
        assert price(slots, spec, ranks_per_node=8).memory_bytes <= 80 * GIB
    with pytest.raises(Infeasible) as caught:
        price(8, spec, ranks_per_node=8)
    leanest = caught.value.leanest
    assert leanest is not None and leanest.memory_bytes > 80 * GIB
    assert f"{leanest.memory_bytes / GIB:.2f} GiB" in str(caught.value)


def test_ranks_that_share_cores_take_turns() -> None:
    alone = step_time(mesh(8), MIXTRAL, ranks_per_node=8)
    shared = step_time(mesh(8), MIXTRAL.replace(cores_per_node=2), ranks_per_node=8)
    assert all(dataclasses.asdict(shared)[name] >= 4 * of_one for name, of_one in dataclasses.asdict(alone).items())
    waits = shared.replicas - 4 * alone.replicas  # of each of 8, for 14 others in turn, who share a core with 3
    assert waits == pytest.approx((2 * MIXTRAL.num_layers + 1) * 14 * 3 * 1.5e-3)  # routers in fp32 are apart
    parted = step_time(mesh(1, 1, 8), MIXTRAL.replace(cores_per_node=2), ranks_per_node=8)
    waits = parted.exchange - 4 * step_time(mesh(1, 1, 8), MIXTRAL, ranks_per_node=8).exchange
    assert waits == pytest.approx(5 * MIXTRAL.num_layers * 3 * 1.5e-3)
    apart = step_time(mesh(8), MIXTRAL.replace(cores_per_node=2), ranks_per_node=2)
    assert apart.compute == alone.compute


def test_every_replica_updates_all_that_it_holds() -> None:
    """On a machine whose memory is slow, replicas cost more than shards."""
    spec = MIXTRAL.replace(memory_bytes_per_s=1e9)
    assert step_time(mesh(8), spec, ranks_per_node=8).optimizer == pytest.approx(
        8 * step_time(mesh(1, 8), spec, ranks_per_node=8).optimizer
    )


def test_terms_of_a_step() -> None:
    once, twice = (step_time(mesh(2, 2, 2, rounds=rounds), MIXTRAL, ranks_per_node=8) for rounds in (1, 2))
    for name, value in dataclasses.asdict(once).items():
        factor = 1 if name in ("reduce", "replicas", "optimizer") else 2
        assert value > 0 and dataclasses.asdict(twice)[name] == pytest.approx(factor * value), name
    again = step_time(mesh(2, 2, 2), MIXTRAL.replace(recompute=True), ranks_per_node=8)
    assert again.compute == pytest.approx(once.compute * 4 / 3)
    rows_s = (again.exchange - once.exchange) / MIXTRAL.num_layers  # how many, there and back
    assert rows_s == pytest.approx(once.exchange / MIXTRAL.num_layers / 2, rel=0.05)


@pytest.mark.parametrize(("changes", "num_layers"), [({}, 2 * 2 * 32 - 2), ({"keep_gathered": True}, 32)])
def test_the_last_layer_stays_gathered_from_the_forward_pass_to_the_backward_one(
    changes: dict[str, bool], num_layers: int
) -> None:
    spec = MIXTRAL.replace(vocab_size=0, reduce_bytes=MIXTRAL.activation_bytes)
    assert spec.num_layers == 32
    step = step_time(mesh(2, 2, 2, rounds=2), spec.replace(**changes), ranks_per_node=8)
    assert step.gather == pytest.approx(num_layers / 32 * step.reduce)


def test_counting_loads_first_gathers_once_more() -> None:
    plain, counts = (MIXTRAL.replace(vocab_size=0, counts_first=counts) for counts in (False, True))
    for rounds, more in ((1, 0), (2, 32 / 63)):
        few, many = (step_time(mesh(2, 2, 2, rounds=rounds), spec, ranks_per_node=8).gather for spec in (plain, counts))
        assert many == pytest.approx(few * (1 + more))


def test_routers_that_are_not_rounded_are_gathered_and_reduced_apart() -> None:
    rounded = MIXTRAL.replace(hop_s=1e-15, latency_s=3600)
    whole = rounded.replace(activation_bytes=4)
    for name, gathers in (("gather", 2 * 32 - 1), ("reduce", 32)):
        apart, within = (getattr(step_time(mesh(1, 8), spec, ranks_per_node=8), name) for spec in (rounded, whole))
        assert round(apart / 3600) - round(within / 3600) == gathers


def test_what_passes_through_memory() -> None:
    """Twice gathered, read by both passes and their gradient written; once more for each further forward pass."""
    once, again, counts, kept = (
        step_time(mesh(1, 8, rounds=2), MIXTRAL.replace(**how), ranks_per_node=8).weights
        for how in ({}, {"recompute": True}, {"counts_first": True}, {"keep_gathered": True})
    )
    assert [again / once, counts / once, kept / once] == pytest.approx([8 / 7, 10 / 7, 8 / 14])


def test_exact_jobs_gather_experts_apart_and_in_float64() -> None:
    plain = MIXTRAL.replace(vocab_size=0, activation_bytes=4, hop_s=1e-15, latency_s=1e-15)
    exact = plain.replace(reduce_bytes=8)
    bytes_of = [4 * plain.dense_params + each * plain.expert_params for each in (4, 8)]
    few, many = (step_time(mesh(1, 8), spec, ranks_per_node=8).gather for spec in (plain, exact))
    assert many / few == pytest.approx(bytes_of[1] / bytes_of[0], rel=1e-3)
    for name, num_shards in (("gather", (1, 8)), ("reduce", (1, 8)), ("replicas", (8,))):
        few, many = (
            getattr(step_time(mesh(*num_shards), spec.replace(latency_s=3600), ranks_per_node=8), name)
            for spec in (plain, exact)
        )
        assert many / few == pytest.approx(2, rel=1e-3), name


SMALL = MIXTRAL.replace(
    model_dim=512, ffn_dim=1024, query_dim=512, key_dim=256, expert_params=8 * 8 * 3 * 512 * 1024, num_layers=8
).replace(dense_params=6_600_000, vocab_size=256, activation_bytes=4, tokens_per_sample=1)
ON_CPU = SMALL.replace(cores_per_node=2)


def test_on_cpus_layers_are_gathered_by_turns_for_good() -> None:
    layer = 4 * (SMALL.layer_dense_params + SMALL.layer_expert_params)
    root = 4 * SMALL.root_params
    assert memory_use(mesh(), ON_CPU).gathered == pytest.approx(2 * layer + root, rel=1e-6)
    assert memory_use(mesh(), ON_CPU.replace(keep_gathered=True)).gathered == pytest.approx(8 * layer + root, rel=1e-6)
    two = ON_CPU.replace(num_layers=2, expert_params=SMALL.expert_params // 4, dense_params=SMALL.dense_params // 4)
    assert memory_use(mesh(), two).gathered == pytest.approx(2 * 4 * two.layer_expert_params, rel=0.1)


def test_on_cpus_what_a_step_has_taken_stays() -> None:
    """Shards of gradients beside whole ones of the rounds before the last, and both beside activations."""
    own = 4 * (SMALL.dense_params + SMALL.expert_params)
    once, rounds = (memory_use(mesh(rounds=rounds), ON_CPU) for rounds in (1, 2))
    assert (once.gradients, rounds.gradients) == pytest.approx((own, 2 * own), rel=1e-6)
    long = ON_CPU.replace(tokens_per_sample=4096, vocab_size=32_768)
    use = memory_use(mesh(), long)
    assert use.activations > 8 * 4096 * 512 * 4 and use.logits == 4096 * 32_768 * 16 and use.gradients == own


def test_on_cpus_ranks_exchange_through_two_slots() -> None:
    alone, shards, parts = (memory_use(mesh(1, *way), ON_CPU).working for way in ((1, 1), (2, 1), (1, 2)))
    dense, experts = 4 * SMALL.layer_dense_params, 4 * SMALL.layer_expert_params
    flat, slots = 2 * (dense + experts), 2 * (dense + experts) / 2
    root = 4 * SMALL.root_params
    assert shards - alone == pytest.approx(flat + root + slots, rel=1e-3)
    assert alone == pytest.approx(dense + experts + root + experts, rel=0.01)  # sent; gradients of a layer's experts
    # A part of the experts is no FSDP2 unit of several ranks: nobody gathers it.
    half = experts / 2
    assert parts == pytest.approx(dense + half + root + half + 2 * dense + root + dense + half, rel=0.01)


def test_a_reduction_holds_what_is_sent_and_what_comes_out() -> None:
    """Of a layer, whose parameters are gone; a rank alone sends nothing."""
    small = MIXTRAL.replace(activation_bytes=4, tokens_per_sample=1)
    experts, layer = 4 * small.layer_expert_params, 4 * (small.layer_expert_params + small.layer_dense_params)
    assert memory_use(mesh(), small).working == pytest.approx(experts + 2 * layer, rel=0.01)
    assert memory_use(mesh(1, 4), small).working == pytest.approx(experts + 1.25 * layer, rel=0.01)


def test_replicas_may_sum_their_gradients_by_a_slower_way() -> None:
    level = MIXTRAL.replace(latency_s=1e-9, hop_s=1e-9)
    slow = level.replace(replica_bytes_per_s=level.intra_node_bytes_per_s / 4)
    near, far = (step_time(mesh(8), level, ranks_per_node=size).replicas for size in (8, 1))
    assert step_time(mesh(8), slow, ranks_per_node=8).replicas == pytest.approx(4 * near, rel=1e-3)
    assert step_time(mesh(8), slow, ranks_per_node=1).replicas == far  # between nodes it goes by their links
    assert step_time(mesh(1, 8), slow, ranks_per_node=8) == step_time(mesh(1, 8), level, ranks_per_node=8)
