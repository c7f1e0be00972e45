"""A forwarding HTTP proxy as companies have them: absolute URIs, and CONNECT; with a password if wanted."""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import select
import socket
import threading
from typing import Any, Self
from urllib.parse import quote, urlsplit

from tests.storage.quiet import QuietServer

_POLL_S = 0.05
_CHUNK_SIZE_BYTES = 1 << 16
_OWN_HEADERS = {"connection", "proxy-authorization", "host", "transfer-encoding", "content-length"}


class ForwardProxy:
    """Listens on a port of loopback.

    `seen`: method and URL of what was asked for, a CONNECT's as `host:port`; what was refused is not in it.
    `refuse_status`: answered to every CONNECT, if given.
    """

    def __init__(self, user: str = "", password: str = "", refuse_status: int | None = None) -> None:
        self._user, self._password = user, password
        self.refuse_status = refuse_status
        self.seen: list[tuple[str, str]] = []
        self.closing = threading.Event()
        self._http = _Server(self)

    @property
    def netloc(self) -> str:
        return f"127.0.0.1:{self._http.server_address[1]}"

    @property
    def url(self) -> str:
        """As it stands in HTTP_PROXY."""
        login = f"{quote(self._user, safe='')}:{quote(self._password, safe='')}@" if self._user else ""
        return f"http://{login}{self.netloc}"

    def admits(self, authorization: str | None) -> bool:
        told = base64.b64encode(f"{self._user}:{self._password}".encode()).decode()
        return not self._user or authorization == f"Basic {told}"

    def __enter__(self) -> Self:
        self._http.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._http.__exit__(*error)


class _Server(QuietServer):
    def __init__(self, proxy: ForwardProxy) -> None:
        self.proxy = proxy
        super().__init__(_Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        if not self._is_admitted():
            return
        if url.scheme != "http":
            self._answer(400, [], b"<Error><Code>NoAbsoluteURI</Code></Error>")
            return
        self.server.proxy.seen.append((self.command, self.path))
        upstream = http.client.HTTPConnection(url.netloc, timeout=60)
        with contextlib.closing(upstream):
            # as RFC 9112 (3.2.2) wants it: the Host of the URL, whatever the client's said
            upstream.putrequest(
                self.command, f"{url.path}{f'?{url.query}' if url.query else ''}", skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in _OWN_HEADERS:
                    upstream.putheader(name, value)
            if "Content-Length" in self.headers:
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body or None)
            response = upstream.getresponse()
            answer = response.read()
            headers = [(name, value) for name, value in response.getheaders() if name.lower() not in _OWN_HEADERS]
            length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(answer))
        self._answer(response.status, [*headers, ("Content-Length", length or "0")], answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward

    def do_CONNECT(self) -> None:
        self.close_connection = True
        proxy = self.server.proxy
        if not self._is_admitted():
            return
        if proxy.refuse_status is not None:
            self._answer(proxy.refuse_status, [("Content-Length", "0")], b"")
            return
        proxy.seen.append((self.command, self.path))
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port)), 30) as upstream:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            ways = {self.connection: upstream, upstream: self.connection}
            while not proxy.closing.is_set():
                for source in select.select(list(ways), [], [], _POLL_S)[0]:
                    data = source.recv(_CHUNK_SIZE_BYTES)
                    if not data:
                        return
                    ways[source].sendall(data)

    def _is_admitted(self) -> bool:
        if self.server.proxy.admits(self.headers.get("Proxy-Authorization")):
            return True
        self._answer(407, [("Proxy-Authenticate", "Basic"), ("Content-Length", "0")], b"")
        return False

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers), "", ""]
        self.wfile.write("\r\n".join(lines).encode() + body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests say what they saw."""
