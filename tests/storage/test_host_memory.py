"""Ranks of one host read from each other's memory, and send what they cannot read."""

from __future__ import annotations

import numpy as np
import pytest

from storage.loading.host_memory import read_memory
from tests.ranks import Ranks
from tests.storage import exchange_cases as cases

TOKEN_SIZE_BYTES = 16
OF_A_RANK_BYTES = cases.NUM_TENSORS * cases.ROWS * cases.COLUMNS * 4 // 2
MANY = 10**9


@pytest.fixture(scope="module")
def url(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    ranks.run(cases.save_large, str(folder), "rows of 2", world_size=2)
    return f"{folder}/step-000000001"


def test_half_of_what_each_of_two_replicas_needs_comes_out_of_the_others_memory(ranks: Ranks, url: str) -> None:
    for num_bytes, lines, error in ranks.run(cases.neighbouring, url, "hsdp 2x2", MANY, False, world_size=4):
        assert OF_A_RANK_BYTES * 0.4 < num_bytes < OF_A_RANK_BYTES * 0.6
        assert not lines
        assert not error


def test_ranks_that_may_not_read_are_sent_everything_and_say_so(ranks: Ranks, url: str) -> None:
    for num_bytes, (line,), error in ranks.run(cases.neighbouring, url, "hsdp 2x2", 0, False, world_size=4):
        assert (num_bytes, error) == (0, "")
        assert line.endswith("on this host cannot be read (Operation not permitted); they send instead")


@pytest.mark.parametrize("layout", ["hsdp 2x2", "columns of 4"])
def test_a_read_that_fails_half_way_is_sent_instead(ranks: Ranks, url: str, layout: str) -> None:
    for num_bytes, lines, error in ranks.run(cases.neighbouring, url, layout, 5, False, world_size=4):
        assert num_bytes > 3 * TOKEN_SIZE_BYTES
        assert lines
        assert all("cannot be read any more (Operation not permitted)" in line for line in lines)
        assert not error


def test_what_comes_from_another_rank_by_the_network_is_verified(ranks: Ranks, url: str) -> None:
    first, second = ranks.run(cases.neighbouring, url, "replicated on 2", 0, True, world_size=2)
    assert first[2] == second[2]
    assert ".distcp is damaged: checksum at byte " in first[2]


def test_a_rank_that_dies_while_it_is_read_fails_the_others_and_none_waits(ranks: Ranks, url: str) -> None:
    raised = ranks.run_losing([1], cases.lose, url, 1, world_size=2, timeout_s=60)
    assert raised[0] not in ("nothing", None)


def test_memory_of_nobody_is_an_error() -> None:
    with pytest.raises(ProcessLookupError):
        read_memory(2**22 + 1, 4096, np.zeros(4, np.uint8))  # beyond the highest process number of Linux
