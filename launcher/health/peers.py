"""Hears of a peer's death from its kernel: a connection to its agent that closes is faster than any lease.

Every node keeps a connection to the liveness listeners of the next two participants in rank order: each is watched by
two, and the cost of a node does not grow with the job. A closed connection alone proves nothing: the peer is reported
only if it then refuses a new one. A host that vanishes or freezes closes nothing; that is left to the lease. But one
whose kernel answers neither the link's keepalives nor a new connection is reported as silent: its lease may stand where
only the way between the two is cut (`launcher.rounds`).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence

from launcher.health.liveness import PeerState, connect, probe
from launcher.lifecycle import Lifecycle
from launcher.rounds.records import Participant

_CONNECT_TIMEOUT_S = 2.0
_NUM_PROBES = 6
_PROBE_PERIOD_S = 0.1
_NUM_SILENT_PROBES = 2
# A link is given up after 2 s without traffic and three keepalives a second apart that are not answered (tcp(7)).
_KEEPALIVE = {socket.TCP_KEEPIDLE: 2, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 3}


class PeerWatch(Lifecycle):
    """Watches the nodes last given to `watch`, from a thread of its own."""

    def __init__(self, report: Callable[[str, str], None], silent: Callable[[str], None]) -> None:
        """Both are called from the watching thread.

        Args:
            report: `report(node_id, reason)` is told of a neighbour that has died.
            silent: `silent(node_id)` is told of one that cannot be reached.
        """
        self._report = report
        self._silent = silent
        self._lock = threading.Lock()
        self._wanted: dict[str, Participant] = {}
        self._closed = False
        self._wake_r = self._wake_w = -1
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._wake_r, self._wake_w = os.pipe()
        self._thread = threading.Thread(target=self._follow, name="peers", daemon=True)
        self._thread.start()

    def watch(self, nodes: Sequence[Participant]) -> None:
        """Watch these nodes and no others."""
        with self._lock:
            self._wanted = {node.node_id: node for node in nodes}
            self._wake()

    def close(self) -> None:
        """Stop watching."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._closed = True
            if thread is None:
                return
            os.write(self._wake_w, b"x")
        thread.join(timeout=5)
        os.close(self._wake_w)
        os.close(self._wake_r)

    def _wake(self) -> None:
        """Have the thread look at what is wanted; to be called with the lock held."""
        if self._thread is not None:
            os.write(self._wake_w, b"x")

    def _follow(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_r, selectors.EVENT_READ)
            links: dict[str, socket.socket] = {}
            while not self._closed:
                self._relink(selector, links)
                for key, _ in selector.select():
                    if key.fd == self._wake_r:
                        os.read(self._wake_r, 4096)
                    elif _ended(key.fileobj):
                        node: Participant = key.data
                        self._unlink(selector, links, node.node_id)
                        self._examine(node)
            for node_id in list(links):
                self._unlink(selector, links, node_id)

    def _relink(self, selector: selectors.BaseSelector, links: dict[str, socket.socket]) -> None:
        with self._lock:
            wanted = dict(self._wanted)
        for node_id in [n for n in links if n not in wanted]:
            self._unlink(selector, links, node_id)
        for node_id, node in wanted.items():
            if node_id in links:
                continue
            try:
                link = connect(node.address, node.port, _CONNECT_TIMEOUT_S)
            except OSError:
                self._examine(node)
                continue
            _keep_alive(link)
            links[node_id] = link
            selector.register(link, selectors.EVENT_READ, data=node)

    def _unlink(self, selector: selectors.BaseSelector, links: dict[str, socket.socket], node_id: str) -> None:
        link = links.pop(node_id)
        selector.unregister(link)
        link.close()

    def _examine(self, node: Participant) -> None:
        """Find out, once a link is gone, whether the peer is dead, out of reach, or only the link was lost."""
        with self._lock:
            wanted = self._wanted
            wanted.pop(node.node_id, None)
        num_silent = 0
        for _ in range(_NUM_PROBES):
            if self._closed:
                return
            match probe(node.address, node.port):
                case PeerState.REFUSED:
                    self._report(node.node_id, f"its agent at {node.address}:{node.port} is gone (connection refused)")
                    return
                case PeerState.SILENT:
                    num_silent += 1
                    if num_silent == _NUM_SILENT_PROBES:
                        self._silent(node.node_id)
                        return
            time.sleep(_PROBE_PERIOD_S)  # a dying process closes its sockets one by one, the listening one perhaps last
        with self._lock:
            wanted[node.node_id] = node  # linked anew, unless others are watched by now
            self._wake()


def _keep_alive(link: socket.socket) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        link.setsockopt(socket.IPPROTO_TCP, option, value)


def _ended(link: object) -> bool:
    assert isinstance(link, socket.socket)
    with contextlib.suppress(OSError):
        return not link.recv(1)
    return True
