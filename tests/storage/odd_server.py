"""A server that answers what no good one does: heads and bodies word for word, also such without an end."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.storage.quiet import QuietServer

Answer = bytes | Iterator[bytes]
"""Head and body."""


def answer(body: bytes = b"", *headers: str, status: str = "200 OK", length: str | None = "") -> bytes:
    """An answer; `length` says another Content-Length than is right, or none."""
    told = ["Connection: close", *([] if length is None else [f"Content-Length: {length or len(body)}"])]
    return "\r\n".join([f"HTTP/1.1 {status}", *told, *headers, "", ""]).encode("latin-1") + body


def endless(head: bytes, piece: bytes) -> Iterator[bytes]:
    """`head`, and then `piece` for ever."""
    yield head
    while True:
        yield piece


def endless_chunks(*headers: str, status: str = "200 OK") -> Iterator[bytes]:
    """A body in chunks without a last one."""
    head = answer(b"", "Transfer-Encoding: chunked", *headers, status=status, length=None)
    return endless(head, b"10000\r\n" + bytes(0x10000) + b"\r\n")


@dataclass
class Odd:
    """Where it listens, and what it sent: some bytes more than were read, which waited in sockets."""

    url: str
    sent_bytes: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def odd_server(respond: Callable[[str, str], Answer]) -> Iterator[Odd]:
    """Serve what `respond` makes of a method and a target, until the end of the block; one answer a connection."""
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                odd.requests.append((self.command, self.path))
                given = respond(self.command, self.path)
            self.close_connection = True
            for piece in [given] if isinstance(given, bytes) else given:
                if stopped.is_set():
                    return
                self.wfile.write(piece)
                with lock:
                    odd.sent_bytes += len(piece)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    stopped = threading.Event()
    server = QuietServer(Handler)
    odd = Odd(f"http://127.0.0.1:{server.server_address[1]}")
    with server:
        try:
            yield odd
        finally:
            stopped.set()
