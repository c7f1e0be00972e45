"""Tells whether a peer's agent lives: each listens on a port that does nothing, and a refused connection means death.

Asked after a worker failed or a neighbour's connection closed, so that the lease of a node that is plainly dead need
not be waited for. Silence proves nothing (a slow or cut-off network): such a peer is left to its lease.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, auto

from launcher.connections import BoundedConnections, num_max
from launcher.lifecycle import Lifecycle
from launcher.rounds.records import Participant

_NUM_CONNECTIONS_MAX = 128  # two neighbours' stay, and others last a moment
_TIMEOUT_S = 1.0
_PARALLEL = 32
_PATIENCE_S = 0.5


class LivenessListener(Lifecycle):
    """A listening socket that says nothing: connections stay open for as long as this process lives.

    A bounded number of them, since anybody may connect. A neighbour whose link has to go for another's opens it anew.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._connections = BoundedConnections(num_max(_NUM_CONNECTIONS_MAX))
        self._port: int | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self) -> None:
        """Listen on a free port.

        Raises:
            OSError: this host has no such address.
        """
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        sock = socket.create_server((self._address, 0), family=family, backlog=128)
        sock.setblocking(False)
        self._port = sock.getsockname()[1]
        self._thread = threading.Thread(target=self._answer, args=(sock,), name="liveness", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens, or has listened until it was closed. Not to be asked before `start`."""
        assert self._port is not None, "not started"
        return self._port

    def _answer(self, sock: socket.socket) -> None:
        connections = self._connections
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_READ)
            while not self._closed:
                for key, _ in selector.select(_PATIENCE_S):
                    if key.fileobj is sock:
                        try:
                            connection, where = sock.accept()
                        except OSError:  # it went away again, or this process has no descriptor to spare
                            time.sleep(0.05)
                            continue
                        selector.register(connection, selectors.EVENT_READ)
                        if (gone := connections.admit(connection, where[0], time.monotonic())) is not None:
                            selector.unregister(gone)
                            gone.close()
                    else:  # a connection that leaves, or that talks: neither is wanted any more
                        assert isinstance(key.fileobj, socket.socket)
                        if connections.leave(key.fileobj):  # else it had to go a moment ago
                            selector.unregister(key.fileobj)
                            key.fileobj.close()
            for registered in list(selector.get_map().values()):
                assert isinstance(registered.fileobj, socket.socket)
                registered.fileobj.close()

    def close(self) -> None:
        """Stop listening and hang up."""
        self._closed = True
        if self._thread is not None:
            self._thread.join(timeout=5)


def connect(address: str, port: int, timeout_s: float) -> socket.socket:
    """Connect to a peer's liveness listener.

    Raises:
        OSError: there is no connection within `timeout_s`.
    """
    return socket.create_connection((address, port), timeout=timeout_s)


class PeerState(Enum):
    """What a probe finds."""

    ALIVE = auto()
    REFUSED = auto()  # the host answers, and nobody listens there
    SILENT = auto()  # neither: a slow, cut-off or missing host


def probe(address: str, port: int, timeout_s: float = _TIMEOUT_S) -> PeerState:
    """Connect to a peer's liveness listener for a moment, and say what that shows."""
    try:
        connect(address, port, timeout_s).close()
    except ConnectionRefusedError:
        return PeerState.REFUSED
    except OSError:
        return PeerState.SILENT
    return PeerState.ALIVE


def is_refused(address: str, port: int, timeout_s: float = _TIMEOUT_S) -> bool:
    """Whether a peer's host refuses a connection: its agent is gone."""
    return probe(address, port, timeout_s) is PeerState.REFUSED


def report_dead(
    peers: Iterable[Participant], dead: Callable[[str, str], None], alive: Callable[[str], None] = lambda _: None
) -> None:
    """Probe `peers` in parallel, in the background; `dead(node_id, reason)` for each that refuses, `alive(node_id)` for
    each that answers."""

    def probe_one(peer: Participant) -> None:
        match probe(peer.address, peer.port):
            case PeerState.REFUSED:
                dead(peer.node_id, f"its agent at {peer.address}:{peer.port} is gone (connection refused)")
            case PeerState.ALIVE:
                alive(peer.node_id)

    def probe_all() -> None:
        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="probe") as pool:
            list(pool.map(probe_one, list(peers)))

    threading.Thread(target=probe_all, name="probe", daemon=True).start()
