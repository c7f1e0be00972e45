"""The server under the proxies of the tests."""

from __future__ import annotations

import http.server
from typing import Any


class QuietServer(http.server.ThreadingHTTPServer):
    """On a free port of this machine, with a thread for each connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[http.server.BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news here."""
