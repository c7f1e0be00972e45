"""Which rank fetches what several ranks need, and in which round it is sent on. Pure: no torch, no store.

    every rank's needs, byte ranges between blocks -> those that several ranks need -> parts -> an owner each -> rounds

A place in a checkpoint is a byte of its axis (`Index.axis`): all objects one after the other, with a gap between them,
so that a range never crosses from one object into another. What a rank needs of the items that it wants whole is then a
few ranges, however many items they are, and every rank can know the needs of all.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.format.columns import Ints
from storage.format.index import aranges

PART_SIZE_BYTES = 8 * 1024 * 1024
ROUND_SIZE_BYTES = 64 * 1024 * 1024
SMALL_SIZE_BYTES = 256 * 1024
SMALL_SHARE = 0.005
_PART_SIZE_BYTES_MIN = 1024 * 1024
_PARTS_PER_RANK = 8


@dataclass(frozen=True)
class Blocks:
    """The items of a checkpoint by their place on the axis; items tile their objects, or leave gaps between them."""

    start: Ints
    length: Ints
    block_size_bytes: Ints

    def floor(self, places: Ints) -> Ints:
        """For each place of the axis, where the block begins that holds it."""
        item = np.searchsorted(self.start, places, "right") - 1
        size = self.block_size_bytes[item]
        return np.asarray(self.start[item] + (places - self.start[item]) // size * size, np.int64)


@dataclass(frozen=True)
class SharePlan:
    """Part i is the bytes [start[i], stop[i]) of the axis. `ranks[i]` need it, ascending; `owner[i]`, one of them,
    fetches it and sends it to the others in round `round[i]`. Parts are in the order of their rounds. `is_cut[i]`:
    whether what some rank needs begins or ends at its start, and at its stop; else the cut is one for size.
    """

    start: Ints
    stop: Ints
    owner: Ints
    ranks: tuple[tuple[int, ...], ...]
    round: Ints
    is_cut: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.start)

    @property
    def num_rounds(self) -> int:
        """The number of rounds."""
        return int(self.round.max(initial=-1)) + 1


def should_share(hosts: Sequence[str], *, is_host_cached: bool, has_stripes: bool) -> bool:
    """Whether what several ranks need is better sent from one to the others than read by each.

    Not where all ranks are on one host that keeps for each what another has read: that costs one copy, and sending
    costs several. Who needs stripes of an item reads and checks all of it, and is sent no more than the stripes.

    Args:
        hosts: by rank.
        is_host_cached: whether the hosts keep what was read from the store.
        has_stripes: whether any rank needs only stripes of some item.
    """
    return len(hosts) > 1 and (has_stripes or not is_host_cached or len(set(hosts)) > 1)


def merged(ranges: Ints) -> Ints:
    """The union of the half-open ranges, rows of [start, stop), as the fewest ascending ones."""
    if not len(ranges):
        return np.zeros((0, 2), np.int64)
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    highest = np.maximum.accumulate(ranges[:, 1])
    first = np.concatenate(([True], ranges[1:, 0] > highest[:-1]))
    last = np.concatenate((first[1:], [True]))
    return np.stack((ranges[first, 0], highest[last]), axis=1)


def plan_shares(
    needs_of_rank: Sequence[Ints],
    blocks: Blocks,
    *,
    part_size_bytes: int | None = None,
    round_size_bytes: int = ROUND_SIZE_BYTES,
    small_size_bytes: int = SMALL_SIZE_BYTES,
) -> SharePlan:
    """Parts for what more than one rank needs, the same on every rank that plans with the same arguments.

    Bytes are spread so that all ranks fetch about the same number in total, counting what each alone needs. In a round
    no rank fetches and receives more than `round_size_bytes` (or one part, if that is larger).

    Args:
        needs_of_rank: by rank, ascending disjoint ranges (rows of [start, stop)) that begin and end between blocks.
        blocks: where an axis may be cut.
        part_size_bytes: a part is at most this long, plus a block; by default 8 MiB, and down to 1 MiB where there
            would be too few parts to spread them well.
        small_size_bytes: ranges that are no longer are left to each of their ranks where all of those together would
            fetch no more than 0.5 % beyond what is needed: a request of its own costs more than such bytes. By default
            one block, as two ranks share where the rows of one end and the other's begin.
    """
    cuts = np.unique(np.concatenate([needs.ravel() for needs in needs_of_rank] or [np.zeros(0, np.int64)]))
    segment, rank = _pairs(needs_of_rank, cuts)
    num_ranks = np.bincount(segment, minlength=max(len(cuts) - 1, 0))
    sizes = np.diff(cuts)
    shared = (num_ranks > 1) & ~_spared(sizes, num_ranks, small_size_bytes)
    alone_bytes = np.zeros(len(needs_of_rank), np.int64)
    alone = ~shared[segment]
    np.add.at(alone_bytes, rank[alone], sizes[segment[alone]])
    numbers = np.flatnonzero(shared)
    if part_size_bytes is None:
        per_rank = int(sizes[shared].sum()) // (_PARTS_PER_RANK * max(1, len(needs_of_rank)))
        part_size_bytes = min(max(per_rank, _PART_SIZE_BYTES_MIN), PART_SIZE_BYTES)
    start, stop, of_segment = _parts(cuts[numbers], cuts[numbers + 1], blocks, part_size_bytes)
    members = [tuple(found.tolist()) for found in np.split(rank, np.searchsorted(segment, np.arange(1, len(cuts))))]
    ranks = [members[numbers[index]] for index in of_segment.tolist()]
    owner = _owners(stop - start, ranks, alone_bytes)
    order, rounds = _rounds(stop - start, owner, ranks, len(needs_of_rank), round_size_bytes)
    start, stop, ranks = start[order], stop[order], [ranks[part] for part in order.tolist()]
    is_cut = np.stack((np.isin(start, cuts), np.isin(stop, cuts)), axis=1)
    return SharePlan(start, stop, owner[order], tuple(ranks), rounds, is_cut)


def _pairs(needs_of_rank: Sequence[Ints], cuts: Ints) -> tuple[Ints, Ints]:
    """Every (segment, rank) where the rank needs the segment, the range between two cuts; by segment, then rank."""
    segments, ranks = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for rank, needs in enumerate(needs_of_rank):
        first, last = np.searchsorted(cuts, needs[:, 0]), np.searchsorted(cuts, needs[:, 1])
        segments.append(aranges(first, last))
        ranks.append(np.full(len(segments[-1]), rank, np.int64))
    segment, rank_of = np.concatenate(segments), np.concatenate(ranks)
    order = np.argsort(segment, kind="stable")
    return segment[order], rank_of[order]


def _spared(sizes: Ints, num_ranks: Ints, small_size_bytes: int) -> Ints:
    """Which segments are not worth a request of their own; see `plan_shares`."""
    needed_bytes = int(sizes[num_ranks > 0].sum())
    extra_bytes = sizes * np.maximum(num_ranks - 1, 0)
    small = np.flatnonzero((num_ranks > 1) & (sizes <= small_size_bytes))
    by_cost = small[np.argsort(extra_bytes[small], kind="stable")]
    spared = np.zeros(len(sizes), bool)
    spared[by_cost[np.cumsum(extra_bytes[by_cost]) <= SMALL_SHARE * needed_bytes]] = True
    return spared


def _parts(start: Ints, stop: Ints, blocks: Blocks, size_bytes: int) -> tuple[Ints, Ints, Ints]:
    """The ranges cut near multiples of `size_bytes`, between blocks; starts, stops, and which range each is of."""
    first, last = start // size_bytes + 1, -(-stop // size_bytes)
    last = np.maximum(last, first)
    of_range = np.repeat(np.arange(len(start)), last - first)
    inner = aranges(first, last) * size_bytes
    inner = blocks.floor(inner) if len(inner) else inner
    inside = inner > start[of_range]
    starts = np.concatenate((start, inner[inside]))
    of_part = np.concatenate((np.arange(len(start)), of_range[inside]))
    starts, unique = np.unique(starts, return_index=True)
    of_part = of_part[unique]
    following = np.concatenate((starts[1:], [0]))
    is_last = np.concatenate((of_part[1:] != of_part[:-1], [True])) if len(starts) else np.zeros(0, bool)
    stops = np.where(is_last, stop[of_part], following[: len(starts)])
    return starts, np.asarray(stops, np.int64), of_part


def _owners(sizes: Ints, ranks: Sequence[tuple[int, ...]], alone_bytes: Ints) -> Ints:
    """One of each part's ranks, so that the fullest rank has as little as can be; parts of a set stay in order."""
    load_bytes = alone_bytes.copy()
    owner = np.zeros(len(sizes), np.int64)
    parts_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for part, members in enumerate(ranks):
        parts_of[members].append(part)
    # the sets with the least choice first
    for members in sorted(parts_of, key=lambda members: (len(members), members)):
        parts, among = np.array(parts_of[members]), np.array(members)
        quotas = _filled(load_bytes[among], int(sizes[parts].sum()))
        middles = np.cumsum(sizes[parts]) - sizes[parts] / 2
        chosen = among[np.minimum(np.searchsorted(np.cumsum(quotas), middles, "right"), len(among) - 1)]
        owner[parts] = chosen
        np.add.at(load_bytes, chosen, sizes[parts])
    return owner


def _filled(load_bytes: Ints, total_bytes: int) -> Ints:
    """How many of `total_bytes` to add to each load, so that the lowest rise to one level."""
    order = np.argsort(load_bytes, kind="stable")
    levels = load_bytes[order]
    # the level to which the n lowest would rise; the n that are meant are all below theirs
    heights = (np.cumsum(levels) + total_bytes) / np.arange(1, len(levels) + 1)
    num = int(np.flatnonzero(heights >= levels)[-1]) + 1
    quotas = np.zeros(len(levels))
    quotas[order[:num]] = heights[num - 1] - levels[:num]
    return np.asarray(np.rint(quotas), np.int64)


def _rounds(
    sizes: Ints, owner: Ints, ranks: Sequence[tuple[int, ...]], world_size: int, round_size_bytes: int
) -> tuple[Ints, Ints]:
    """An order of the parts, in which each owner's parts take turns with the others', and the round of each."""
    by_owner = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=world_size)
    turn = np.zeros(len(sizes), np.int64)
    turn[by_owner] = aranges(np.zeros(len(counts), np.int64), counts)
    order = np.lexsort((owner, turn))
    rounds = np.zeros(len(sizes), np.int64)
    held_bytes = np.zeros(world_size, np.int64)
    now = 0
    for at, part in enumerate(order.tolist()):
        members = np.array(ranks[part])
        held = int(held_bytes[members].max())
        if held and held + int(sizes[part]) > round_size_bytes:
            now += 1
            held_bytes[:] = 0
        held_bytes[members] += sizes[part]
        rounds[at] = now
    return order, rounds


def received_ranges(plan: SharePlan, rank: int) -> list[tuple[int, int]]:
    """The ranges of the axis that `rank` gets through the plan, from itself or from others, ascending."""
    mine = [part for part in range(len(plan)) if rank in plan.ranks[part]]
    ranges = np.stack((plan.start[mine], plan.stop[mine]), axis=1) if mine else np.zeros((0, 2), np.int64)
    return list(itertools.starmap(_pair, merged(ranges).tolist()))


def _pair(start: int, stop: int) -> tuple[int, int]:
    return start, stop
