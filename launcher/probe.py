"""Is a peer's agent alive? Each agent listens on a port that does nothing; a refused connection means that it died.

Asked only after a worker failed, so that the lease of a node that is plainly dead need not be waited for. Silence
proves nothing (a slow or cut-off network): such a peer is left to its lease.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from launcher.membership import Node

_TIMEOUT_S = 1.0
_PARALLEL = 32


class Doorbell:
    """A listening socket that accepts and hangs up, for as long as this process lives."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._sock = socket.create_server((address, 0), family=family, backlog=128)
        self.port: int = self._sock.getsockname()[1]
        threading.Thread(target=self._answer, name="doorbell", daemon=True).start()

    def _answer(self) -> None:
        while True:
            try:
                self._sock.accept()[0].close()
            except OSError:
                return

    def close(self) -> None:
        """Stop listening."""
        self._sock.close()


def is_refused(address: str, port: int, timeout_s: float = _TIMEOUT_S) -> bool:
    """Whether a connection is refused: the host answers, and nobody listens there."""
    try:
        socket.create_connection((address, port), timeout=timeout_s).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def report_dead(peers: Iterable[Node], report: Callable[[str, str], None]) -> None:
    """Probe `peers` in parallel, in the background; `report(node_id, reason)` for each that refuses."""

    def probe(peer: Node) -> None:
        if is_refused(peer.address, peer.port):
            report(peer.node_id, f"its agent at {peer.address}:{peer.port} is gone (connection refused)")

    def probe_all() -> None:
        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="probe") as pool:
            list(pool.map(probe, list(peers)))

    threading.Thread(target=probe_all, name="probe", daemon=True).start()
