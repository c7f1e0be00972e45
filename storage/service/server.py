"""The service's process: takes what ranks have staged, brings it to its end, and answers who asks."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from storage.pace.rules import Tier
from storage.saving.uploads import Tried
from storage.service.callers import Callers
from storage.service.channel import close_all
from storage.service.draining import Draining
from storage.service.lanes import Holder, Lane, Safe, Shared
from storage.service.messages import (
    AskStatus,
    AskUnfinished,
    Drain,
    GoOn,
    Heard,
    Rejected,
    ServiceStatus,
    Stage,
    TakenBack,
    Unfinished,
)
from storage.service.pace import Pace
from storage.service.parcels import Parcel, TakenOver
from storage.service.sessions import ServiceCaller, Sessions

log = logging.getLogger(__name__)

_TICK_S = 0.25
_YIELD_S = 10.0
"""From the last step before a change of workers to the next ones' restore, at most."""


@dataclass(frozen=True)
class ServerOptions:
    """How a service behaves.

    Args:
        rate_bytes_per_s: at most so much is sent to stores; None: as fast as it goes.
        num_storing_max: how many ranks' parts are stored at once.
        linger_s: it ends when nobody has been connected, and nothing was to do, for so long.
        orphan_s: what is unfinished is given up so long after its agent has gone without a word.
        wind_up_s: so long, at least, what was given up may take to say so.
    """

    rate_bytes_per_s: float | None = None
    num_storing_max: int = 4
    linger_s: float = 10.0
    orphan_s: float = 300.0
    wind_up_s: float = 1.0


class Server:
    """Serves one listening socket, from `run` until there is nothing more to do or `stop` is called.

    Args:
        safe: keeps what was staged, should this process die.
        holder: keeps staged states in memory.
        lifeline: a descriptor that ends (is at its end of file) with the agent that has started the service.

    Attributes:
        on_leave, handle: see `Callers`.
        truce: while it lasts nothing is sent to stores.
    """

    def __init__(
        self,
        listener: socket.socket,
        options: ServerOptions,
        safe: Safe,
        *,
        holder: Holder | None = None,
        lifeline: int | None = None,
        num_restarts: int = 0,
    ) -> None:
        self._listener = listener
        self._options = options
        self._lifeline = lifeline
        self._num_restarts = num_restarts
        self._safe = safe
        self._pace = Pace(options.rate_bytes_per_s)
        self.truce = self._pace.truce
        storing = threading.Semaphore(options.num_storing_max)
        self._shared = Shared(self._pace, safe, holder, storing, self._lane_is_idle)
        self._lock = threading.RLock()
        self._sessions = Sessions()
        self._lanes: dict[str, Lane] = {}
        self._num_ended = 0
        self._callers = Callers(self._sessions, self._lock, self._tidy)
        self._drain: Draining | None = None
        self._drained: list[ServiceCaller] = []
        self._stop = threading.Event()
        self.on_leave = self._callers.on_leave
        self.handle = self._callers.handle
        self.handle(Stage, self._stage)
        self.handle(GoOn, self._go_on)
        self.handle(Heard, self._heard)
        self.handle(TakenBack, self._taken_back)
        self.handle(AskUnfinished, self._unfinished)
        self.handle(AskStatus, self._status)
        self.handle(Drain, self._begin_drain)

    def has(self, stage: Stage) -> bool:
        """Whether that save is in a lane, or its worker connected, of which not all may have been heard. Any thread."""
        with self._lock:
            if stage.session in self._callers.sessions:
                return True
            lane = self._lanes.get(stage.session)
        return lane is not None and any(parcel.safe == stage.name for parcel in lane.unfinished)

    def take_up(self, records: Sequence[TakenOver]) -> None:
        """Go on with what a process before this one had taken over."""
        for record in records:
            self._take(record)

    def run(self) -> None:
        """Serve. Returns when there is nothing more to do."""
        self._listener.settimeout(_TICK_S)
        idle_since_s, orphaned_s = time.monotonic(), None
        while not self._stop.is_set():
            self._accept()
            now_s = time.monotonic()
            for lane in self._all_lanes():
                lane.watch()
            is_busy = self._is_busy()
            if is_busy:
                idle_since_s = now_s
            if self._look_at_drain(now_s):
                break
            if self._has_owner():
                continue
            orphaned_s = now_s if orphaned_s is None else orphaned_s
            if now_s - orphaned_s >= self._options.orphan_s and self._all_unfinished():
                self._give_up("whoever had started the service has gone")
            if not is_busy and now_s - idle_since_s >= self._options.linger_s:
                break
        self._end()

    def stop(self) -> None:
        """Let `run` return; what is under way is given up."""
        self._stop.set()

    # --- connections

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except TimeoutError:
            return
        except OSError as error:
            log.warning("a connection was not taken: %s", error)
            self._stop.wait(_TICK_S)
            return
        self._callers.take(connection)

    # --- what callers want

    def _stage(self, caller: ServiceCaller, stage: Stage, fds: list[int]) -> None:
        if self._drain is not None or self._pace.stop.is_set():
            close_all(fds)
            caller.answer(Rejected(reason="the service is ending", attempt=stage.attempt.id))
            return
        if stage.yields:
            self.truce.ask(_YIELD_S)
        try:
            self._take(TakenOver(stage.name, stage, fds, is_intact=stage.tried is not Tried.STORED))
        except RuntimeError as error:
            log.warning("step %d is left to its worker: %s", stage.attempt.step, error)
            close_all(fds)
            self._safe.released(stage.name)
            self._safe.done(stage.name)
            caller.answer(Rejected(reason=f"the service cannot take a save over: {error}", attempt=stage.attempt.id))

    def _take(self, record: TakenOver) -> None:
        """Take a save over: have it kept, and leave all else to its lane. The training would go on by now.

        Raises:
            RuntimeError: there can be no thread for it.
        """
        stage = record.stage
        self._safe.keep(record.safe, stage, record.fds)
        with self._lock:
            session = self._sessions.of(stage.session)
            lane = self._lanes.get(stage.session)
            if lane is None:
                lane = self._lanes[stage.session] = Lane(session, self._shared)
            lane.put(Parcel(record))

    def _go_on(self, caller: ServiceCaller, told: GoOn, fds: list[int]) -> None:
        with self._lock:
            lane = self._lanes.get(caller.session.name) if caller.session is not None else None
        if lane is not None:
            lane.go_on(told.attempt)

    def _heard(self, caller: ServiceCaller, heard: Heard, fds: list[int]) -> None:
        if caller.session is not None:
            caller.session.heard(heard.number)

    def _taken_back(self, caller: ServiceCaller, told: TakenBack, fds: list[int]) -> None:
        with self._lock:
            lane = self._lanes.get(caller.hello.session)
        if lane is not None:
            lane.take_back(told.attempts)

    def _unfinished(self, caller: ServiceCaller, ask: AskUnfinished, fds: list[int]) -> None:
        parcels = [parcel for parcel in self._all_unfinished() if parcel.stage.url == ask.url and not parcel.has_ended]
        attempts = tuple(parcel.stage.attempt for parcel in parcels if parcel.stage.tier is Tier.STORE)
        caller.answer(Unfinished(attempts=attempts))

    def _status(self, caller: ServiceCaller, ask: AskStatus, fds: list[int]) -> None:
        unfinished = self._all_unfinished()
        caller.answer(
            ServiceStatus(
                pid=os.getpid(),
                num_unfinished=len(unfinished),
                staged_bytes=sum(parcel.size_bytes for parcel in unfinished),
                num_ended=self._num_ended_now(),
                num_restarts=self._num_restarts,
            )
        )

    def _begin_drain(self, caller: ServiceCaller, drain: Drain, fds: list[int]) -> None:
        with self._lock:
            if self._drain is None:
                self.truce.end_all()  # what is to be stored in time begins now
                self._drain = Draining(self._num_ended_now(), self._options.wind_up_s)
            self._drain.ask(time.monotonic(), drain.grace_s)
            self._drained.append(caller)

    # --- the end

    def _look_at_drain(self, now_s: float) -> bool:
        """Whether everything has ended that was under way when the drain began, or nothing more is waited for."""
        if self._drain is None:
            return False
        num_unfinished = len(self._all_unfinished())
        match self._drain.look(now_s, num_unfinished):
            case Draining.Word.WAIT:
                return False
            case Draining.Word.GIVE_UP:
                self._give_up("this node leaves, and its time is over")
                return False
        done = self._drain.outcome(self._num_ended_now(), num_unfinished)
        for caller in self._drained:
            try:
                caller.answer(done)
            except OSError as error:
                log.info("the end of the drain cannot be told: %s", error)
        return True

    def _give_up(self, reason: str) -> None:
        """Have what is under way end: its parts are not stored, and other ranks are told."""
        log.warning("%d saves are given up: %s", len(self._all_unfinished()), reason)
        self._pace.reason = reason
        self._stop_all()

    def _stop_all(self) -> None:
        self._pace.stop.set()
        for lane in self._all_lanes():
            lane.go_on()  # to the same end: what waits is said to have failed, too
            lane.stop()

    def _end(self) -> None:
        self._stop_all()
        self._listener.close()
        self._callers.close()

    def _has_owner(self) -> bool:
        """Whether somebody will still want the service: the agent that has started it, or who is connected."""
        if self._lifeline is not None:
            if not _is_at_end(self._lifeline):
                return True
            os.close(self._lifeline)
            self._lifeline = None
        return self._callers.num > 0

    def _is_busy(self) -> bool:
        return self._callers.num > 0 or bool(self._all_unfinished())

    def _all_lanes(self) -> list[Lane]:
        with self._lock:
            return list(self._lanes.values())

    def _all_unfinished(self) -> list[Any]:
        return [parcel for lane in self._all_lanes() for parcel in lane.unfinished]

    def _num_ended_now(self) -> int:
        with self._lock:  # or a lane that is forgotten in between counts on neither side
            return self._num_ended + sum(lane.num_ended for lane in self._lanes.values())

    def _lane_is_idle(self, lane: Lane) -> None:
        self._tidy()

    def _tidy(self) -> None:
        """Forget sessions of which nobody is connected and nothing is left to do."""
        with self._lock:
            connected = self._callers.sessions
            for name in self._sessions.names():
                lane = self._lanes.get(name)
                if name in connected or (lane is not None and lane.unfinished):
                    continue
                if lane is not None:
                    self._num_ended += lane.num_ended
                    del self._lanes[name]
                self._sessions.forget(name)


def _is_at_end(fd: int) -> bool:
    """Whether everybody has gone who could write to that pipe."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))
