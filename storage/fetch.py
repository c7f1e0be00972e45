"""Carry a read plan out: requests in parallel, checksums before any byte counts as read."""

from __future__ import annotations

import contextlib
from collections import deque
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
from storage.zips import check_zip

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Traffic:
    """What reading cost: of the store, and of the other ranks."""

    num_requests: int = 0
    fetched_bytes: int = 0
    received_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.num_requests + other.num_requests,
            self.fetched_bytes + other.fetched_bytes,
            self.received_bytes + other.received_bytes,
        )


@dataclass(frozen=True)
class Source:
    """A checkpoint's data objects."""

    store: ObjectStore
    index: Index

    def fetch(self, part: Part, memories: Sequence[memoryview]) -> None:
        """Fill the memory of each of the part's segments, and verify it. Raises Corrupt."""
        views, end = [], part.start
        for segment, memory in zip(part.segments, memories, strict=True):
            views += [scratch(segment.start - end), memory]
            end = segment.stop
        views.append(scratch(part.stop - end))
        key = self._key(part)
        with blaming(key):
            self.store.read_into(key, part.start, [view for view in views if view.nbytes])
        self.verify(part, memories)

    def verify(self, part: Part, memories: Sequence[memoryview]) -> None:
        """Compare the segments with their checksums. Raises Corrupt."""
        key = self._key(part)
        for segment, memory in zip(part.segments, memories, strict=True):
            if self.index.is_stock:
                with blaming(key):
                    check_zip(memory, f"{key} at byte {segment.start}")
            else:
                _verify(self.index.columns, segment, memory, key)

    def _key(self, part: Part) -> str:
        return self.index.prefix + self.index.objects[part.object].name


@contextlib.contextmanager
def blaming(key: str) -> Iterator[None]:
    """Damage found inside is damage of the data object `key`, and so is its absence. Raises Corrupt."""
    try:
        yield
    except NotFound:
        raise Corrupt(f"{key} is missing", key) from None
    except Corrupt as error:
        raise Corrupt(str(error), key) from error


def scratch(size_bytes: int) -> memoryview:
    """Memory of nobody else's."""
    return memoryview(np.empty(size_bytes, np.uint8))  # type: ignore[arg-type]


def _verify(columns: Columns, segment: Segment, memory: memoryview, name: str) -> None:
    size, first = int(columns.block_size_bytes[segment.item]), int(columns.first_crc[segment.item])
    expected = columns.crcs[first + segment.first_block : first + segment.last_block].tolist()
    for index, crc in enumerate(expected):
        if crc32c(memory[index * size : (index + 1) * size]) != crc:
            raise Corrupt(f"{name} is damaged: checksum at byte {segment.start + index * size} does not match", name)


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
    return windowed_by_size(pool, function, arguments, lambda argument: 1, window)


def windowed_by_size(
    pool: ThreadPoolExecutor,
    function: Callable[[T], R],
    arguments: Iterable[T],
    size_of: Callable[[T], int],
    size_max: int,
) -> Iterator[R]:
    """Results in order; those under way, or waiting to be taken, have sizes of at most `size_max` in sum, or are one.

    A result counts as taken when the next one is asked for.
    """
    left = iter(arguments)
    following = next(left, None)
    flying: deque[tuple[Future[R], int]] = deque()
    total = 0
    try:
        while flying or following is not None:
            while following is not None and (not flying or total + size_of(following) <= size_max):
                size = size_of(following)
                flying.append((pool.submit(function, following), size))
                total += size
                following = next(left, None)
            future, size = flying[0]
            result = future.result()
            flying.popleft()
            yield result
            del result
            total -= size
    finally:
        for future, _ in flying:
            future.cancel()
        wait([future for future, _ in flying])
