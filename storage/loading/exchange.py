"""Ranks that read together: what several of them need is fetched by one, and sent to the others.

What each rank needs goes to all ranks as a few ranges (`Requests.needs`), and every rank makes the same plan of them.
The exchange goes in rounds of bounded size, which all ranks enter together: each says before a round whether it has
failed, so that all leave as soon as one has, and nobody waits for a message that will not come.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field

import numpy as np

from storage.errors import PeerFailed
from storage.format.columns import Array, Ints
from storage.format.index import Index, aranges
from storage.loading.host_memory import HostMemory
from storage.loading.requests import Requests, as_bytes, packed
from storage.loading.shared_parts import Held, SharedPart, joined, receiving, scatter
from storage.loading.shareplan import ROUND_SIZE_BYTES, Blocks, SharePlan, merged, plan_shares
from storage.ranks.group import COORDINATOR, Expected, Group, Message
from storage.verified.readplan import Stripes
from storage.verified.source import Source, Traffic, scratch

AHEAD_SIZE_BYTES = 128 * 1024 * 1024
"""As many parts as there are threads to fetch them."""


@dataclass(frozen=True)
class AgreedPlan:
    """The plan of all ranks, and of each rank the items of which it needs nothing but stripes."""

    plan: SharePlan
    stripes_of_rank: tuple[dict[int, Stripes], ...]


def agree(group: Group, requests: Requests, blocks: Blocks, axis: Ints) -> AgreedPlan:
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
    return AgreedPlan(plan_shares(needs_of_rank, blocks), tuple(stripes_of_rank))


def learn_crcs(group: Group, index: Index, items: Iterable[int]) -> Index:
    """`index` with the checksums of the items that this rank wants, which the coordinator knows; a collective.

    A checkpoint of 1 TiB has up to 256 MiB of checksums: too much to be sent to every rank.
    """
    wanted = np.array(sorted(items), np.int64)
    told = group.all_gather_long(merged(np.stack((wanted, wanted + 1), axis=1)).tobytes())
    if not group.is_coordinator:
        crcs = np.empty(int(index.columns.num_crcs[wanted].sum()), np.uint32)
        group.swap([], [Expected(COORDINATOR, crcs.view(np.uint8))] if len(crcs) else [])
        return index.with_crcs(wanted, crcs)
    for peer, data in enumerate(told):
        ranges = np.frombuffer(data, np.int64).reshape(-1, 2)
        crcs = index.crcs_of(aranges(ranges[:, 0], ranges[:, 1]))
        if peer != group.rank and len(crcs):
            group.swap([Message(peer, crcs.view(np.uint8))], [])
    return index


def striped_range(agreed: AgreedPlan, rank: int, shared: SharedPart) -> tuple[Stripes, int, int] | None:
    """Which bytes [low, high) of the stripes of the part's item `rank` needs; None if it needs all of the part."""
    only = shared.only_item()
    stripes = agreed.stripes_of_rank[rank].get(only[0]) if only else None
    if only is None or stripes is None:
        return None
    return stripes, stripes.before(only[1][0]), stripes.before(only[1][1])


@dataclass(frozen=True)
class Incoming:
    """A part that another rank sends: all of it into `held`, or the stripes from number `first` of theirs on."""

    shared: SharedPart
    owner: int
    into: list[list[Array]]
    memories: list[Array]
    held: Held | None = None
    first: int = 0


@dataclass
class _Round:
    """What a rank has for others in one round, and what it is to receive."""

    owned: list[Held] = field(default_factory=list)
    sends: list[Message] = field(default_factory=list)
    incoming: list[Incoming] = field(default_factory=list)


class PartExchange:
    """Carries the plan out, on the thread that calls `run`.

    What a plain tensor takes as it is is fetched or received there, and sent from there. A target hears of it only when
    the round is over: it may hand its tensor over, and then nobody sends from it any more.
    """

    def __init__(
        self,
        group: Group,
        host_memory: HostMemory,
        source: Source,
        agreed: AgreedPlan,
        shared_part_of: Callable[[int], SharedPart],
        requests: Requests,
    ) -> None:
        self._group = group
        self._host_memory = host_memory
        self._source = source
        self._agreed = agreed
        self._shared_part_of = shared_part_of
        self._requests = requests
        self._traffic = Traffic()
        self._mine = deque(np.flatnonzero(agreed.plan.owner == group.rank).tolist())
        self._flying: deque[tuple[Held, Future[None]]] = deque()

    def run(self, pool: Executor) -> Traffic:
        """Deliver every part that concerns this rank; a collective.

        Raises (on every rank, after the same round): what this rank failed with; PeerFailed where another did.
        """
        self._pool = pool
        failure: Exception | None = None
        try:
            for numbers in self._rounds():
                batch = _Round()
                if failure is None:
                    try:
                        self._prepare(batch, numbers)
                    except Exception as error:  # noqa: BLE001 - raised below, by all ranks together
                        failure = error
                self._leave_if_any(failure)
                failure = self._carry_out(batch)
            self._leave_if_any(failure)
        finally:
            futures = [future for _, future in self._flying]
            for future in futures:
                future.cancel()
            wait(futures)
        return self._traffic

    def _prepare(self, batch: _Round, numbers: range) -> None:
        """What can fail on one rank only: what it fetches for others, and memory for what it receives."""
        plan, rank = self._agreed.plan, self._group.rank
        self._fetch_ahead()
        while self._next_is_of(numbers):
            held, future = self._flying.popleft()
            future.result()
            batch.owned.append(held)
            self._fetch_ahead()
        batch.sends += [message for held in batch.owned for message in self._messages(held)]
        batch.incoming += [
            self._incoming(number) for number in numbers if plan.owner[number] != rank and rank in plan.ranks[number]
        ]

    def _fetch_ahead(self) -> None:
        """Start to fetch this rank's next parts."""
        while self._mine and (not self._flying or self._has_room(self._mine[0])):
            held = self._held(self._shared_part_of(self._mine.popleft()))
            self._flying.append((held, self._pool.submit(self._source.fetch, held.shared.part, held.memories)))

    def _has_room(self, number: int) -> bool:
        """Whether another part may be fetched ahead: of scratch memory that may be as much as a round holds."""
        size_bytes = self._size_bytes(number)
        ahead_bytes = sum(held.shared.size_bytes for held, _ in self._flying)
        scratch_bytes = sum(held.scratch_bytes for held, _ in self._flying)
        return ahead_bytes + size_bytes <= AHEAD_SIZE_BYTES and scratch_bytes + size_bytes <= ROUND_SIZE_BYTES

    def _next_is_of(self, numbers: range) -> bool:
        return bool(self._flying) and self._flying[0][0].shared.number in numbers

    def _size_bytes(self, number: int) -> int:
        plan = self._agreed.plan
        return int(plan.stop[number] - plan.start[number])

    def _leave_if_any(self, failure: Exception | None) -> None:
        if self._group.any(failure is not None):
            raise failure or PeerFailed("reading was given up because another rank has failed to")

    def _rounds(self) -> Iterator[range]:
        plan = self._agreed.plan
        edges = np.searchsorted(plan.round, np.arange(plan.num_rounds + 1)).tolist()
        return itertools.starmap(range, itertools.pairwise(edges))

    def _held(self, shared: SharedPart) -> Held:
        """The part with memory for all of it: its targets' where they take it as it is."""
        segments = shared.part.segments
        views = list(map(self._requests.view, segments))
        memories = (
            scratch(s.stop - s.start) if view is None else view for s, view in zip(segments, views, strict=True)
        )
        return Held(shared, tuple(memories), tuple(view is not None for view in views))

    def _carry_out(self, batch: _Round) -> Exception | None:
        """Send and receive the parts of one round, and deliver them; what went wrong with the delivery."""
        expected = [Expected(entry.owner, memory) for entry in batch.incoming for memory in entry.memories]
        self._host_memory.swap(batch.sends, expected)
        fetched_bytes = sum(held.shared.size_bytes for held in batch.owned)
        self._traffic += Traffic(len(batch.owned), fetched_bytes, sum(len(entry.into) for entry in expected))
        try:
            for held in batch.owned:
                self._hand_on(held)
            for entry in batch.incoming:
                self._take(entry)
        except Exception as error:  # noqa: BLE001 - raised by all ranks together
            return error
        return None

    def _messages(self, held: Held) -> Iterator[Message]:
        """What each peer is sent of the part: all of it, or the stripes that it needs."""
        shared, whole = held.shared, None
        contents: list[Array] | None = None
        for peer in self._agreed.plan.ranks[shared.number]:
            if peer == self._group.rank:
                continue
            found = striped_range(self._agreed, peer, shared)
            if found is None:
                contents = contents or [joined(memories) for memories in held.messages()]
                yield from (Message(peer, data) for data in contents)
            elif found[1] < found[2]:
                whole = held.joined() if whole is None else whole
                yield Message(peer, packed(whole, shared.part.segments[0].item_start, found[0]))

    def _incoming(self, number: int) -> Incoming:
        shared, owner = self._shared_part_of(number), int(self._agreed.plan.owner[number])
        found = striped_range(self._agreed, self._group.rank, shared)
        if found is not None:
            _, low, high = found
            return Incoming(shared, owner, [], [np.empty(high - low, np.uint8)] if low < high else [], first=low)
        held = self._held(shared)
        contents = held.messages()
        return Incoming(shared, owner, contents, [receiving(memories) for memories in contents], held)

    def _take(self, entry: Incoming) -> None:
        if entry.held is None:
            # the owner has verified the blocks, of which this is only a part
            for memory in entry.memories:
                self._requests.deliver_stripes(entry.shared.part.segments[0], entry.first, as_bytes(memory))
            return
        for content, memories in zip(entry.memories, entry.into, strict=True):
            scatter(content, memories)
        # what was copied from memory that the owner has verified is as if it were this rank's own
        is_trusted = entry.owner in self._host_memory.readable
        self._source.verify(entry.shared.part, entry.held.memories, is_trusted=is_trusted)
        self._hand_on(entry.held)

    def _hand_on(self, held: Held) -> None:
        for segment, memory, in_place in zip(held.shared.part.segments, held.memories, held.in_place, strict=True):
            if in_place:
                self._requests.filled(segment)
            else:
                self._requests.deliver(segment, memory)
