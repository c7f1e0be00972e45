"""The embedded store's server: a `Hub` behind a TCP listener, in the first node's agent.

One thread a connection: a client opens one for its calls, one for each watch (a long poll) and one for each lease,
so that no slow call delays a renewal. The store lives as long as this process; its host is a single point of
failure, which is what etcd is for.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import secrets
import socket
import socketserver
import threading
import time
from typing import Any, cast

from launcher.connections import BoundedConnections, num_max
from launcher.errors import Compacted
from launcher.frames import ProtocolError, receive, send
from launcher.kv.base import Entry
from launcher.kv.embedded import wire
from launcher.kv.memory import Hub
from launcher.lifecycle import Lifecycle

log = logging.getLogger(__name__)

MAX_WAIT_S = 5.0
_HANDSHAKE_TIMEOUT_S = 5.0
_GRACE_S = 0.1
"""A handshake is left so much time, two ways there and back, before it may have to go for another."""
IDLE_TIMEOUT_S = 60.0
"""A connection on which nothing is asked for so long is closed. Who uses it again must not come just then."""


def encode_entry(entry: Entry | None) -> dict[str, Any] | None:
    """Return an entry as JSON has it."""
    if entry is None:
        return None
    return {
        "key": entry.key,
        "value": base64.b64encode(entry.value).decode(),
        "revision": entry.revision,
        "create_revision": entry.create_revision,
    }


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        server = cast("_TCPServer", self.server)
        sock = cast(socket.socket, self.request)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.connections.add(sock)
        try:
            if server.stopped.is_set():  # whoever closes all of them may have looked before this one was there
                return
            wire.greet_as_server(sock, server.token, server.store_id, _HANDSHAKE_TIMEOUT_S, server.node_id)
            if not server.strangers.leave(sock):
                return  # it had to go for another
            sock.settimeout(IDLE_TIMEOUT_S)
            while True:
                request = receive(sock, wire.MAX_FRAME_BYTES)
                send(sock, self._answer(server.hub, request))
        except (EOFError, ConnectionError, TimeoutError):
            pass
        except (ProtocolError, OSError) as error:
            if not server.stopped.is_set():
                log.warning("refused %s: %s", self.client_address, error)
        finally:
            server.strangers.leave(sock)
            server.connections.discard(sock)

    def _answer(self, hub: Hub, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return _serve(hub, request)
        except Compacted as error:
            return {"compacted": str(error)}
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            return {"error": f"bad request: {error}"}


def _serve(hub: Hub, request: dict[str, Any]) -> dict[str, Any]:
    match request["op"]:
        case "ping":
            return {}
        case "get":
            return {"entry": encode_entry(hub.get(request["key"]))}
        case "put":
            value = base64.b64decode(request["value"])
            entry = hub.put(request["key"], value, request["if_revision"], request["lease"])
            return {"entry": encode_entry(entry)}
        case "list":
            listing = hub.list(request["prefix"])
            return {"entries": [encode_entry(entry) for entry in listing.entries], "revision": listing.revision}
        case "delete":
            return {"deleted": hub.delete(request["key"], request["if_revision"])}
        case "events":
            wait_s = min(float(request["wait_s"]), MAX_WAIT_S)
            events, next_revision = hub.events(request["prefix"], request["from"], wait_s)
            told = [{"key": e.key, "entry": encode_entry(e.entry), "revision": e.revision} for e in events]
            return {"events": told, "next": next_revision}
        case "grant":
            return {"lease": hub.grant(float(request["ttl_s"]))}
        case "renew":
            return {"alive": hub.renew(request["lease"])}
        case "revoke":
            hub.revoke(request["lease"])
            return {}
        case unknown:
            raise ValueError(f"unknown operation {unknown!r}")


class _TCPServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int], token: str, node_id: str) -> None:
        self.hub = Hub()
        self.token = token
        self.node_id = node_id
        self.store_id = secrets.token_hex(8)
        self.connections: set[socket.socket] = set()
        self.strangers = BoundedConnections(num_max())  # whoever has not shown yet that it knows the token
        self.stopped = threading.Event()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection. Where there are too many strangers, one that has had the time to greet makes room."""
        self.strangers.wait_for_room(_GRACE_S, time.monotonic())
        if (gone := self.strangers.admit(request, client_address[0], time.monotonic())) is not None:
            with contextlib.suppress(OSError):
                gone.shutdown(socket.SHUT_RDWR)  # its thread closes it
        super().process_request(request, client_address)


class EmbeddedServer(Lifecycle):
    """The embedded store, which serves clients between `start` and `close`."""

    def __init__(self, host: str, port: int, *, token: str, node_id: str = "") -> None:
        """`port`: 0 takes any that is free; `self.port` tells which, from `start` on. `node_id`: who hosts it."""
        self.host = host
        self.port = port
        self._token = token
        self._node_id = node_id
        self._server: _TCPServer | None = None

    def start(self) -> None:
        """Listen, and serve on a thread of its own.

        Raises:
            OSError: the address cannot be bound (in use: another node already hosts the store).
        """
        self._server = server = _TCPServer((self.host, self.port), self._token, self._node_id)
        self.port = server.server_address[1]
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="kv-server", daemon=True
        ).start()

    def close(self) -> None:
        """Stop listening and drop every connection."""
        server, self._server = self._server, None
        if server is None:
            return
        server.stopped.set()
        server.shutdown()  # which waits until the thread has left `serve_forever`
        server.server_close()
        server.hub.close()
        for sock in list(server.connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
