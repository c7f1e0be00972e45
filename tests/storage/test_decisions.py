"""The pure decisions: who writes what, what is removed, who may claim."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import Fenced
from storage.run.owner import Owner, next_owner
from storage.run.retention import Removal, StepState, choose_kept, decide, newer_steps
from storage.saving.saveplan import Chunk, Share, assign, dump_share, load_share
from storage.saving.writing import OBJECT_SIZE_BYTES, SMALL_ITEM_BYTES, pack


def shard(key: str, start: int, rows: int, of: int) -> Chunk:
    return Chunk(key, (key,), (start, 0), (rows, 2), (of, 2), "float32", rows * 8)


def value(key: str) -> Chunk:
    return Chunk(key, (key, 0), None, None, None, "", 0)


def test_every_piece_is_written_once_and_the_load_is_even() -> None:
    held = [[value("v"), *(shard(f"t{index}", 0, 4, 4) for index in range(8))] for _ in range(4)]
    picks = assign(held)
    written = sorted(held[rank][position].key for rank, pick in enumerate(picks) for position in pick)
    assert written == sorted(["v", *(f"t{index}" for index in range(8))])
    assert 0 in picks[0]
    assert [len([p for p in pick if held[rank][p].sizes]) for rank, pick in enumerate(picks)] == [2, 2, 2, 2]


def test_replicas_share_their_shards() -> None:
    held = [[shard("w", 0, 2, 4)], [shard("w", 2, 2, 4)], [shard("w", 0, 2, 4)], [shard("w", 2, 2, 4)]]
    assert sorted(map(len, assign(held))) == [0, 0, 1, 1]


def test_chunks_without_elements_are_not_written() -> None:
    assert assign([[shard("w", 0, 3, 3)], [shard("w", 3, 0, 3)]]) == [[0], []]
    assert assign([[shard("e", 0, 0, 0)], [shard("e", 0, 0, 0)]]) == [[], []]


@pytest.mark.parametrize(
    "held",
    [
        [[shard("w", 0, 2, 4)], []],
        [[shard("w", 0, 2, 4)], [shard("w", 2, 2, 5)]],
        [[shard("w", 0, 4, 4)], [value("w")]],
        [[shard("w", 0, 4, 4)], [Chunk("w", ("w",), (0, 0), (4, 2), (4, 2), "bfloat16", 16)]],
    ],
)
def test_a_state_that_does_not_fit_together_is_refused(held: list[list[Chunk]]) -> None:
    with pytest.raises(ValueError, match="'w'"):
        assign(held)


def test_pieces_survive_the_wire() -> None:
    pieces = (shard("w", 0, 2, 4), value("v"))
    assert load_share(dump_share(Share(pieces))) == Share(pieces)


@given(st.lists(st.one_of(st.integers(1, 3 * SMALL_ITEM_BYTES), st.integers(1, 2 * OBJECT_SIZE_BYTES)), max_size=40))
@settings(deadline=None)
def test_pack_keeps_small_items_together_and_objects_bounded(lengths: list[int]) -> None:
    objects = pack(lengths)
    assert sorted(index for group in objects for index in group) == list(range(len(lengths)))
    for group in objects:
        assert sum(lengths[index] for index in group) <= OBJECT_SIZE_BYTES or len(group) == 1
    small = [length for length in lengths if length < SMALL_ITEM_BYTES]
    touched = [group for group in objects if any(lengths[index] < SMALL_ITEM_BYTES for index in group)]
    assert len(touched) == math.ceil(sum(small) / OBJECT_SIZE_BYTES)


def state(
    step: int, committed: str | None = None, attempts: str = "", quarantined: bool = False, healthy: bool = True
) -> StepState:
    seen = frozenset(attempts + (committed or ""))
    return StepState(step, committed is not None, quarantined, committed, seen, healthy=healthy)


def test_the_newest_commits_stay() -> None:
    states = [state(step, "a") for step in (1, 2, 3, 4)]
    assert decide(states, 2, ()) == [Removal(1, None), Removal(2, None)]
    assert decide(states, 9, ()) == []


def test_the_step_just_saved_stays_wherever_it_is() -> None:
    states = [state(1, "a"), state(2, "a"), state(3, "a"), state(4, "a")]
    assert decide(states, 1, (), 2) == [Removal(1, None), Removal(3, None)]
    assert decide(states, 1, (), 4) == decide(states, 1, ())
    assert (newer_steps(states, 2), newer_steps(states, 4)) == ((3, 4), ())


def test_unhealthy_steps_push_out_no_healthy_one() -> None:
    states = [state(1, "a"), state(2, "a"), *(state(step, "a", healthy=False) for step in (3, 4, 5, 6))]
    assert [removal.step for removal in decide(states, 1, (), 6)] == [1, 3, 4, 5]
    assert [removal.step for removal in decide(states, 2, (), 6)] == [3, 4]
    assert (newer_steps(states, 1), newer_steps(states, 2)) == ((2,), ())


def test_nothing_goes_before_something_is_committed() -> None:
    assert decide([state(1, None, "ab"), state(2, None, "c")], 1, ()) == []


def test_dead_attempts_go_live_ones_stay() -> None:
    states = [state(1, None, "a"), state(2, "b", "cd"), state(3, None, "ef")]
    assert decide(states, 3, {"d", "e"}) == [
        Removal(1, None),
        Removal(2, frozenset("c")),
        Removal(3, frozenset("f")),
    ]
    assert decide([state(1, None, "a"), state(2, "b")], 1, {"a"}) == []


def test_quarantined_data_stays_until_it_is_old() -> None:
    states = [state(1, None, "a", quarantined=True), state(2, "b"), state(3, None, "c", quarantined=True)]
    assert decide(states, 2, ()) == [Removal(1, None)]


def test_stock_checkpoints_keep_all_their_folders() -> None:
    stock = StepState(2, True, False, None, frozenset("x"))
    assert decide([stock], 1, ()) == []


@given(
    st.lists(
        st.builds(
            state,
            st.integers(0, 9),
            st.one_of(st.none(), st.sampled_from("abc")),
            st.text("defgh", max_size=3),
            st.booleans(),
            st.booleans(),
        ),
        max_size=8,
        unique_by=lambda s: s.step,
    ),
    st.integers(1, 4),
    st.sets(st.sampled_from("defgh")),
    st.integers(0, 9),
)
@settings(deadline=None)
def test_retention_never_touches_what_counts(states: list[StepState], keep: int, live: set[str], saved: int) -> None:
    newest = sorted((s.step for s in states if s.committed), reverse=True)[:keep]
    healthy = sorted((s.step for s in states if s.committed and s.healthy), reverse=True)[:keep]
    kept = {*newest, *healthy}
    assert choose_kept(states, keep) == kept
    by_step = {s.step: s for s in states}
    for removal in decide(states, keep, live, saved):
        if removal.attempts is None:
            assert removal.step != saved
            assert removal.step not in kept
            assert removal.step < min(kept) or by_step[removal.step].committed
            assert not by_step[removal.step].attempts & live
        else:
            assert not removal.attempts & live
            assert by_step[removal.step].attempt not in removal.attempts


def test_claims_count_up_and_generations_do_not_go_back() -> None:
    def wanted(lineage: str, generation: int, token: str = "t2", epoch: int = 0) -> Owner:
        return Owner(lineage=lineage, generation=generation, epoch=epoch, token=token)

    first = next_owner(None, wanted("launch-a", 3, "t1"))
    assert (first.epoch, first.generation) == (1, 3)
    assert next_owner(first, wanted("launch-a", 3)).epoch == 2
    assert next_owner(first, wanted("launch-a", 4)).generation == 4
    assert next_owner(first, wanted("launch-b", 0)) == wanted("launch-b", 0, epoch=2)
    with pytest.raises(Fenced, match="generation 2"):
        next_owner(first, wanted("launch-a", 2))
