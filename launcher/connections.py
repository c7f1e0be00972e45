"""Bounds how many connections of strangers are kept, so that they cost a listener's process few of its descriptors.

Whoever connects may be anybody, and may stay without a word. When there are too many, the oldest one has to go, of the
host that has the most: a host that opens a thousand loses its own, and others' stay.
"""

from __future__ import annotations

import collections
import resource
import socket
import threading
from dataclasses import dataclass

NUM_MAX = 256
_NUM_MIN = 8
_PART = 8
"""A process gives an eighth of its descriptors to the strangers at one listener."""


def num_max(wanted: int = NUM_MAX) -> int:
    """Return how many connections of strangers a listener of this process may keep."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(_NUM_MIN, min(wanted, soft // _PART))


@dataclass(frozen=True)
class _Stranger:
    host: str
    since_s: float


class BoundedConnections:
    """The connections that are kept, oldest first. Thread-safe; it closes none, which is for the listener to do."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._connections: dict[socket.socket, _Stranger] = {}
        self._num_of: collections.Counter[str] = collections.Counter()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._connections)

    def admit(self, connection: socket.socket, host: str, now_s: float) -> socket.socket | None:
        """Take a connection in, and return the one that has to be closed for it, if one has."""
        with self._changed:
            gone = self._next_to_go() if len(self._connections) >= self._limit else None
            if gone is not None:
                self._remove(gone)
            self._connections[connection] = _Stranger(host, now_s)
            self._num_of[host] += 1
            return gone

    def leave(self, connection: socket.socket) -> bool:
        """Forget a connection that is closed, or no stranger's any more; returns whether it was still there."""
        with self._changed:
            was_there = connection in self._connections
            if was_there:
                self._remove(connection)
            return was_there

    def wait_for_room(self, grace_s: float, now_s: float) -> None:
        """Wait until there is room, or the connection that has to go next has been there for `grace_s`."""
        with self._changed:
            if len(self._connections) >= self._limit:
                left_s = self._connections[self._next_to_go()].since_s + grace_s - now_s
                self._changed.wait_for(lambda: len(self._connections) < self._limit, max(left_s, 0))

    def _next_to_go(self) -> socket.socket:
        ((host, _),) = self._num_of.most_common(1)
        return next(connection for connection, known in self._connections.items() if known.host == host)

    def _remove(self, connection: socket.socket) -> None:
        host = self._connections.pop(connection).host
        self._num_of[host] -= 1
        if not self._num_of[host]:
            del self._num_of[host]
        self._changed.notify_all()
