"""Which ranks compute rows of experts that are not theirs, where few experts get most rows. Pure.

An expert that a rank computes for one pass through a layer beside its own is its *guest*: the owner's weights come,
some of the rows that would have gone to the owner go there, and the gradient goes back. Nothing of it stays, so
optimizer and checkpoint know of no guest. (Shadowed experts: FasterMoE, PPoPP 2022; replicas by load: Lazarus,
arXiv:2407.04656.) All ranks of an expert-parallel group decide from the same counts, each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launcher.rounds.placement import experts_per_rank

if TYPE_CHECKING:
    from launcher.rounds.spec import MeshSpec

_MATRICES = 3
# Passes over an expert's weights through the memory of those that a copy keeps busy: packed and unpacked, read by the
# guest's forward and backward pass, its gradient written, sent, and added to the owner's.
_PASSES_OF_COPY = 12


@dataclass(frozen=True, slots=True)
class ShareRule:
    """When ranks take guests.

    Attributes:
        guests: the most that a rank takes in one pass through a layer.
        copy_rows: how many rows take as long, forward and backward, as to copy an expert and return its gradient.
        num_parallel: how many ranks' work is done at once; None is all. Ranks that share cores win nothing by a level
            load beyond what fills the cores.
    """

    guests: int
    copy_rows: float
    num_parallel: float | None = None


@dataclass(frozen=True, slots=True)
class Sharing:
    """Who takes what, of one pass through a layer.

    Attributes:
        guests: by rank, the experts of others that it computes some rows of, in ascending order.
        quotas: of each expert that is somebody's guest, how many rows each rank computes.
        owned_rows: rows of the busiest rank if each rank computed those of its own experts.
        busiest_rows: of the busiest rank as it is.
        most_copies: weights that the rank which sends or receives the most of them sends or receives.
    """

    guests: tuple[tuple[int, ...], ...]
    quotas: Mapping[int, Mapping[int, int]]
    owned_rows: int
    busiest_rows: int
    most_copies: int

    @property
    def num_copies(self) -> int:
        """Experts' weights that are copied, over all ranks."""
        return sum(map(len, self.guests))


def copy_rows(spec: MeshSpec, link_bytes_per_s: float) -> float:
    """`ShareRule.copy_rows` by the modelled speeds: the size of an expert cancels out of it.

    A row is two operations per parameter forward and four backward; a copy moves each parameter to the guest, once
    more where layers are computed again, and its gradient back.
    """
    moves = 2 + spec.recompute
    copy_s = spec.activation_bytes * (moves / link_bytes_per_s + _PASSES_OF_COPY / spec.memory_bytes_per_s)
    params = _MATRICES * spec.model_dim * spec.ffn_dim
    return copy_s * params / (row_flops(spec) / spec.flops_per_s)


def row_flops(spec: MeshSpec) -> float:
    """Operations of one row through an expert, forward and backward."""
    return (6 + 2 * spec.recompute) * _MATRICES * spec.model_dim * spec.ffn_dim


def guest_params(spec: MeshSpec) -> int:
    """Parameters of the guests that a rank may have in one layer."""
    return spec.expert_replicas * _MATRICES * spec.model_dim * spec.ffn_dim


@dataclass(slots=True)
class _Loads:
    """Rows as they are handed out."""

    rows_P: list[int]
    quotas_E: list[dict[int, int]]
    sent_P: list[int] = field(init=False)
    taken_P: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sent_P, self.taken_P = [0] * len(self.rows_P), [0] * len(self.rows_P)

    def move(self, expert: int, giver: int, taker: int, rows: int) -> None:
        self.quotas_E[expert][giver] -= rows
        self.quotas_E[expert][taker] = rows
        self.rows_P[giver] -= rows
        self.rows_P[taker] += rows
        self.sent_P[giver] += 1
        self.taken_P[taker] += 1

    @property
    def most_copies(self) -> int:
        return max(*self.sent_P, *self.taken_P)


def share_rows(load_E: Sequence[int], num_ranks: int, rule: ShareRule) -> Sharing:
    """Decide who takes guests for a pass in which expert e has `load_E[e]` rows.

    The busiest rank gives rows of its hottest expert to the idlest one, again and again, as long as the rows of a copy
    outweigh it; of these moves those are made up to which the busiest rank's rows and copies are the least.
    """
    held = experts_per_rank(len(load_E), num_ranks)
    first = [sum(held[:rank]) for rank in range(num_ranks)]
    owned = [range(start, start + count) for start, count in zip(first, held, strict=True)]
    level = math.ceil(sum(load_E) / min(num_ranks, rule.num_parallel or num_ranks))
    moves = _moves(load_E, owned, level, rule)
    loads = _start(load_E, owned)
    owned_rows = max(loads.rows_P)
    least, num_made = float(owned_rows), 0
    for number, move in enumerate(moves, start=1):
        loads.move(*move)
        cost = max(loads.rows_P) + rule.copy_rows * loads.most_copies
        if cost < least:
            least, num_made = cost, number
    loads = _start(load_E, owned)
    for move in moves[:num_made]:
        loads.move(*move)
    guests: list[list[int]] = [[] for _ in range(num_ranks)]
    for expert, _, taker, _ in sorted(moves[:num_made]):
        guests[taker].append(expert)
    shared = sorted({expert for expert, *_ in moves[:num_made]})
    return Sharing(
        guests=tuple(map(tuple, guests)),
        quotas={expert: dict(sorted(loads.quotas_E[expert].items())) for expert in shared},
        owned_rows=owned_rows,
        busiest_rows=max(loads.rows_P),
        most_copies=loads.most_copies,
    )


def _start(load_E: Sequence[int], owned: Sequence[range]) -> _Loads:
    quotas = [{rank: load_E[expert]} for rank, experts in enumerate(owned) for expert in experts]
    return _Loads([sum(load_E[expert] for expert in experts) for experts in owned], quotas)


def _moves(
    load_E: Sequence[int], owned: Sequence[range], level: int, rule: ShareRule
) -> list[tuple[int, int, int, int]]:
    """What to try, in order: expert, giver, taker, rows."""
    loads = _start(load_E, owned)
    ranks = range(len(owned))
    moves: list[tuple[int, int, int, int]] = []
    while rule.guests:
        giver = max(ranks, key=lambda rank: loads.rows_P[rank])
        if not owned[giver]:
            break
        expert = max(owned[giver], key=lambda expert: loads.quotas_E[expert][giver])
        takers = [rank for rank in ranks if loads.taken_P[rank] < rule.guests and rank not in loads.quotas_E[expert]]
        if not takers:
            break
        taker = min(takers, key=lambda rank: loads.rows_P[rank])
        quota = loads.quotas_E[expert][giver]
        rows = min(quota, loads.rows_P[giver] - level, level - loads.rows_P[taker])
        if rows < max(1.0, rule.copy_rows):
            break
        moves.append((expert, giver, taker, rows))
        loads.move(*moves[-1])
    return moves


@dataclass(frozen=True, slots=True)
class Itinerary:
    """Where one rank's rows go and what it receives.

    A rank is sent the rows of its own experts, in their order, and then those of its guests.

    Attributes:
        runs: (start, length) of the runs of rows sorted by expert, in the order in which they are sent.
        sent: by rank, how many rows go there.
        received: by source rank, how many rows come for each expert and each guest.
        lent: this rank's experts, numbered from its first one on, whose weights are sent, in the order of the takers.
        copies_sent, copies_taken: by rank, how many experts' weights go there, and come from there.
    """

    runs: list[tuple[int, int]]
    sent: list[int]
    received: list[list[int]]
    lent: list[int]
    copies_sent: list[int]
    copies_taken: list[int]

    @classmethod
    def of(cls, counts_PE: Sequence[Sequence[int]], sharing: Sharing, rank: int) -> Itinerary:
        """The way of `rank`'s rows, where each source has `counts_PE[source][expert]` of them."""
        num_ranks, num_experts = len(counts_PE), len(counts_PE[0])
        held = experts_per_rank(num_experts, num_ranks)
        first = [sum(held[:each]) for each in range(num_ranks)]
        owned = [range(start, start + count) for start, count in zip(first, held, strict=True)]
        spread = {
            expert: spread_rows([of_source[expert] for of_source in counts_PE], quota)
            for expert, quota in sharing.quotas.items()
        }
        starts = [0]
        for count in counts_PE[rank]:
            starts.append(starts[-1] + count)

        def run(expert: int, taker: int) -> tuple[int, int]:
            if expert not in spread:
                return starts[expert], counts_PE[rank][expert]
            before = sum(rows for other, rows in spread[expert][rank].items() if other < taker)
            return starts[expert] + before, spread[expert][rank].get(taker, 0)

        def rows(source: int, expert: int) -> int:
            return spread[expert][source].get(rank, 0) if expert in spread else counts_PE[source][expert]

        to_rank = [[run(expert, taker) for expert in _computed(owned, sharing, taker)] for taker in range(num_ranks)]
        lent = [[expert for expert in sharing.guests[taker] if expert in owned[rank]] for taker in range(num_ranks)]
        return cls(
            runs=[each for runs in to_rank for each in runs],
            sent=[sum(length for _, length in runs) for runs in to_rank],
            received=[
                [rows(source, expert) for expert in _computed(owned, sharing, rank)] for source in range(num_ranks)
            ],
            lent=[expert - first[rank] for experts in lent for expert in experts],
            copies_sent=list(map(len, lent)),
            copies_taken=[sum(expert in experts for expert in sharing.guests[rank]) for experts in owned],
        )


def _computed(owned: Sequence[range], sharing: Sharing, rank: int) -> list[int]:
    return [*owned[rank], *sharing.guests[rank]]


def spread_rows(counts_P: Sequence[int], quota: Mapping[int, int]) -> list[dict[int, int]]:
    """How many of each source's rows of one expert go to which rank, each of which computes its quota.

    A rank's own rows stay where it computes some; the others go to what is left, both in the order of ranks.
    """
    left = dict(quota)
    found: list[dict[int, int]] = [{} for _ in counts_P]
    rest = list(counts_P)
    for source in range(len(counts_P)):
        if stays := min(rest[source], left.get(source, 0)):
            found[source][source] = stays
            left[source] -= stays
            rest[source] -= stays
    takers = [rank for rank in sorted(left) if left[rank]]
    for source, of_source in enumerate(found):
        while rest[source]:
            taker = takers[0]
            rows = min(rest[source], left[taker])
            of_source[taker] = of_source.get(taker, 0) + rows
            left[taker] -= rows
            rest[source] -= rows
            if not left[taker]:
                takers.pop(0)
    return found
