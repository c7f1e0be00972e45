"""The server under the proxies of the tests."""

from __future__ import annotations

import http.server
import threading
from typing import Any, Self


class QuietServer(http.server.ThreadingHTTPServer):
    """On a free port of this machine, with a thread for each connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[http.server.BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join(60)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news here."""
