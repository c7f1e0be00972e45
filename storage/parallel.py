"""Calls on threads, with their results in order."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def run_all(pool: ThreadPoolExecutor, calls: Iterable[Callable[[], R]]) -> list[R]:
    """All results in order. The first failure cancels what has not started, waits for the rest, and is raised."""
    futures: list[Future[R]] = [pool.submit(call) for call in calls]
    done, pending = wait(futures, return_when=FIRST_EXCEPTION)
    if pending:
        for future in pending:
            future.cancel()
        # buffers belong to the caller again once this returns: nothing may still be writing into them
        wait(pending)
        raise next(error for future in futures if future in done and (error := future.exception()))
    return [future.result() for future in futures]


def run_abreast(calls: Sequence[Callable[[], R]]) -> list[R]:
    """All results in order, of calls that go at once. Each has ended when this returns or raises.

    Of several failures the first in the order of the calls is raised, whichever came first. Threads of its own rather
    than a pool's: while the interpreter ends no pool takes calls any more, and a commit may be under way.
    """
    outcomes = [Future[R]() for _ in calls]
    with contextlib.ExitStack() as started:
        for call, outcome in list(zip(calls, outcomes, strict=True))[1:]:
            thread = threading.Thread(target=_settle, args=(call, outcome), name="storage-abreast")
            thread.start()
            started.callback(thread.join)  # also after an interrupt of the wait below
        _settle(calls[0], outcomes[0])
        wait(outcomes)
    return [outcome.result() for outcome in outcomes]


def _settle(call: Callable[[], R], outcome: Future[R]) -> None:
    try:
        outcome.set_result(call())
    except BaseException as error:  # noqa: BLE001 - raised to the caller of `run_abreast`
        outcome.set_exception(error)


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
