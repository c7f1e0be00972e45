"""Ranks that read together: what several of them need is fetched by one, and sent to the others.

What each rank needs goes to all ranks as a few ranges (`Requests.needs`), and every rank makes the same plan of them.
The exchange goes in rounds of bounded size, which all ranks enter together: each says before a round whether it has
failed, so that all leave as soon as one has, and nobody waits for a message that will not come.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from storage.agreement import PeerFailed
from storage.columns import Ints
from storage.fetch import Source, Traffic, scratch
from storage.group import COORDINATOR, Array, Expected, Group, Message
from storage.index import Index, spans
from storage.readplan import Part, Range, Stripes
from storage.requests import Requests, as_bytes, packed
from storage.shareplan import ROUND_SIZE_BYTES, Blocks, SharePlan, merged, plan_shares


@dataclass(frozen=True)
class Shared:
    """The plan of all ranks, and of each rank the items of which it needs nothing but stripes."""

    plan: SharePlan
    stripes_of_rank: tuple[dict[int, Stripes], ...]


def agree(group: Group, requests: Requests, blocks: Blocks, axis: Ints) -> Shared:
    """Make the plan of all ranks; a collective.

    Each rank tells 16 bytes for each range and 40 for each striped item: for a thousand ranks that each need a thousand
    shards of 256k, that is 16 MB in all, and 16 kB where those shards lie together, as they do if they were saved so.
    """
    needs = requests.needs(axis)
    striped = np.array(
        [(item, s.start, s.stride, s.length, s.count) for item, s in requests.striped().items()], np.int64
    ).reshape(-1, 5)
    head = np.array([len(needs)], np.int64)
    told = group.all_gather_long(b"".join(part.tobytes() for part in (head, needs, striped)))
    needs_of_rank, stripes_of_rank = [], []
    for data in told:
        numbers = np.frombuffer(data, np.int64)
        end = 1 + 2 * int(numbers[0])
        needs_of_rank.append(numbers[1:end].reshape(-1, 2))
        stripes_of_rank.append({row[0]: Stripes(*row[1:]) for row in numbers[end:].reshape(-1, 5).tolist()})
    return Shared(plan_shares(needs_of_rank, blocks), tuple(stripes_of_rank))


def learn_crcs(group: Group, index: Index, requests: Requests) -> Index:
    """`index` with the checksums of what this rank wants, which the coordinator knows; a collective.

    A checkpoint of 1 TiB has up to 256 MiB of checksums: too much to be sent to every rank.
    """
    if index.is_stock:
        return index
    wanted = np.array(sorted(requests.spans), np.int64)
    told = group.all_gather_long(merged(np.stack((wanted, wanted + 1), axis=1)).tobytes())
    if not group.is_coordinator:
        size = index.num_crcs(wanted) * 4
        expected = [Expected(COORDINATOR, group.rank, size)] if size else []
        received = group.swap([], expected)
        return index.with_crcs(wanted, np.frombuffer(received[0] if size else b"", np.uint32))
    for peer, data in enumerate(told):
        ranges = np.frombuffer(data, np.int64).reshape(-1, 2)
        if peer != group.rank and len(ranges):
            crcs = index.crcs_of(spans(ranges[:, 0], ranges[:, 1]))
            group.swap([Message(peer, peer, crcs.view(np.uint8))], [])
    return index


@dataclass(frozen=True)
class Piece:
    """A piece of the plan, as a part to fetch."""

    number: int
    part: Part

    @property
    def size_bytes(self) -> int:
        """Its length."""
        return self.part.stop - self.part.start

    def only_item(self) -> tuple[int, Range] | None:
        """The item and its bytes, if the piece has bytes of one item only."""
        if len(self.part.segments) > 1:
            return None
        segment = self.part.segments[0]
        return segment.item, (segment.item_start, segment.item_start + self.size_bytes)

    def memories(self, memory: memoryview) -> list[memoryview]:
        """The memory of each segment in the memory of the piece."""
        return [memory[s.start - self.part.start : s.stop - self.part.start] for s in self.part.segments]


def striped_range(shared: Shared, rank: int, piece: Piece) -> tuple[Stripes, int, int] | None:
    """Which bytes [low, high) of the stripes of the piece's item `rank` needs; None if it needs all of the piece."""
    only = piece.only_item()
    stripes = shared.stripes_of_rank[rank].get(only[0]) if only else None
    if only is None or stripes is None:
        return None
    return stripes, stripes.before(only[1][0]), stripes.before(only[1][1])


class Exchange:
    """Carries the plan out, on the thread that calls `run`."""

    def __init__(
        self, group: Group, source: Source, shared: Shared, part_of: Callable[[int], Part], requests: Requests
    ) -> None:
        self._group = group
        self._source = source
        self._shared = shared
        self._part_of = part_of
        self._requests = requests
        self._traffic = Traffic()
        self._mine = deque(np.flatnonzero(shared.plan.owner == group.rank).tolist())
        self._flying: deque[tuple[Piece, Future[memoryview]]] = deque()

    def run(self, pool: ThreadPoolExecutor) -> Traffic:
        """Every piece that concerns this rank, delivered; a collective.

        Raises (on every rank, after the same round): what this rank failed with; PeerFailed where another did.
        """
        self._pool = pool
        failure: Exception | None = None
        try:
            for numbers in self._rounds():
                self._fetch_ahead()
                owned: list[tuple[Piece, memoryview]] = []
                try:
                    while failure is None and self._next_is_of(numbers):
                        piece, future = self._flying.popleft()
                        owned.append((piece, future.result()))
                        self._fetch_ahead()
                except Exception as error:  # noqa: BLE001 - raised below, by all ranks together
                    failure = error
                self._leave_if_any(failure)
                failure = self._round(numbers, owned)
            self._leave_if_any(failure)
        finally:
            futures = [future for _, future in self._flying]
            for future in futures:
                future.cancel()
            wait(futures)
        return self._traffic

    def _fetch_ahead(self) -> None:
        """Start to fetch this rank's next pieces, as much as a round may hold."""
        ahead_bytes = sum(piece.size_bytes for piece, _ in self._flying)
        while self._mine and (not self._flying or ahead_bytes + self._size_bytes(self._mine[0]) <= ROUND_SIZE_BYTES):
            piece = self._piece(self._mine.popleft())
            self._flying.append((piece, self._pool.submit(self._fetch, piece)))
            ahead_bytes += piece.size_bytes

    def _next_is_of(self, numbers: range) -> bool:
        return bool(self._flying) and self._flying[0][0].number in numbers

    def _size_bytes(self, number: int) -> int:
        plan = self._shared.plan
        return int(plan.stop[number] - plan.start[number])

    def _leave_if_any(self, failure: Exception | None) -> None:
        if self._group.any(failure is not None):
            raise failure or PeerFailed("reading was given up because another rank has failed to")

    def _rounds(self) -> Iterator[range]:
        plan = self._shared.plan
        edges = np.searchsorted(plan.round, np.arange(plan.num_rounds + 1)).tolist()
        return itertools.starmap(range, itertools.pairwise(edges))

    def _piece(self, number: int) -> Piece:
        return Piece(number, self._part_of(number))

    def _fetch(self, piece: Piece) -> memoryview:
        memory = scratch(piece.size_bytes)
        self._source.fetch(piece.part, piece.memories(memory))
        return memory

    def _round(self, numbers: Sequence[int], owned: Sequence[tuple[Piece, memoryview]]) -> Exception | None:
        """Send and receive the pieces of one round, and deliver them; what went wrong with the delivery."""
        plan, rank = self._shared.plan, self._group.rank
        sends = [
            message for piece, memory in owned for message in self._messages(piece, np.frombuffer(memory, np.uint8))
        ]
        expected: list[tuple[Piece, Expected]] = []
        for number in numbers:
            owner = int(plan.owner[number])
            if owner != rank and rank in plan.ranks[number]:
                piece = self._piece(number)
                found = striped_range(self._shared, rank, piece)
                size = piece.size_bytes if found is None else found[2] - found[1]
                if size:
                    expected.append((piece, Expected(owner, number, size)))
        received = self._group.swap(sends, [entry for _, entry in expected])
        fetched = sum(piece.size_bytes for piece, _ in owned)
        self._traffic += Traffic(len(owned), fetched, sum(len(data) for data in received))
        try:
            for piece, memory in owned:
                self._hand_on(piece, memory)
            for (piece, _), data in zip(expected, received, strict=True):
                self._take(piece, data)
        except Exception as error:  # noqa: BLE001 - raised by all ranks together
            return error
        return None

    def _messages(self, piece: Piece, memory: Array) -> Iterator[Message]:
        for peer in self._shared.plan.ranks[piece.number]:
            if peer != self._group.rank:
                found = striped_range(self._shared, peer, piece)
                origin = piece.part.segments[0].item_start
                data = memory if found is None else packed(memory, origin, found[0])
                if len(data):
                    yield Message(peer, piece.number, data)

    def _take(self, piece: Piece, data: Array) -> None:
        found = striped_range(self._shared, self._group.rank, piece)
        if found is not None:
            # the owner has verified the blocks, of which this is only a part
            self._requests.deliver_stripes(piece.part.segments[0], found[1], as_bytes(data))
            return
        memory = as_bytes(data)
        self._source.verify(piece.part, piece.memories(memory))
        self._hand_on(piece, memory)

    def _hand_on(self, piece: Piece, memory: memoryview) -> None:
        for segment, part in zip(piece.part.segments, piece.memories(memory), strict=True):
            self._requests.deliver(segment, part)
