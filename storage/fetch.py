"""Carry a read plan out: requests in parallel, checksums before any byte counts as read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from storage.checksum import crc32c
from storage.errors import Corrupt, NotFound
from storage.index import Columns, Index
from storage.objects import ObjectStore
from storage.readplan import Part, Segment

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Traffic:
    """What reading cost."""

    num_requests: int = 0
    fetched_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.num_requests + other.num_requests, self.fetched_bytes + other.fetched_bytes)


@dataclass(frozen=True)
class Source:
    """A checkpoint's data objects."""

    store: ObjectStore
    index: Index

    def fetch_part(self, part: Part, buffers: Sequence[memoryview]) -> Traffic:
        """Fetch one part into `buffers` (what `Want.buffer` indexes). Raises Corrupt."""
        memories = _memories(part, buffers)
        views = [view for gap, view in memories for view in (gap, view) if view.nbytes]
        key = self.index.prefix + self.index.objects[part.object].name
        with blaming(key):
            self.store.read_into(key, part.start, views)
        for segment, (_, memory) in zip(part.segments, memories, strict=True):
            _verify(self.index.columns, segment, memory, key)
            if segment.direct is None:
                _copy_wants(segment, memory, buffers)
        return Traffic(1, part.stop - part.start)


@contextlib.contextmanager
def blaming(key: str) -> Iterator[None]:
    """Damage found inside is damage of the data object `key`, and so is its absence. Raises Corrupt."""
    try:
        yield
    except NotFound:
        raise Corrupt(f"{key} is missing", key) from None
    except Corrupt as error:
        raise Corrupt(str(error), key) from error


def _memories(part: Part, buffers: Sequence[memoryview]) -> list[tuple[memoryview, memoryview]]:
    """For each segment, memory for the gap before it and memory for itself."""
    memories, end = [], part.start
    for segment in part.segments:
        gap, size = segment.start - end, segment.stop - segment.start
        end = segment.stop
        if segment.direct is None:
            memories.append((_scratch(gap), _scratch(size)))
        else:
            want = segment.direct
            at = want.at + segment.item_start - want.start
            memories.append((_scratch(gap), buffers[want.buffer][at : at + size]))
    return memories


def _scratch(size_bytes: int) -> memoryview:
    return memoryview(np.empty(size_bytes, np.uint8))  # type: ignore[arg-type]


def _verify(columns: Columns, segment: Segment, memory: memoryview, name: str) -> None:
    size, first = int(columns.block_size_bytes[segment.item]), int(columns.first_crc[segment.item])
    expected = columns.crcs[first + segment.first_block : first + segment.last_block].tolist()
    for index, crc in enumerate(expected):
        if crc32c(memory[index * size : (index + 1) * size]) != crc:
            raise Corrupt(f"{name} is damaged: checksum at byte {segment.start + index * size} does not match", name)


def _copy_wants(segment: Segment, memory: memoryview, buffers: Sequence[memoryview]) -> None:
    origin = segment.item_start
    for want in segment.wants:
        low, high = max(want.start, origin), min(want.stop, origin + memory.nbytes)
        if low < high:
            at = want.at + low - want.start
            buffers[want.buffer][at : at + high - low] = memory[low - origin : high - origin]


def run_all(pool: ThreadPoolExecutor, calls: Iterable[Callable[[], R]]) -> list[R]:
    """All results in order. The first failure cancels what has not started, waits for the rest, and is raised."""
    futures: list[Future[R]] = [pool.submit(call) for call in calls]
    done, pending = wait(futures, return_when=FIRST_EXCEPTION)
    if pending:
        for future in pending:
            future.cancel()
        # buffers belong to the caller again once this returns: nothing may still be writing into them
        wait(pending)
        raise next(error for future in done if (error := future.exception()))
    return [future.result() for future in futures]


def windowed(pool: ThreadPoolExecutor, function: Callable[[T], R], arguments: Sequence[T], window: int) -> Iterator[R]:
    """Results in order, with at most `window` of them under way or waiting to be taken."""
    futures: list[Future[R]] = []
    try:
        for argument in arguments:
            futures.append(pool.submit(function, argument))
            if len(futures) == window:
                yield futures.pop(0).result()
        while futures:
            yield futures.pop(0).result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
