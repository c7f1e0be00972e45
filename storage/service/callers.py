"""Who is connected to the service: each has a thread, on which what it says is handled."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from storage.service.channel import SaidNothing, close_all, welcome
from storage.service.messages import ProtocolError, ServiceMessage, Welcome
from storage.service.sessions import ServiceCaller, Sessions
from storage.service.surroundings import digest

log = logging.getLogger(__name__)

_NUM_CONNECTIONS_MAX = 256

M = TypeVar("M", bound=ServiceMessage)
Handler = Callable[[ServiceCaller, Any, list[int]], None]
"""Gets the connection, a message, and the descriptors that came with it, which are its own to close."""


class Callers:
    """All connections. Thread-safe.

    Args:
        lock: held while somebody comes or goes, and by who looks at sessions and callers together; a recursive one.
        left: called when one has gone.

    Attributes:
        on_leave: called with each connection that has ended; filled before the first.
    """

    def __init__(self, sessions: Sessions, lock: AbstractContextManager[Any], left: Callable[[], object]) -> None:
        self._sessions = sessions
        self._lock = lock
        self._left = left
        self._welcome = Welcome(pid=os.getpid(), environment=digest(os.environ))
        self._handlers: dict[type[ServiceMessage], Handler] = {}
        self._callers: set[ServiceCaller] = set()
        self._num = self._num_taken = 0
        self.on_leave: list[Callable[[ServiceCaller], object]] = []

    def handle(self, kind: type[M], handler: Callable[[ServiceCaller, M, list[int]], None]) -> None:
        """Have messages of that class handled; before the first connection."""
        self._handlers[kind] = handler

    @property
    def num(self) -> int:
        """How many there are, those among them that have not said who they are."""
        with self._lock:
            return self._num

    @property
    def all(self) -> list[ServiceCaller]:
        """Those that have said who they are."""
        with self._lock:
            return list(self._callers)

    @property
    def sessions(self) -> set[str]:
        """The names of those that are workers."""
        return {caller.session.name for caller in self.all if caller.session is not None}

    def take(self, connection: socket.socket) -> None:
        """Somebody has connected; where there are too many already, or can be no thread for it, that is closed."""
        with self._lock:
            if self._num >= _NUM_CONNECTIONS_MAX:
                connection.close()
                return
            self._num += 1
            self._num_taken += 1
            args = connection, self._num_taken
        try:
            threading.Thread(target=self._serve, args=args, name="caller", daemon=True).start()
        except RuntimeError as error:
            log.warning("a connection cannot be served: %s", error)
            connection.close()
            with self._lock:
                self._num -= 1

    def close(self) -> None:
        """End all connections."""
        for caller in self.all:
            caller.channel.close()

    def _serve(self, connection: socket.socket, number: int) -> None:
        try:
            self._converse(connection, number)
        except Exception as error:  # noqa: BLE001 - whatever one caller has sent, the others are served
            log.warning("a connection was ended: %s: %s", type(error).__name__, str(error).partition("\n")[0])
            connection.close()
        finally:
            with self._lock:
                self._num -= 1
            self._left()

    def _converse(self, connection: socket.socket, number: int) -> None:
        try:
            connection.settimeout(None)
            channel, hello = welcome(connection, self._welcome)
        except (ProtocolError, OSError) as error:
            level = logging.INFO if isinstance(error, SaidNothing) else logging.WARNING
            log.log(level, "a connection was refused: %s", error)
            return
        with self._lock:  # or the session is forgotten in between, and what it waits for is told to nobody
            session = self._sessions.of(hello.session) if hello.session else None
            caller = ServiceCaller(channel, hello, session)
            self._callers.add(caller)
        if session is not None:
            session.attach(channel, hello.pid, number)
        try:
            while (received := channel.receive()) is not None:
                self._dispatch(caller, *received)
        except (ProtocolError, OSError) as error:
            log.warning("a connection of process %d has ended: %s", hello.pid, error)
        finally:
            channel.close()
            if session is not None:
                session.detach(channel)
            with self._lock:
                self._callers.discard(caller)
            for hear in self.on_leave:
                hear(caller)

    def _dispatch(self, caller: ServiceCaller, message: ServiceMessage, fds: list[int]) -> None:
        handler = self._handlers.get(type(message))
        if handler is None:
            close_all(fds)
            raise ProtocolError(f"{type(message).__name__} is not for the service")
        if fds and not message.has_descriptors:
            close_all(fds)
            raise ProtocolError(f"{type(message).__name__} has no descriptors, and {len(fds)} came with it")
        handler(caller, message, fds)
