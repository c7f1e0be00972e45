"""Ranks that take unequally long before the first step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from elastic_moe.errors import UserError
from elastic_moe.trainer import meeting
from elastic_moe.trainer.meeting import meanwhile
from tests.cluster import until
from tests.ranks import RankFailure, Ranks


class Signs(SimpleNamespace):
    num_signs = 0

    def alive(self) -> None:
        self.num_signs += 1


def wait_for_rank_1(num_signs: int) -> tuple[str, int]:
    """What this rank found, and how often it has said that it is alive; rank 1 does so before each of its meetings."""
    own, meetings, meet = Signs(), [0], dist.all_reduce

    def counted(told: torch.Tensor) -> None:
        meet(told)
        meetings[0] += 1

    def slow() -> str:
        for number in range(num_signs if dist.get_rank() == 1 else 0):
            own.alive()
            until("a meeting", lambda number=number: meetings[0] > number, 60)
        return f"rank {dist.get_rank()}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "_EVERY_S", 0.05)
        patch.setattr(meeting, "worker", own)
        patch.setattr(meeting, "dist", SimpleNamespace(all_reduce=counted))
        return meanwhile(slow), own.num_signs


def test_those_who_wait_are_alive_as_long_as_the_other_is(ranks: Ranks) -> None:
    """Also two of them: they do not keep each other alive."""
    found = ranks.run(wait_for_rank_1, 5, world_size=3)
    assert [name for name, _ in found] == ["rank 0", "rank 1", "rank 2"]
    for rank in (0, 2):
        assert 1 <= found[rank][1] <= 6


def refuse(on_rank: int) -> None:
    def call() -> None:
        if dist.get_rank() == on_rank:
            raise UserError("no such data")

    meanwhile(call)


def test_a_mistake_is_told_by_the_rank_that_found_it() -> None:
    pool = Ranks()
    try:
        with pytest.raises(RankFailure, match=r"rank 1 of 2:\n(?s:.*)no such data"):
            pool.run(refuse, 1, world_size=2)
    finally:
        pool.close()
