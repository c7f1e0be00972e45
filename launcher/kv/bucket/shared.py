"""A `Journal` for the threads of one process: steps carried out on a register, changes of all in few versions."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from launcher.errors import Compacted, KVUnavailable
from launcher.kv.base import WatchEvent
from launcher.kv.bucket.journal import Journal
from launcher.kv.bucket.ops import Op, Result
from launcher.kv.bucket.register import Create, Pause, Read, Register, Request, Steps, Together, answer
from launcher.kv.bucket.version import version_name
from launcher.kv.state import State

log = logging.getLogger(__name__)

T = TypeVar("T")

_STALE_S = 12 * 3600.0  # of a client's knowledge: well below what keeps a name taken
_PARALLEL = 16
_NEWEST_WEIGHT = 0.25
_LONGEST_PAUSE_S = 2.0
"""A store that stood still for a while is asked again soon: leases have to be renewed."""
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # the first goes on while the machine hibernates


def elapsed_s() -> float:
    """Seconds on a clock that no suspension of the machine stops."""
    return time.clock_gettime(_CLOCK)


class Settled(NamedTuple):
    """What came of each change, and a monotonic time before which none was made."""

    results: tuple[Result, ...]
    since_s: float


class _Asked:
    """Changes that a thread waits for."""

    def __init__(self, ops: tuple[Op, ...]) -> None:
        self.ops = ops
        self.settled: Settled | None = None
        self.error = ""
        self.is_taken = False


class SharedJournal:
    """What this process knows of the store. All methods may be called from any thread."""

    def __init__(self, register: Register, pause_s: float, on_news: Callable[[], None]) -> None:
        """`on_news` is called when a version was learnt, by whichever thread did, with a lock held."""
        self.closed = threading.Event()
        self._register = register
        self._pause_s = pause_s
        self._on_news = on_news
        self._lock = threading.Lock()  # of the journal while its steps are carried out
        self._synced_s = elapsed_s()  # at this time the newest version was known
        self._looked_s = -math.inf  # at this time a version after the newest known one was asked for
        self._request_s = 0.0  # what one takes, of late
        self._unwritten_s = 0.0  # then what is being changed was in no version yet
        self._queue: deque[_Asked] = deque()
        self._journal = self._anew()

    def _anew(self) -> Journal:
        name_size_bytes_max = self._register.name_size_bytes_max
        return Journal(lambda: uuid.uuid4().hex[:20], self._pause_s, name_size_bytes_max=name_size_bytes_max)

    @property
    def number(self) -> int:
        """The newest version that is known."""
        return self._journal.number

    @property
    def state(self) -> State:
        """The store as of that version; it does not change."""
        return self._journal.state

    @property
    def age_s(self) -> float:
        """For how long it has not been looked whether there is a newer one."""
        return elapsed_s() - self._synced_s

    @property
    def unlooked_s(self) -> float:
        """For how long no next version was asked for. One that was found may not have been the newest."""
        return elapsed_s() - self._looked_s

    def look(self) -> State:
        """Learn what is there by now, and return it.

        Raises:
            KVUnavailable
        """
        with self._lock:
            self._forget_if_stale()
            self._carry_out(self._journal.catch_up())
            return self._journal.state

    def look_unless_busy(self) -> None:
        """As `look`, unless another thread is at the store: it may take seconds, and learns what is there by itself.

        Raises:
            KVUnavailable
        """
        if self._lock.acquire(blocking=False):
            try:
                self._forget_if_stale()
                self._carry_out(self._journal.catch_up())
            finally:
                self._lock.release()

    def peek(self, unless_within_s: float = 0.0) -> float:
        """Learn whether there is something new; whoever does so often knows all of it a little later.

        Not again, if another thread did so while this one waited for it, `unless_within_s` ago. Returns for how many
        seconds the store was asked: how long a thread that has something changed takes tells nothing of the store.

        Raises:
            KVUnavailable
        """
        with self._lock:
            if self.unlooked_s < unless_within_s:
                return 0.0
            began_s = time.monotonic()
            self._forget_if_stale()
            self._carry_out(self._journal.peek())
            return time.monotonic() - began_s

    def change(self, *ops: Op) -> Settled:
        """Carry out `ops` in one version, with what other threads want by then.

        Raises:
            KVUnavailable: it may have happened, or may happen later.
        """
        asked = _Asked(ops)
        self._queue.append(asked)
        with self._lock:
            if not asked.is_taken:  # else another thread has taken it along
                self._change_all()
        if asked.settled is None:
            raise KVUnavailable(asked.error)
        return asked.settled

    def _change_all(self) -> None:
        batch = [self._queue.popleft() for _ in range(len(self._queue))]
        for asked in batch:
            asked.is_taken = True
        why = "interrupted"
        try:
            self._forget_if_stale()
            self._unwritten_s = time.monotonic()
            results = self._carry_out(self._journal.change([op for asked in batch for op in asked.ops]))
            for asked in batch:
                asked.settled = Settled(results[: len(asked.ops)], self._unwritten_s)
                results = results[len(asked.ops) :]
        except KVUnavailable as error:
            why = str(error)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise
        finally:
            for asked in batch:
                asked.error = why

    def events(self, prefix: str, from_revision: int) -> tuple[tuple[WatchEvent, ...], int]:
        """What is known to have changed from a revision on, and the revision to ask from next.

        Raises:
            Compacted: some of it is forgotten.
            KVUnavailable
        """
        with self._lock:
            journal = self._journal
            if journal.number == 0:
                self._carry_out(journal.catch_up())
            try:
                found = journal.events(prefix, from_revision)
            except Compacted:
                self._carry_out(journal.look_back(from_revision))
                found = journal.events(prefix, from_revision)
            return found, max(from_revision, journal.state.revision + 1)

    def read_all(self, names: Sequence[str]) -> list[bytes | KVUnavailable | None]:
        """Read several objects; None for what is not there, a KVUnavailable for what cannot be read now."""
        return self._answer_all(tuple(map(Read, names)))

    def take_litter(self) -> tuple[list[int], list[str]]:
        """The versions that this client has written, and the objects that nobody needs; each once."""
        with self._lock:
            journal = self._journal
            authored, journal.authored = journal.authored, []
            litter, journal.litter = journal.litter, []
        return authored, litter

    # --- steps, carried out

    def _forget_if_stale(self) -> None:
        """Begin anew where this process was stopped for so long that a name it takes for free may have been in use."""
        if self.age_s > _STALE_S:
            log.warning("this process was stopped for hours: what it knows of the store is void")
            self._journal = self._anew()

    def _carry_out(self, steps: Steps[T]) -> T:
        """Do the steps; with the lock held.

        Raises:
            KVUnavailable
        """
        if self.closed.is_set():
            raise KVUnavailable("this client is closed")
        before = self._journal.number
        try:
            request = next(steps)
            while True:
                try:
                    told = self._answer(request)
                except KVUnavailable as error:
                    request = steps.throw(error)
                else:
                    request = steps.send(told)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            if self._journal.number != before:
                self._on_news()

    def _answer(self, request: Request) -> Any:
        match request:
            case Pause(seconds, num_requests):  # a store that is asked too much answers later: it is asked less then
                least_s = min(num_requests * self._request_s, _LONGEST_PAUSE_S)
                self.closed.wait(max(seconds, least_s) * random.uniform(0.5, 1.5))
                return None
            case Together(requests):
                return self._answer_all(requests)
        return self._ask(request)

    def _answer_all(self, requests: tuple[Any, ...]) -> list[Any]:
        def ask(request: Request) -> Any:
            try:
                return self._ask(request)
            except KVUnavailable as error:
                return error

        if len(requests) < 2:
            return list(map(ask, requests))
        with ThreadPoolExecutor(min(_PARALLEL, len(requests) - 1), thread_name_prefix="kv-together") as pool:
            others = pool.map(ask, requests[1:])
            return [ask(requests[0]), *others]

    def _ask(self, request: Request) -> Any:
        """Have a request answered; note where that shows that the newest version is known."""
        asked_s, now_s = elapsed_s(), time.monotonic()
        next_version = version_name(self._journal.number + 1)
        told = answer(self._register, request)
        self._request_s += _NEWEST_WEIGHT * (time.monotonic() - now_s - self._request_s)
        if isinstance(request, Read | Create) and request.name == next_version:
            self._looked_s = asked_s
        match request:
            case Read(name) if told is None and name == next_version:
                self._synced_s = asked_s
                if not self._journal.is_granted:
                    self._unwritten_s = now_s
            case Create(name) if told and name == next_version:
                self._synced_s, self._unwritten_s = asked_s, now_s
        return told
