"""The live state of several ranks: captured in the middle of a step, or while a collective hangs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import Ranks
from tests.storage import live_cases


@pytest.mark.parametrize("shape", [(2,), (1, 2)], ids=["fsdp", "hsdp"])
def test_a_capture_in_the_middle_of_a_step(ranks: Ranks, shape: tuple[int, ...]) -> None:
    """FSDP2 shows whole parameters then; what is copied are the shards after the last complete step."""
    assert ranks.run(live_cases.captures_within_a_step, shape, world_size=2) == [[True] * 4] * 2


def test_a_capture_while_a_collective_hangs(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(live_cases.captures_while_it_hangs, str(tmp_path), world_size=2) == [[1], []]


def test_a_step_is_applied_beside_a_training_that_waits_for_a_peer(ranks: Ranks, tmp_path: Path) -> None:
    """Both states are staged, before and after it; where the peer comes after all, nothing is applied twice."""
    waiting, late = [[2], [1, 2], [True, True], [2]], [[], [], [], [2]]
    expected = [waiting, waiting, late, late]
    assert ranks.run(live_cases.captures_at_the_door, str(tmp_path), world_size=4) == expected


def test_every_part_says_what_all_ranks_hold(ranks: Ranks) -> None:
    told = ranks.run(live_cases.tells_what_all_hold, world_size=4)
    attempts, numbers, sizes, shapes, values = zip(*told, strict=True)
    assert len(set(attempts)) == 1
    assert attempts[0].step == 1
    assert attempts[0].world_size == 4
    assert numbers == (0, 1, 2, 3)
    assert all(each == shapes[0] for each in shapes)
    assert all("step" in each for each in values)
    for name, shape in shapes[0].items():
        whole = 1
        for length in shape:
            whole *= length
        if name.endswith(".step"):
            continue
        assert sizes[0].get(name, 0) + sizes[1].get(name, 0) == whole  # a replica by itself
        assert sizes[2].get(name, 0) + sizes[3].get(name, 0) == whole


def test_a_rank_that_cannot_note_its_state_keeps_nobody_waiting(ranks: Ranks) -> None:
    of_rank = ranks.run(live_cases.one_rank_cannot, world_size=2)
    (events_0, outcomes_0), (events_1, outcomes_1) = of_rank
    assert [name for name, _ in events_1] == ["checkpoint_live_off"]
    assert "state 'odd.x' is a function that cannot be saved" in events_1[0][1]["reason"]
    assert outcomes_0 == ["another rank cannot note its state"] * 2 + [3, "another rank cannot note its state"]
    assert events_0[-1] == ("checkpoint_live_off", {"reason": "another rank cannot note its state"})
    assert all("odd" in text for text in outcomes_1)


def test_the_same_step_after_a_restore_is_another_attempt() -> None:
    rank = live_cases.Rank(())
    found = []
    for _ in range(2):
        rank.live.note(1, rank.state)
        found.append(rank.live.capture(60.0))
        rank.live.forget("a restore has begun")
    rank.live.close(rescue=False)
    assert found == [1, 1]
    assert len({part.attempt.id for part in rank.parts}) == 2


def test_a_state_that_grows_is_agreed_on_anew_by_the_next_save(ranks: Ranks) -> None:
    changed = "the state has other tensors than when the ranks agreed on it: the next save tells"
    expected = [1, changed, 3, 4, True, "step 5 is not healthy"]
    assert ranks.run(live_cases.the_state_grows, world_size=2) == [expected] * 2
