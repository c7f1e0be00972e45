"""Which rank keeps the others waiting."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.script.stragglers import WINDOW, Pace, find, pack, unpack
from tests.cluster import Cluster

STRAGGLES = str(Path(__file__).parent / "scripts" / "straggles.py")


def ranks_of(*figures: tuple[float, float]) -> list[int]:
    return [s.rank for s in find(figures)]


def test_a_slow_rank_is_found_by_arrival_or_by_work() -> None:
    assert ranks_of((1.0, 0.2), (1.0, 0.2), (2.0, 0.2)) == [2]
    assert ranks_of((1.0, 0.2), (1.0, 0.8), (1.0, 0.2)) == [1]
    (slow,) = find([(1.0, 0.2), (3.0, 0.2)])
    assert (slow.rank, slow.by, slow.factor, slow.step_s) == (1, "arrival", 3.0, 3.0)


def test_small_differences_and_what_costs_the_step_nothing_are_no_slowness() -> None:
    assert ranks_of((1.0, 0.2), (1.4, 0.2), (1.0, 0.2)) == []
    assert ranks_of((1.0, 0.002), (1.0, 0.02), (1.0, 0.002)) == [], "ten times the CPU, but two hundredths of the step"
    assert ranks_of((1.0, 0.2)) == ranks_of() == ranks_of((0.0, 0.0), (0.0, 0.0)) == []


def test_several_may_be_slow_as_long_as_most_are_not() -> None:
    assert ranks_of(*[(1.0, 0.1)] * 5, (2.0, 0.1), (1.0, 0.9)) == [5, 6]


def steps(pace: Pace, own_s: float, num: int, *, cpu_s: float = 0.0, busy_s: float | None = None) -> list[object]:
    found, now_s, used_s = [], 0.0, 0.0
    for _ in range(num):
        pace.leave(now_s, used_s)
        now_s, used_s = now_s + own_s, used_s + cpu_s
        if busy_s is not None:
            pace.tell_busy(busy_s)
        found.append(pace.arrive(now_s, used_s))
    return [f for f in found if f]


def test_a_window_ends_every_so_many_steps_and_one_long_step_in_it_says_nothing() -> None:
    pace = Pace()
    assert steps(pace, 1.0, WINDOW - 2, cpu_s=0.25) == []
    steps(pace, 500.0, 1)
    assert steps(pace, 1.0, 1, cpu_s=0.25) == [(1.0, 0.25)]
    assert steps(pace, 2.0, WINDOW, busy_s=1.5) == [(2.0, 1.5)]
    assert steps(pace, 2.0, WINDOW, cpu_s=0.5) == [(2.0, 0.5)], "a figure of the script's holds for its own step"


def test_what_ranks_exchange_is_gathered_by_a_maximum() -> None:
    told = [pack((1.0 + rank, 0.5), rank, 3) for rank in range(3)]
    assert unpack([max(values) for values in zip(*told, strict=True)]) == [(1.0, 0.5), (2.0, 0.5), (3.0, 0.5)]


@pytest.mark.slow
def test_workers_that_sleep_or_compute_longer_than_the_others_say_so(nodes: Cluster) -> None:
    node = nodes.start("only", STRAGGLES, nnodes="1:1", nproc=3)
    assert node.wait() == 0, node.output
    (sleeper,) = nodes.events("straggler", rank=1)
    assert (sleeper["by"], sleeper["num_steps"]) == ("arrival", WINDOW)
    assert sleeper["factor"] >= 1.5
    (computer,) = nodes.events("straggler", rank=2)
    assert (computer["by"], computer["node"]) == ("work", nodes.events("workers_started")[0]["node"])
    assert nodes.events("straggler_recovered", rank=1)
    assert not nodes.events("straggler", rank=0)
