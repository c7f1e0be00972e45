"""Calls on threads, with their results in order."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, wait
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


def before_pools_close(call: Callable[[], object]) -> None:
    """Let `call` be made when the interpreter ends, while the pools of concurrent.futures still take work.

    Their own hook is of this kind, of which there is no public one; hooks run last in, first out, and `atexit` comes
    after them. Nothing if the interpreter is ending already, when nobody opens what would have to be closed before.
    """
    with contextlib.suppress(RuntimeError):
        threading._register_atexit(call)  # type: ignore[attr-defined]


class Pool(Executor):
    """Threads as `ThreadPoolExecutor` has them, which take calls while the interpreter ends, too.

    That one refuses every call from then on, though a thread of the script (`dcp.async_save` has one) may be in the
    middle of a save. Where not even a thread can be started any more, calls are made by whoever hands them in.

    Args:
        at_start: called on each thread before anything else.
    """

    def __init__(
        self,
        num_threads: int,
        thread_name_prefix: str = "storage-pool",
        at_start: Callable[[], object] = lambda: None,
    ) -> None:
        self._num_threads = num_threads
        self._name = thread_name_prefix
        self._at_start = at_start
        self._work = _WorkQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._is_closed = False
        # threads know what is to do, and not the pool: those of one that nobody has any more end
        weakref.finalize(self, self._work.end).atexit = False

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """See `Executor.submit`."""
        future: Future[R] = Future()
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the pool is shut down")
            num_unfinished = self._work.add(future, lambda: fn(*args, **kwargs))
            if num_unfinished <= len(self._threads) or len(self._threads) == self._num_threads or self._start():
                return future
        self._work.work(is_patient=False)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `Executor.shutdown`."""
        with self._lock:
            self._is_closed = True
        if cancel_futures:
            self._work.cancel()
        self._work.end()
        for thread in self._threads if wait else ():
            thread.join()

    def _start(self) -> bool:
        """Start one more thread. Returns whether the pool has any."""
        name = f"{self._name}_{len(self._threads)}"
        # daemons, since the interpreter waits for all others, and an idle one ends with its pool only
        thread = threading.Thread(target=_started, args=(self._at_start, self._work), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return bool(self._threads)
        self._threads.append(thread)
        return True


def _started(at_start: Callable[[], object], work: _WorkQueue) -> None:
    at_start()
    work.work()


class _WorkQueue:
    """The calls that a pool was given, and how many of them have not ended."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._num_unfinished = 0
        self._lock = threading.Lock()

    def add(self, future: Future[R], call: Callable[[], R]) -> int:
        """Take a call; returns how many have not ended, this one included."""
        with self._lock:
            self._num_unfinished += 1
            self._calls.put((future, call))
            return self._num_unfinished

    def work(self, *, is_patient: bool = True) -> None:
        """Make calls until `end`; unless patient, only those that wait now."""
        with contextlib.suppress(queue.Empty):
            while (row := self._calls.get(block=is_patient)) is not None:
                future, call = row
                if future.set_running_or_notify_cancel():
                    _settle(call, future)
                del row, future, call  # what they hold is not kept until the next one comes
                with self._lock:
                    self._num_unfinished -= 1
            self.end()  # the next thread's as well

    def cancel(self) -> None:
        """Cancel what nobody has begun."""
        with contextlib.suppress(queue.Empty):
            while True:
                if (row := self._calls.get(block=False)) is not None:
                    row[0].cancel()

    def end(self) -> None:
        """Let the threads end once all calls are made."""
        self._calls.put(None)


def run_all(pool: Executor, calls: Iterable[Callable[[], R]]) -> list[R]:
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


def run_concurrently(calls: Sequence[Callable[[], R]]) -> list[R]:
    """All results in order, of calls that go at once. Each has ended when this returns or raises.

    Of several failures the first in the order of the calls is raised, whichever came first. Threads of its own rather
    than a pool's: while the interpreter ends no pool takes calls any more, and a commit may be under way.
    """
    outcomes = [Future[R]() for _ in calls]
    with contextlib.ExitStack() as started:
        for call, outcome in list(zip(calls, outcomes, strict=True))[1:]:
            thread = threading.Thread(target=_settle, args=(call, outcome), name="storage-concurrent")
            thread.start()
            started.callback(thread.join)  # also after an interrupt of the wait below
        _settle(calls[0], outcomes[0])
        wait(outcomes)
    return [outcome.result() for outcome in outcomes]


def _settle(call: Callable[[], R], outcome: Future[R]) -> None:
    try:
        outcome.set_result(call())
    except BaseException as error:  # noqa: BLE001 - raised to whoever asks for the result
        outcome.set_exception(error)
        del outcome  # the error's traceback holds this frame: no circle that keeps what it holds


def windowed(pool: Executor, function: Callable[[T], R], arguments: Sequence[T], window: int) -> Iterator[R]:
    """Results in order, with at most `window` of them under way or waiting to be taken."""
    return windowed_by_size(pool, function, arguments, lambda argument: 1, window)


def windowed_by_size(
    pool: Executor,
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
