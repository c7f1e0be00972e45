"""Fill a state from a checkpoint: read items -> requests -> what others need too, exchanged -> the rest, in parts."""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from typing import TypeVar

import numpy as np
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from storage.arena.page_filler import PageFiller
from storage.errors import PeerFailed
from storage.format.index import Index
from storage.loading.casts import Casts
from storage.loading.exchange import AgreedPlan, PartExchange, agree, learn_crcs
from storage.loading.host_memory import BOOT_ID, HostMemory
from storage.loading.request_builder import Reads, reads_by_item, requests_of
from storage.loading.requests import Requests
from storage.loading.shared_parts import SharedPart, clipped, item_segments, long_ranges
from storage.loading.shareplan import Blocks, received_ranges, should_share
from storage.parallel import Pool, windowed_by_size
from storage.ranks.group import Group
from storage.stores.objects import Capability, ObjectStore
from storage.verified.readplan import Part, Range, Segment, Want, plan_parts
from storage.verified.source import Source, Traffic, scratch
from storage.verified.twice import read_verified
from storage.verified.verifiers import Verifier

T = TypeVar("T")

NUM_THREADS = 16  # AWS gives a connection 85 to 90 MB/s
_HELD_SIZE_BYTES = 128 * 1024 * 1024  # outside of tensors, by parts that are under way or wait for the main thread


def read_items(
    store: ObjectStore,
    index: Index,
    items: Sequence[ReadItem],
    planner: LoadPlanner,
    group: Group,
    num_threads: int = NUM_THREADS,
    casts: Casts | None = None,
) -> Traffic:
    """Read every item into what `planner` resolves for it. A collective of the group.

    What several ranks need is fetched by one of them, unless `should_share` says that each had better read it.
    Checksums are verified before a value is handed over, but tensors are filled in place: after an error their content
    is undefined. `casts` says which changes of dtype are allowed, and learns which there are.

    Raises:
        Corrupt: a checksum, size or format does not hold.
        UnsupportedValue: the checkpoint was written with DCP's stream transforms.
        WrongModel: a tensor would lose by a change of its dtype; nothing was read.
        UnloadableValue: a value is not loaded for safety.
        PeerFailed: another rank of the group has raised.
        Transient, Denied, NotFound: by the store.
    """
    casts = Casts() if casts is None else casts
    reads, failure = _tried(lambda: reads_by_item(index, items))
    source = Source(store, learn_crcs(group, index, reads or {}))
    with contextlib.closing(PageFiller()) as filler, Pool(num_threads, thread_name_prefix="storage-read") as pool:
        prepared = None
        if reads is not None:
            prepared, failure = _tried(lambda: _prepare(source, reads, planner, pool, casts))
        if group.any(failure is not None):
            raise failure or PeerFailed("nothing was read because another rank has failed to")
        assert reads is not None and prepared is not None
        source, requests, traffic = prepared
        received: dict[int, list[Range]] = {}
        if _share(store, group, requests):
            axis = Axis(source.index)
            agreed = agree(group, requests, axis.blocks, axis.starts)
            if len(agreed.plan):
                shared_part_of = _SharedParts(axis, agreed, requests).part
                traffic += PartExchange(group, HostMemory(group), source, agreed, shared_part_of, requests).run(pool)
                received = axis.by_object(received_ranges(agreed.plan, group.rank))
        traffic += _read_rest(source, requests, received, pool, filler)

        for item in list(requests.waiting):
            first = functools.partial(_settle, requests, item, source.verifier(item))
            again = functools.partial(_read_alone, source, {item: reads[item]}, planner, pool, filler, casts)
            traffic += read_verified(store, source.index.object_of(item), first, again)
    return traffic


def _tried(call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What it returns, or what it raises: all ranks go on until each knows whether another has failed."""
    try:
        return call(), None
    except Exception as error:  # noqa: BLE001 - raised by the caller, with all ranks together
        return None, error


def _prepare(
    source: Source, reads: Reads, planner: LoadPlanner, pool: Executor, casts: Casts
) -> tuple[Source, Requests, Traffic]:
    """The source that knows what can be judged only as a whole, the requests, and what the looks at that cost."""
    source, traffic = source.looked_at(list(reads), pool.map)
    return source, requests_of(source, reads, planner, casts), traffic


def _settle(requests: Requests, item: int, verifier: Verifier) -> Traffic:
    requests.settle(item, verifier)
    return Traffic()


def _read_alone(
    source: Source, reads: Reads, planner: LoadPlanner, pool: Executor, filler: PageFiller, casts: Casts
) -> Traffic:
    """Read items once more, by this rank for itself, that are judged only as a whole. Raises Corrupt."""
    own, requests, traffic = _prepare(Source(source.store, source.index), reads, planner, pool, casts)
    traffic += _read_rest(own, requests, {}, pool, filler)
    for item in list(requests.waiting):
        requests.settle(item, own.verifier(item))
    return traffic


def _share(store: ObjectStore, group: Group, requests: Requests) -> bool:
    """Whether the ranks had better send each other what several of them need (`should_share`); a collective."""
    host = BOOT_ID.read_text().strip() if BOOT_ID.exists() else socket.gethostname()
    told = group.all_gather(bytes([bool(requests.striped())]) + host.encode())
    is_host_cached = store.can(Capability.HOST_CACHE)
    is_everywhere = store.can(Capability.ON_EVERY_HOST)  # then all may count as one host
    return should_share(
        ["" if is_everywhere else data[1:].decode() for data in told],
        is_host_cached=is_host_cached,
        has_stripes=any(data[0] for data in told),
    )


def _read_rest(
    source: Source, requests: Requests, received: dict[int, list[Range]], pool: Executor, filler: PageFiller
) -> Traffic:
    """Fetch and deliver what does not come from other ranks."""

    def fetch(part: Part) -> tuple[Part, list[memoryview | None]]:
        views = [requests.view(segment, is_made=False) for segment in part.segments]
        memories = [
            scratch(segment.stop - segment.start) if view is None else view
            for segment, view in zip(part.segments, views, strict=True)
        ]
        source.fetch(part, memories, filler.instead_of)
        return part, [memory if view is None else None for memory, view in zip(memories, views, strict=True)]

    traffic = Traffic()
    parts = plan_parts(requests.places, requests.wants, received)
    with _readers(source, parts, pool) as readers:
        found = (
            map(fetch, parts)
            if readers is None
            else windowed_by_size(readers, fetch, parts, requests.held_bytes, _HELD_SIZE_BYTES)
        )
        for part, memories in found:
            traffic += Traffic(1, part.stop - part.start)
            for segment, memory in zip(part.segments, memories, strict=True):
                if memory is None:
                    requests.filled(segment)
                else:
                    requests.deliver(segment, memory)
    for ring in requests.rings.values():
        ring.drain()
    return traffic


def _readers(source: Source, parts: Sequence[Part], pool: Executor) -> AbstractContextManager[Executor | None]:
    """The pool; where all is in memory, and no server is waited for, a smaller one, or none: by this thread alone."""
    objects = {part.object for part in parts}
    nums = [source.store.num_readers(source.key_of(number)) for number in objects]
    if not nums or None in nums:
        return contextlib.nullcontext(pool)
    num = max(num for num in nums if num is not None)
    return Pool(num, thread_name_prefix="storage-near") if num > 1 else contextlib.nullcontext(None)


class Axis:
    """Finds items by the axis, and places of objects by those of the axis."""

    def __init__(self, index: Index) -> None:
        columns = index.columns
        self.starts = index.axis()
        self._order = np.argsort(self.starts, kind="stable")
        self._start = self.starts[self._order]
        self.blocks = Blocks(self._start, columns.length[self._order], columns.block_size_bytes[self._order])
        self._object = columns.object
        self._offset = columns.offset

    def items(self, start: int, stop: int) -> list[int]:
        """The items that have bytes in the range of the axis, in order; there are some."""
        first = int(np.searchsorted(self._start, start, "right")) - 1
        last = int(np.searchsorted(self._start, stop, "left"))
        found: list[int] = self._order[first:last].tolist()
        return found

    def in_object(self, item: int, place: int) -> int:
        """The byte of the item's object that is at `place` of the axis."""
        return place - int(self.starts[item]) + int(self._offset[item])

    def by_object(self, ranges: Iterable[Range]) -> dict[int, list[Range]]:
        """Ranges of the axis as ranges of objects."""
        found: dict[int, list[Range]] = defaultdict(list)
        for start, stop in ranges:
            item = self.items(start, stop)[0]
            begin = self.in_object(item, start)
            found[int(self._object[item])].append((begin, begin + stop - start))
        return found


class _SharedParts:
    """The shared parts of the plan, with this rank's segments."""

    def __init__(self, axis: Axis, agreed: AgreedPlan, requests: Requests) -> None:
        self._axis = axis
        self._plan = agreed.plan
        self._places = requests.places
        self._wants_of: dict[int, list[Want]] = defaultdict(list)
        for want in requests.wants:
            self._wants_of[want.item].append(want)
        self._segments_of: dict[int, list[Segment]] = {}

    def part(self, number: int) -> SharedPart:
        """Shared part `number`, of which every block is wanted by this rank."""
        start, stop = int(self._plan.start[number]), int(self._plan.stop[number])
        items = self._axis.items(start, stop)
        begin = self._axis.in_object(items[0], start)
        byte_range = (begin, begin + stop - start)
        of = [self._places[item] for item in items]
        segments = itertools.chain.from_iterable(
            clipped(self._segments(item), self._places[item].block_size_bytes, byte_range) for item in items
        )
        before, behind = self._plan.is_cut[number].tolist()
        return SharedPart(
            number, Part(of[0].object, *byte_range, tuple(segments)), long_ranges(of, byte_range, (before, behind))
        )

    def _segments(self, item: int) -> list[Segment]:
        if item not in self._segments_of:
            self._segments_of[item] = item_segments(item, self._places[item], self._wants_of[item])
        return self._segments_of[item]
