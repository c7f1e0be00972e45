"""The workers that are connected to the service: which rank of which Checkpointer, and what each has heard."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from storage.events import CheckpointEvent, note_doubtful, note_written
from storage.service.channel import Channel
from storage.service.messages import Ended, Hello, ServiceMessage, Told
from storage.service.processes import began_at, is_alive

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_HEARD_S_MAX = 30.0
"""A worker that does not answer for so long is frozen, or dead without its connection having closed."""


class Session:
    """One rank of one Checkpointer, connected or not. Thread-safe."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._number = 0  # of that connection, or the last
        self._process: tuple[int, int] | None = None  # its pid, and when it began
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[Channel, threading.Event]] = {}  # by which connection each was said
        self._heard: set[int] = set()

    @property
    def is_worker_alive(self) -> bool:
        """Whether the process of that rank runs, be it connected or not."""
        with self._lock:
            return self._process is not None and is_alive(*self._process)

    def attach(self, channel: Channel, pid: int, number: int) -> None:
        """The rank has connected, and `number` connections were taken by then.

        It may have lost that one and made the next before the first is heard of here: the later one counts.
        """
        with self._lock:
            if number > self._number:
                self._number = number
                self._channel, self._process = channel, (pid, began_at(pid))

    def detach(self, channel: Channel) -> None:
        """A connection has ended, maybe after the next has begun; nobody waits any more for what was said by it."""
        with self._lock:
            if self._channel is channel:
                self._channel = None
            for said_by, event in self._waiting.values():
                if said_by is channel:
                    event.set()

    def send(self, message: ServiceMessage) -> None:
        """Send to the worker, if there is one."""
        with self._lock:
            channel = self._channel
        if channel is not None:
            self._say(channel, message)

    def _say(self, channel: Channel, message: ServiceMessage) -> None:
        try:
            channel.send(message)
        except OSError as error:
            log.info("session %s cannot be told: %s", self.name, error)

    def heard(self, number: int) -> None:
        """The worker has dealt with that message."""
        with self._lock:
            self._heard.add(number)
            if (waiting := self._waiting.get(number)) is not None:
                waiting[1].set()

    def listener(self, event: CheckpointEvent, fields: dict[str, Any]) -> None:
        """A `storage.events.Listener`: the worker, if there is one, tells its own listeners and its agent."""
        heard = self._ask(lambda number: Told(number=number, event=str(event), fields=fields))
        if heard:
            note_written(event)
        elif heard is not None:  # killed, say, after it had written that
            note_doubtful(event)

    def end(self, attempt: str, *, committed: bool, fenced: str | None) -> bool:
        """Tell the worker what has become of an attempt; whether it has heard."""
        return bool(self._ask(lambda number: Ended(number=number, attempt=attempt, committed=committed, fenced=fenced)))

    def _ask(self, make: Callable[[int], ServiceMessage]) -> bool | None:
        """Whether it was heard; None where nobody is there to hear it."""
        number, answered = next(self._numbers), threading.Event()
        with self._lock:
            if (channel := self._channel) is None:
                return None
            self._waiting[number] = channel, answered
        self._say(channel, make(number))
        deadline_s = time.monotonic() + _HEARD_S_MAX
        # a child that the worker has forked keeps the connection open when the worker has died
        while not answered.wait(_LOOK_S) and self.is_worker_alive and time.monotonic() < deadline_s:
            pass
        with self._lock:
            del self._waiting[number]
            is_heard = number in self._heard
            self._heard.discard(number)
        return is_heard


class ServiceCaller:
    """One connection, as a handler sees it."""

    def __init__(self, channel: Channel, hello: Hello, session: Session | None) -> None:
        self.channel = channel
        self.hello = hello
        self.session = session

    def answer(self, message: ServiceMessage) -> None:
        """Send to whoever has asked. Raises OSError."""
        self.channel.send(message)


class Sessions:
    """All of them, by name. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}

    def of(self, name: str) -> Session:
        """The session of that name, which is made where there is none."""
        with self._lock:
            return self._sessions.setdefault(name, Session(name))

    def names(self) -> list[str]:
        """Those that there are."""
        with self._lock:
            return list(self._sessions)

    def forget(self, name: str) -> None:
        """Nothing of that session is left to do."""
        with self._lock:
            self._sessions.pop(name, None)
