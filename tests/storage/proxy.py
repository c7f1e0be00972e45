"""A proxy in front of an S3 server that does to requests and answers what networks and servers do.

::

    with FaultProxy(server) as proxy:
        proxy.faults.append(Fault("reset", method="GET", contains=".distcp", times=2))
        store = open_store(proxy.url("run"))

Faults, each for `times` requests that match:

    throttle     503 SlowDown, nothing is passed on
    error        500 InternalError, nothing is passed on
    refuse       503 before the body has been read; then the connection is closed
    lose         passed on, but the answer never comes: the connection is closed
    reset        half of the answer's body, then a reset
    truncate     half of the answer's body, then an orderly end
    stall        half of the answer's body, then nothing more
    slow         the answer's body in drops, each within the stall time-out
    corrupt      one byte of the answer's body is flipped
    corrupt_put  one byte of the request's body is flipped
    twice        passed on, and answered twice
    repeat       passed on twice, and answered once

And permissions, as a policy of the bucket would deny them: `denies` says of a method and a target (unquoted) whether it
is refused, and `hides_missing` answers 403 where there is nothing, as S3 does to those who may not list.

And a `Death`, which kills processes at a moment of a request, and lets it go no further:

    before       nothing is passed on
    middle       half of the request's body is passed on
    after        all of it is passed on and carried out; the answer is lost
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import re
import signal
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from tests.s3 import BUCKET, S3Server
from tests.storage.quiet import QuietServer

KINDS = (
    *("throttle", "error", "refuse", "lose", "reset", "truncate", "stall", "slow"),
    *("corrupt", "corrupt_put", "twice", "repeat"),
)
MOMENTS = ("before", "middle", "after")
_DROPS = 8
_DROP_S = 0.05
_REFUSALS = {
    "throttle": (503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"),
    "refuse": (503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"),
    "error": (500, b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"),
}
_DENIED = (403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
_ON_BODIES = ("reset", "truncate", "stall", "slow", "corrupt")


@dataclass
class Fault:
    """What to do to the next `times` requests by `method` whose target (unquoted) contains `contains`.

    `num_done` counts how often it was done. Faults of an answer's body pass over answers without one.
    """

    kind: str
    method: str = ""
    contains: str = ""
    times: int = 1
    num_done: int = 0

    def matches(self, method: str, target: str) -> bool:
        return self.times > 0 and self.method in ("", method) and self.contains in unquote(target)

    def done(self) -> None:
        self.times -= 1
        self.num_done += 1


@dataclass
class Death(Fault):
    """SIGKILL for the processes `pids` at the next request whose target (unquoted) the pattern `contains` is found in.

    `kind` is one of MOMENTS.
    """

    pids: Sequence[int] = ()

    def matches(self, method: str, target: str) -> bool:
        return self.times > 0 and self.method == method and re.search(self.contains, unquote(target)) is not None

    def strike(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)


class FaultProxy:
    """Listens on a port of loopback; `faults` may change at any time, the first that matches is done.

    `tls`: paths of a certificate and its key (see `tests.certificates`); the way to the server stays plain.
    """

    def __init__(self, server: S3Server, tls: Mapping[str, str] | None = None) -> None:
        self._server = server
        self._scheme = "http" if tls is None else "https"
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        """Of each request, with names in lower case."""
        self.posted: list[bytes] = []
        """The bodies of POST requests."""
        self.denies: Callable[[str, str], bool] = lambda method, target: False
        self.hides_missing = False
        self.lock = threading.Lock()
        self.released = threading.Event()
        self._http = _Server(self)
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls["cert"], tls["key"])
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)

    @property
    def endpoint_url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._http.server_address[1]}"

    @property
    def upstream(self) -> str:
        return urlsplit(self._server.endpoint_url).netloc

    def url(self, prefix: str, **options: object) -> str:
        """A store's URL through the proxy."""
        given = {"endpoint_url": self.endpoint_url, "stall_timeout_s": 30.0, "part_size_mib": 5, **options}
        return f"s3://{BUCKET}/{prefix}?" + "&".join(f"{name}={value}" for name, value in given.items())

    def pick(self, method: str, target: str, headers: Mapping[str, str]) -> Fault | None:
        """The fault for a request, if there is one."""
        with self.lock:
            self.requests.append((method, target))
            self.headers.append({name.lower(): value for name, value in headers.items()})
            found = next((fault for fault in self.faults if fault.matches(method, target)), None)
            if isinstance(found, Death):
                found.done()  # at once: of requests side by side only the first is it
            return found

    def did(self, fault: Fault) -> None:
        with self.lock:
            fault.done()

    def __enter__(self) -> Self:
        self._http.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self._http.__exit__(*error)


class _Server(QuietServer):
    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        super().__init__(_Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _relay(self) -> None:
        proxy = self.server.proxy
        fault = proxy.pick(self.command, self.path, self.headers)  # type: ignore[arg-type]
        if proxy.denies(self.command, unquote(self.path)):
            self._body()
            self._refuse(*_DENIED)
            return
        kind = fault.kind if fault is not None else ""
        if fault is not None and kind in _REFUSALS:
            proxy.did(fault)
            if kind != "refuse":
                self._body()
            self._refuse(*_REFUSALS[kind])
            return
        body = self._body()
        if self.command == "POST":
            proxy.posted.append(body)
        if isinstance(fault, Death):
            self._kill(fault, body)
            return
        if fault is not None and kind == "corrupt_put":
            if not body:
                fault = None
            else:
                proxy.did(fault)
                body = _flipped(body)
        status, headers, answer = self._ask(body)
        if kind == "repeat":
            status, headers, answer = self._ask(body)
        if fault is not None and kind != "corrupt_put" and (answer or kind not in _ON_BODIES):
            proxy.did(fault)
            self._spoil(kind, status, headers, answer)
        elif status == 404 and proxy.hides_missing:
            self._refuse(*_DENIED)
        else:
            self._answer(status, headers, answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _relay

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _kill(self, death: Death, body: bytes) -> None:
        self.close_connection = True
        if death.kind == "middle":
            with contextlib.closing(self._sent(body[: len(body) // 2])):
                death.strike()
            return
        if death.kind == "after":
            status, _, answer = self._ask(body)
            assert status < 300, f"{self.command} {self.path} was refused: {answer!r}"
        death.strike()

    def _sent(self, body: bytes) -> http.client.HTTPConnection:
        """A connection over which this request has gone, with that much of its body."""
        upstream = http.client.HTTPConnection(self.server.proxy.upstream, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders(body or None)
        return upstream

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        with contextlib.closing(self._sent(body)) as upstream:
            response = upstream.getresponse()
            answer = response.read()
            drop = {"connection", "transfer-encoding", "content-length"}
            headers = [(name, value) for name, value in response.getheaders() if name.lower() not in drop]
            length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(answer))
            return response.status, [*headers, ("Content-Length", length or "0")], answer

    def _head(self, status: int, headers: list[tuple[str, str]]) -> bytes:
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers), "", ""]
        return "\r\n".join(lines).encode()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.wfile.write(self._head(status, headers) + body)

    def _refuse(self, status: int, body: bytes) -> None:
        self.close_connection = True
        content = b"" if self.command == "HEAD" else body
        self._answer(status, [("Content-Length", str(len(content))), ("Connection", "close")], content)

    def _spoil(self, kind: str, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        head, half = self._head(status, headers), len(body) // 2
        match kind:
            case "repeat":
                self.wfile.write(head + body)
            case "twice":
                self.wfile.write((head + body) * 2)
            case "corrupt":
                self.wfile.write(head + _flipped(body))
            case "slow":
                self.wfile.write(head)
                size = max(1, -(-len(body) // _DROPS))
                for start in range(0, len(body), size):
                    self.wfile.write(body[start : start + size])
                    self.server.proxy.released.wait(_DROP_S)
            case "stall":
                self.close_connection = True
                self.wfile.write(head + body[:half])
                self.server.proxy.released.wait(60)
            case "truncate":
                self.close_connection = True
                self.wfile.write(head + body[:half])
            case "reset":
                self.close_connection = True
                self.wfile.write(head + body[:half])
                # an end without the orderly close: the peer gets a reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            case "lose":
                self.close_connection = True
            case _:
                raise AssertionError(f"no fault is called {kind!r}")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests say what they saw."""


def _flipped(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
