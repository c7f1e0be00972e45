"""Who computes which rows of hot experts: decided from counts alone."""

from __future__ import annotations

import random

import pytest

from launcher import MeshSpec, memory_use, step_time
from launcher.rounds.guests import Itinerary, ShareRule, Sharing, copy_rows, share_rows, spread_rows
from launcher.rounds.mesh import MeshPlan

LEVEL = ShareRule(guests=1, copy_rows=0)


def test_a_hot_expert_is_computed_by_the_idlest_rank_too() -> None:
    sharing = share_rows([800, 100, 50, 50], 2, LEVEL)
    assert sharing == Sharing(
        guests=((), (0,)), quotas={0: {0: 400, 1: 400}}, owned_rows=900, busiest_rows=500, most_copies=1
    )
    assert sharing.num_copies == 1


def test_level_loads_are_left_alone() -> None:
    sharing = share_rows([100] * 8, 4, ShareRule(2, 0))
    assert not sharing.num_copies
    assert sharing.busiest_rows == sharing.owned_rows == 200


@pytest.mark.parametrize(("copy_rows", "num_copies"), [(0, 3), (150, 3), (199, 3), (201, 0)])
def test_a_copy_is_made_where_its_rows_outweigh_it(copy_rows: float, num_copies: int) -> None:
    assert share_rows([800, 0, 0, 0], 4, ShareRule(1, copy_rows)).num_copies == num_copies


def test_moves_that_pay_for_themselves_only_together_are_not_stopped_at_the_first() -> None:
    # Both owners are as busy: that only one of them gives saves nothing, and both together do.
    assert share_rows([300, 300, 0, 0], 4, ShareRule(1, 100)).num_copies == 2


def test_a_move_that_leaves_another_rank_as_busy_is_not_made() -> None:
    assert not share_rows([300, 300, 0], 3, ShareRule(1, 50)).num_copies


def test_ranks_that_share_cores_gain_nothing_by_level_loads() -> None:
    assert not share_rows([800, 100, 50, 50], 2, ShareRule(1, 0, num_parallel=1)).num_copies
    assert share_rows([800, 100, 50, 50], 4, ShareRule(1, 0, num_parallel=2)).busiest_rows == 500


def test_experts_that_do_not_divide_are_levelled() -> None:
    assert share_rows([100] * 5, 2, LEVEL).busiest_rows == 250
    assert share_rows([90] * 8, 3, LEVEL).busiest_rows == 270  # one rank can take from one of the others only
    assert share_rows([90] * 8, 3, ShareRule(2, 0)).busiest_rows == 240


def test_a_rank_without_experts_takes_guests_and_gives_none() -> None:
    sharing = share_rows([100, 50], 3, LEVEL)
    assert sharing.guests == ((), (), (0,))
    assert sharing.busiest_rows == 50


def test_rows_stay_at_home_where_they_can() -> None:
    assert spread_rows([10, 20, 30], {1: 25, 2: 35}) == [{1: 5, 2: 5}, {1: 20}, {2: 30}]


@pytest.mark.parametrize(("num_ranks", "num_experts"), [(2, 5), (3, 8), (4, 2), (4, 64)])
def test_what_is_sent_is_what_is_expected(num_ranks: int, num_experts: int) -> None:
    draw = random.Random(num_experts)
    for _ in range(50):
        counts = [[int(1000 * draw.random() ** 6) for _ in range(num_experts)] for _ in range(num_ranks)]
        load = [sum(of_expert) for of_expert in zip(*counts, strict=True)]
        sharing = share_rows(load, num_ranks, ShareRule(draw.choice([0, 1, 3]), draw.choice([0, 1, 50, 500])))
        ways = [Itinerary.of(counts, sharing, rank) for rank in range(num_ranks)]
        assert sharing.busiest_rows == max(sum(map(sum, way.received)) for way in ways) <= sharing.owned_rows
        for rank, way in enumerate(ways):
            ends = 0
            for start, length in sorted(run for run in way.runs if run[1]):
                assert start == ends  # each row goes somewhere, and once
                ends += length
            assert ends == sum(counts[rank]) == sum(way.sent)
            assert [sum(of_source) for of_source in way.received] == [other.sent[rank] for other in ways]
            assert way.copies_taken == [other.copies_sent[rank] for other in ways]
        if sharing.num_copies:
            assert sharing.busiest_rows < sharing.owned_rows


SPEC = MeshSpec(
    global_batch=8,
    num_experts=5,
    dense_params=10**6,
    expert_params=5 * 3 * 2 * 512 * 1024,
    num_layers=2,
    model_dim=512,
    ffn_dim=1024,
    tokens_per_sample=4096,
    activation_bytes=4,
)


def test_a_copy_is_worth_more_rows_where_links_are_slow() -> None:
    near, far = (copy_rows(SPEC, speed) for speed in (SPEC.intra_node_bytes_per_s, SPEC.inter_node_bytes_per_s))
    assert far > 4 * near
    assert near == pytest.approx(4 * 3e14 * (2 / 2e11 + 12 / 2.5e12) / 6)


def test_the_planner_prices_guests_of_uneven_parts() -> None:
    mesh = MeshPlan(1, 1, 2, 0, micro_batch=4, rounds=1)
    plain = step_time(mesh, SPEC, ranks_per_node=2)
    shared = step_time(mesh, SPEC.replace(expert_replicas=1), ranks_per_node=2)
    assert shared.compute < plain.compute
    assert shared.total < plain.total
    slow = SPEC.replace(expert_replicas=1, intra_node_bytes_per_s=1e8)  # no copy pays, and none is made
    assert step_time(mesh, slow, ranks_per_node=2) == step_time(mesh, slow.replace(expert_replicas=0), ranks_per_node=2)


def test_memory_has_room_for_guests_where_there_are_expert_ranks() -> None:
    shared = SPEC.replace(expert_replicas=2)
    split, alone = MeshPlan(1, 1, 2, 0, 4, 1), MeshPlan(2, 1, 1, 0, 4, 1)
    more = memory_use(split, shared).activations - memory_use(split, SPEC).activations
    assert more == 2 * 2 * 3 * 512 * 1024 * 4  # layers x guests x parameters x bytes
    assert memory_use(alone, shared) == memory_use(alone, SPEC)
