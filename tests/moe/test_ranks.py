"""The harness itself: a rank that fails is named, and no process stays behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailure, Ranks


def world_sum(value: int) -> int:
    total = torch.tensor(value * dist.get_rank())
    dist.all_reduce(total)
    return int(total)


def fail_on_1() -> None:
    if dist.get_rank() == 1:
        raise ZeroDivisionError("on purpose")
    dist.barrier()


def die_on_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    time.sleep(3600)


def hang_on_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(3600)


@pytest.fixture
def pool() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


def test_results_come_by_rank(pool: Ranks) -> None:
    assert pool.run(world_sum, 2, world_size=3) == [6, 6, 6]
    assert pool.run(dist.get_rank, world_size=2) == [0, 1]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fail_on_1, "rank 1 of 2:\n(?s:.*)ZeroDivisionError: on purpose"),
        (die_on_1, "rank 1 of 2 died"),
        (hang_on_1, r"no answer in time from ranks \[(0, )?1\] of 2"),
    ],
)
def test_a_failed_rank_is_named_and_all_end(pool: Ranks, function: Callable[[], None], message: str) -> None:
    pids = pool.run(os.getpid, world_size=2)
    with pytest.raises(RankFailure, match=message):
        pool.run(function, world_size=2, timeout_s=4 if function is hang_on_1 else 60)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert pool.run(world_sum, 1, world_size=2) == [1, 1]


def leave_a_variable() -> str | None:
    before = os.environ.get("LEFT_BY_A_TEST")
    os.environ["LEFT_BY_A_TEST"] = "yes"
    return before


def test_what_a_run_leaves_in_the_environment_is_gone_in_the_next(ranks: Ranks) -> None:
    assert [ranks.run(leave_a_variable, world_size=1) for _ in range(2)] == [[None], [None]]
