"""Who fetches what several ranks need, against brute force: every byte once, and everybody gets all of theirs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.format.columns import Ints
from storage.loading.shareplan import SMALL_SHARE, Blocks, SharePlan, merged, plan_shares, received_ranges, should_share


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Ints], Blocks]:
    """Items that tile objects with gaps between them, and ranges of whole blocks that each rank needs."""
    starts, lengths, sizes = [], [], []
    end = 0
    for _ in range(draw(st.integers(1, 6))):
        end += draw(st.sampled_from([0, 0, 3]))
        lengths.append(draw(st.integers(1, 90)))
        sizes.append(draw(st.sampled_from([4, 8, 16, 100])))
        starts.append(end)
        end += lengths[-1]
    edges = [
        (start + low, min(start + low + size, start + length))
        for start, length, size in zip(starts, lengths, sizes, strict=True)
        for low in range(0, length, size)
    ]
    needs = []
    for _ in range(draw(st.integers(1, 5))):
        rows = []
        for _ in range(draw(st.integers(0, 4))):
            first = draw(st.integers(0, len(edges) - 1))
            last = draw(st.integers(first, min(first + 6, len(edges) - 1)))
            rows += edges[first : last + 1]
        needs.append(merged(np.array(rows, np.int64).reshape(-1, 2)))
    return needs, Blocks(np.array(starts), np.array(lengths), np.array(sizes))


def covered(ranges: Ints) -> set[int]:
    return {byte for start, stop in ranges.tolist() for byte in range(start, stop)}


@given(cases())
@settings(max_examples=200, deadline=None)
def test_merged_ranges_are_the_union(case: tuple[list[Ints], Blocks]) -> None:
    together = np.concatenate(case[0])
    union = merged(together)
    assert covered(union) == covered(together)
    assert (union[1:, 0] > union[:-1, 1]).all()


@given(cases(), st.sampled_from([1, 10, 40, 1000]), st.sampled_from([1, 50, 10000]), st.sampled_from([0, 20]))
@settings(max_examples=400, deadline=None)
def test_every_needed_byte_is_fetched_once_and_reaches_everyone(
    case: tuple[list[Ints], Blocks], part_size: int, round_size: int, small_size: int
) -> None:
    needs, blocks = case
    plan = plan_shares(
        needs, blocks, part_size_bytes=part_size, round_size_bytes=round_size, small_size_bytes=small_size
    )
    of_rank = [covered(ranges) for ranges in needs]
    parts = [set(range(start, stop)) for start, stop in zip(plan.start.tolist(), plan.stop.tolist(), strict=True)]
    fetched = [set(mine) for mine in of_rank]  # by whom: first of all by everybody, then what others send is taken away
    for part, members, owner in zip(parts, plan.ranks, plan.owner.tolist(), strict=True):
        assert part
        assert owner in members
        # exactly those who need it, all of it
        assert members == tuple(rank for rank, mine in enumerate(of_rank) if part & mine)
        assert all(part <= of_rank[rank] for rank in members)
        for rank in members:
            if rank != owner:
                fetched[rank] -= part
    num_fetched = sum(len(mine) for mine in fetched)
    needed = len(set().union(*of_rank))
    assert set().union(*fetched) == set().union(*of_rank)
    assert num_fetched - needed <= (SMALL_SHARE * needed if small_size else 0)
    # cut between blocks, and no longer than a part and a block
    edges = {
        start + min(low, length)
        for start, length, size in zip(
            blocks.start.tolist(), blocks.length.tolist(), blocks.block_size_bytes.tolist(), strict=True
        )
        for low in range(0, length + size, size)
    }
    assert set(plan.start.tolist()) | set(plan.stop.tolist()) <= edges
    assert all(len(part) <= part_size + int(blocks.block_size_bytes.max()) for part in parts)
    assert sum(map(len, parts)) == len(set().union(*parts))
    for rank in range(len(needs)):
        received = [byte for start, stop in received_ranges(plan, rank) for byte in range(start, stop)]
        assert received == sorted(byte for part, m in zip(parts, plan.ranks, strict=True) if rank in m for byte in part)
    check_rounds(plan, len(needs), round_size)


def check_rounds(plan: SharePlan, world_size: int, round_size: int) -> None:
    sizes = plan.stop - plan.start
    assert (np.diff(plan.round) >= 0).all()
    assert sorted(set(plan.round.tolist())) == list(range(plan.num_rounds))
    for number in range(plan.num_rounds):
        parts = np.flatnonzero(plan.round == number).tolist()
        for rank in range(world_size):
            held = [int(sizes[part]) for part in parts if rank in plan.ranks[part]]
            assert sum(held) <= round_size or len(held) == 1


@pytest.mark.parametrize("replicas", [2, 4, 7])
@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_replicas_fetch_equal_shares(replicas: int, num_shards: int) -> None:
    """HSDP: every shard, an object, is needed by each of its replicas; all ranks fetch the same, within a part."""
    size = 200 << 20
    blocks = Blocks(np.arange(num_shards) * (size + 1), np.full(num_shards, size), np.full(num_shards, 1 << 19))
    needs = [np.array([[s * (size + 1), s * (size + 1) + size]]) for _ in range(replicas) for s in range(num_shards)]
    plan = plan_shares(needs, blocks)
    fetched = np.bincount(plan.owner, plan.stop - plan.start, minlength=len(needs))
    assert fetched.sum() == size * num_shards
    assert fetched.max() - fetched.min() <= 16 << 20
    # and in every round but the last they do so at the same time
    first = plan.round == 0
    assert len(set(plan.owner[first].tolist())) == len(needs)


def test_those_who_need_much_alone_fetch_less_of_what_is_shared() -> None:
    size, alone = 400 << 20, 300 << 20
    blocks = Blocks(np.array([0, size + 1]), np.array([size, alone]), np.array([1 << 20, 1 << 20]))
    shared = [0, size]
    plan = plan_shares([np.array([shared, [size + 1, size + 1 + alone]]), np.array([shared])], blocks)
    fetched = np.bincount(plan.owner, plan.stop - plan.start, minlength=2)
    assert abs(int(fetched[0]) + alone - int(fetched[1])) <= 16 << 20


def test_a_thousand_ranks_are_planned_from_few_numbers() -> None:
    """256k items in 1000 objects, each for 4 replicas: a rank's needs are one range, and so are they of a thousand."""
    num_items, num_objects, length = 256 << 10, 250, 40_000
    per_object = num_items // num_objects
    base = np.repeat(np.arange(num_objects) * (per_object * length + 1), per_object)
    start = base + np.tile(np.arange(per_object) * length, num_objects)
    blocks = Blocks(start, np.full(len(start), length), np.full(len(start), 1 << 14))
    needs = []
    for rank in range(1000):
        first = (rank % num_objects) * per_object
        own = start[first : first + per_object]
        needs.append(merged(np.stack((own, own + length), axis=1)))
    assert all(len(ranges) == 1 for ranges in needs)
    plan = plan_shares(needs, blocks)
    assert int((plan.stop - plan.start).sum()) == num_objects * per_object * length
    fetched = np.bincount(plan.owner, plan.stop - plan.start, minlength=1000)
    assert fetched.max() <= 2 * fetched.mean()


def test_ranks_of_one_host_read_whole_items_of_a_folder_each_for_itself() -> None:
    assert not should_share(["a", "a"], is_host_cached=True, has_stripes=False)
    assert should_share(["a", "b"], is_host_cached=True, has_stripes=False)  # a folder of another host's
    assert should_share(["a", "a"], is_host_cached=True, has_stripes=True)
    assert should_share(["a", "a"], is_host_cached=False, has_stripes=False)
    assert not should_share(["a"], is_host_cached=False, has_stripes=True)


@pytest.mark.parametrize(("num_ranks", "is_left"), [(2, True), (8, False)])
def test_the_blocks_that_lie_across_two_ranks_are_read_by_both_where_they_are_few(
    num_ranks: int, is_left: bool
) -> None:
    """Tensors of 64 MiB by rows, which do not begin where a block does: an exchange costs more than one such block."""
    size, block, num_items = 64 << 20, 256 << 10, 16
    starts, step = np.arange(num_items) * (size + 1), size // num_ranks
    blocks = Blocks(starts, np.full(num_items, size), np.full(num_items, block))
    begins = [max(rank * step - block, 0) for rank in range(num_ranks)]
    needs = [np.stack((starts + begin, starts + (rank + 1) * step), 1) for rank, begin in enumerate(begins)]
    assert (len(plan_shares(needs, blocks)) == 0) == is_left
