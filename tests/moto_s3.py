"""moto's S3 alone, over connections that stay open: `python -m tests.moto_s3 HOST PORT`.

`python -m moto.server` looks through the folders of its 180 services for each request, starts a thread for it, and
closes the connection, which takes three times as long; and its threads take the interpreter from one another, so that
some requests wait for seconds where many come at once.
"""

from __future__ import annotations

import io
import sys
import threading
from typing import Any

from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple


class KeepingHandler(MotoRequestHandler):
    """Answers one request after the other on a connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are written one after the other

    def run_wsgi(self) -> None:
        """Take the whole body first: what the application leaves of it would be read as the next request."""
        if "Transfer-Encoding" in self.headers:
            super().run_wsgi()
            self.close_connection = True
            return
        del self.headers["Expect"]  # answered when the head was read
        stream, size_bytes = self.rfile, int(self.headers.get("Content-Length") or 0)
        self.rfile = io.BytesIO(stream.read(size_bytes))
        try:
            super().run_wsgi()
        finally:
            self.rfile = stream

    def send_header(self, keyword: str, value: str) -> None:
        """Pass on all but what werkzeug says to each request."""
        if (keyword, value) != ("Connection", "close"):
            super().send_header(keyword, value)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nobody reads it."""


def in_turn(application: Any) -> Any:
    """Of the requests that have come, one is worked on at a time; none waits for another's body or connection."""
    turn = threading.Lock()

    def answer(environ: Any, start_response: Any) -> Any:
        with turn:
            return application(environ, start_response)

    return answer


if __name__ == "__main__":
    host, port = sys.argv[1], int(sys.argv[2])
    run_simple(host, port, in_turn(create_backend_app("s3")), threaded=True, request_handler=KeepingHandler)
