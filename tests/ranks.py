"""Run functions on several gloo ranks, in processes that are started once and used for many cases.

::

    def world_sum(value: int) -> int: ...            # a module-level function, importable from the test's module

    def test_sum(ranks: Ranks) -> None:
        assert ranks.run(world_sum, 3, world_size=4) == [12, 12, 12, 12]

Each run gets a process group of its own over the first `world_size` processes. A rank that fails, dies or does not
answer in time fails the run with its number and traceback, and ends all processes; the next run starts new ones.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

_AT_START = dict(os.environ)  # before the first test has changed it

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preloaded"])


TIMEOUT_S = 150.0
"""Of a run: a busy machine takes that long for some."""


_LATE_S = 60.0
"""So much later a rank gives up by itself: that time is over is for the run to say, which ends all of them then."""


class RankFailure(AssertionError):
    """A rank failed; the message holds its number and its traceback."""


class _Job(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    rank: int
    world_size: int
    store: str
    timeout_s: float
    is_losing: bool


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


class Ranks:
    """A pool of processes; grows to the largest world asked for."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def run(self, function: Callable[..., Any], *args: Any, world_size: int, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Call `function(*args)` on every rank, inside an initialised process group; the results by rank.

        Raises:
            RankFailure: a rank raised, died, or did not answer within `timeout_s`.
        """
        results = self._run(function, args, world_size, (), timeout_s)
        return [results[rank] for rank in range(world_size)]

    def run_losing(
        self,
        dying: Collection[int],
        function: Callable[..., Any],
        *args: Any,
        world_size: int,
        timeout_s: float = TIMEOUT_S,
    ) -> dict[int, Any]:
        """The same where the ranks `dying` are killed meanwhile (see `pids`); the results by rank of all that gave one.

        Raises:
            RankFailure: as `run`.
        """
        return self._run(function, args, world_size, dying, timeout_s)

    def pids(self, world_size: int) -> list[int]:
        """The processes of the ranks of the next run."""
        self._grow(world_size)
        return [worker.process.pid or 0 for worker in self._workers[:world_size]]

    def _grow(self, world_size: int) -> None:
        while len(self._workers) < world_size:
            self._workers.append(_start())

    def _run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        world_size: int,
        dying: Collection[int],
        timeout_s: float,
    ) -> dict[int, Any]:
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            self._grow(world_size)
            store = str(Path(folder, "store"))
            for rank, worker in enumerate(self._workers[:world_size]):
                worker.pipe.send(_Job(function, args, rank, world_size, store, timeout_s, bool(dying)))
            try:
                return self._collect(world_size, dying, time.monotonic() + timeout_s)
            except BaseException:
                self.close()
                raise

    def _collect(self, world_size: int, dying: Collection[int], deadline_s: float) -> dict[int, Any]:
        pending = {worker.pipe: rank for rank, worker in enumerate(self._workers[:world_size])}
        results: dict[int, Any] = {}
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise RankFailure(f"no answer in time from ranks {sorted(pending.values())} of {world_size}")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pending.pop(pipe)
                try:
                    error, results[rank] = pipe.recv()
                except (EOFError, OSError):
                    if rank not in dying:
                        raise RankFailure(f"rank {rank} of {world_size} died") from None
                    continue
                if error:
                    raise RankFailure(f"rank {rank} of {world_size}:\n{error}")
        for rank in dying:
            _end([self._workers[rank]])
            self._workers[rank] = _start()
        return results

    def close(self) -> None:
        """End every process, whatever it is doing."""
        _end(self._workers)
        self._workers.clear()


def _end(workers: Collection[_Worker]) -> None:
    for worker in workers:
        worker.pipe.close()
        worker.process.kill()
    for worker in workers:
        worker.process.join()


def _start() -> _Worker:
    ours, theirs = _context.Pipe()
    process = _context.Process(target=_serve, args=(theirs, _AT_START), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(pipe: Connection, environment: dict[str, str]) -> None:
    _restore(environment)  # the process that ranks are forked from has that of the test which first asked for some
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        _restore(environment)  # a test before may have left credentials in it
        try:
            _answer(job, pipe)
        except BaseException:
            pipe.send((traceback.format_exc(), None))


def _restore(environment: dict[str, str]) -> None:
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)


def _answer(job: _Job, pipe: Connection) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        store=dist.FileStore(job.store, job.world_size),
        rank=job.rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=job.timeout_s + _LATE_S),
    )
    try:
        result = job.function(*job.args)
        if not job.is_losing:
            dist.barrier()
    except BaseException:
        # Before the group is left: ranks that wait for this one fail then, and must not be heard first.
        pipe.send((traceback.format_exc(), None))
        return
    finally:
        dist.destroy_process_group()
        gc.collect()  # a group's threads end with its last reference; modules hold theirs in circles
    pipe.send((None, result))


_shared = Ranks()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The pool that all tests share; import it into a `conftest.py`."""
    yield _shared
    _shared.close()
