"""HTTP/1.1 requests over pooled connections, with bodies that go straight from memory.

What goes wrong on the way comes out as Transient (with its cause) or Denied. A time-out is one without any progress:
a slow transfer that moves goes on.
"""

from __future__ import annotations

import http.client
import re
import select
import socket
import ssl
import struct
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from storage.errors import Cause, Denied, StorageError, Transient
from storage.stores.s3.proxies import Proxy, tunnel_refused
from storage.stores.s3.responses import BoundedResponse, Response, cause_of

T = TypeVar("T")

_SLICE_SIZE_BYTES = 4 * 1024 * 1024
_EARLY_ANSWER_S = 1.0
_TUNNEL_REFUSED = re.compile(r"Tunnel connection failed: (\d{3})")  # as http.client says it


@dataclass(frozen=True, slots=True)
class Address:
    """Where connections go. `ca_bundle`: a PEM file to trust instead of the system's authorities.

    `proxy`: with TLS it is asked for a connection to the address (CONNECT), else to pass each request on.
    """

    host: str
    port: int
    tls: bool
    ca_bundle: str | None = None
    proxy: Proxy | None = None

    def __str__(self) -> str:
        """`https://host:port`, for messages."""
        return f"http{'s' if self.tls else ''}://{self.host}:{self.port}"


class Connections:
    """Keeps connections to one address open between requests, until it is closed.

    Thread-safe; each request has a connection to itself. One that is under way at the close ends as any other.
    """

    def __init__(self, address: Address, connect_timeout_s: float, stall_timeout_s: float) -> None:
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._context = _context(address) if address.tls else None
        self._forwarder = None if address.tls else address.proxy
        self._idle = _Idle()
        weakref.finalize(self, self._idle.close)

    def close(self) -> None:
        """Close what no request uses, and what one uses once it has ended."""
        self._idle.close()

    def exchange(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: Sequence[memoryview],
        consume: Callable[[Response], T],
    ) -> T:
        """Send one request and return what `consume` makes of its answer.

        Raises Transient, Denied, and what `consume` raises.
        """
        if self._forwarder is not None:
            # proxies make a Host of their own from the URL, and the signature holds for the one that was signed
            target, headers = f"http://{headers['Host']}{target}", {**headers, **self._forwarder.headers}
        connection, is_fresh = self._idle.take(), False
        if connection is None:
            connection, is_fresh = self._connect(), True
        may_stay_open = False
        try:
            response = self._ask(connection, method, target, headers, body, is_fresh=is_fresh)
            try:
                return consume(response)
            finally:
                may_stay_open = response.may_stay_open
                response.close()
        finally:
            if may_stay_open:
                self._idle.put(connection)
            else:
                connection.close()

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: Sequence[memoryview],
        *,
        is_fresh: bool,
    ) -> Response:
        try:
            connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            _send(connection.sock, body)
        except OSError as error:
            early = _early_answer(connection)
            if early is None:
                raise self._lost(error, is_fresh=is_fresh) from error
            return early
        try:
            plain = None if self._address.tls else connection.sock
            return Response(connection.getresponse(), plain=plain)
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(error, is_fresh=is_fresh) from error

    def _lost(self, error: Exception, *, is_fresh: bool) -> Transient:
        cause = cause_of(error)
        if cause is Cause.RESET and not is_fresh:
            self._idle.drop()  # what closed this one has closed the others
            return Transient(f"{self._address} had closed an idle connection", Cause.STALE)
        if cause is Cause.STALLED:
            return Transient(f"{self._address} did not move a byte for {self._stall_timeout_s:g} s", cause)
        return Transient(f"{self._address} broke the connection: {error or type(error).__name__}", cause)

    def _connect(self) -> http.client.HTTPConnection:
        place, timeout_s = self._address.proxy or self._address, self._connect_timeout_s
        connection: http.client.HTTPConnection
        if self._context is None:
            connection = http.client.HTTPConnection(place.host, place.port, timeout=timeout_s)
        else:
            connection = http.client.HTTPSConnection(place.host, place.port, timeout=timeout_s, context=self._context)
            if self._address.proxy is not None:
                connection.set_tunnel(self._address.host, self._address.port, dict(self._address.proxy.headers))
        try:
            connection.connect()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise connect_error(self._address, error) from error
        connection.response_class = BoundedResponse
        connection.sock.settimeout(self._stall_timeout_s)
        if self._context is None:
            seconds, fraction = divmod(self._stall_timeout_s, 1)
            connection.sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(fraction * 1e6))
            )
        return connection


class _Idle:
    """Open connections that wait for a request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connections: list[http.client.HTTPConnection] = []
        self._is_closed = False

    def take(self) -> http.client.HTTPConnection | None:
        """Take one that the server has not closed, as far as can be seen; None if there is none."""
        while True:
            with self._lock:
                if not self._connections:
                    return None
                connection = self._connections.pop()
            if not _is_readable(connection.sock):
                return connection
            connection.close()

    def put(self, connection: http.client.HTTPConnection) -> None:
        """Take a connection back that carries no request any more."""
        with self._lock:
            if not self._is_closed:
                self._connections.append(connection)
                return
        connection.close()

    def drop(self) -> None:
        """Close the connections that wait now."""
        with self._lock:
            connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()

    def close(self) -> None:
        """Close the connections that wait, and those that come back later."""
        with self._lock:
            self._is_closed = True
        self.drop()


def connect_error(address: Address, error: Exception) -> StorageError:
    """The error of a connection to `address` that failed: for good (its certificate), or for now.

    Its text holds no password of a proxy.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message or str(error)
        return Denied(f"the certificate of {address} is not trusted ({why}); name its authority in ca_bundle")
    if isinstance(error, ssl.SSLError):
        return Denied(f"{address} speaks no TLS that this host accepts ({error.reason or error}); is it http://?")
    proxy, what, advice = address.proxy, str(address), ""
    if proxy is not None:
        if refused := _TUNNEL_REFUSED.search(str(error)):
            return tunnel_refused(proxy, what, int(refused[1]))
        what, advice = f"the proxy {proxy} of {address}", f"; check {proxy.variable} and NO_PROXY"
    if isinstance(error, socket.gaierror):
        return Transient(f"the name of {what} does not resolve ({error.strerror}){advice}", Cause.UNREACHABLE)
    text = error.strerror if isinstance(error, OSError) else None
    why = "no answer in time" if isinstance(error, TimeoutError) else text or str(error) or type(error).__name__
    return Transient(f"{what} cannot be reached ({why}){advice}", Cause.UNREACHABLE)


def _context(address: Address) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=address.ca_bundle)
    except (OSError, ssl.SSLError) as error:
        raise Denied(f"the ca_bundle {address.ca_bundle} cannot be read: {error}") from None


def _send(sock: socket.socket, body: Sequence[memoryview]) -> None:
    for view in body:
        at = 0
        while at < view.nbytes:  # `sendall` would count its time-out over the whole of it
            at += sock.send(view[at : at + _SLICE_SIZE_BYTES])


def _early_answer(connection: http.client.HTTPConnection) -> Response | None:
    """A server that refuses a body answers and closes before it has all of it."""
    try:
        connection.sock.settimeout(_EARLY_ANSWER_S)
        return Response(connection.getresponse(), is_early=True)
    except (OSError, http.client.HTTPException, AttributeError):
        return None


def _is_readable(sock: socket.socket) -> bool:
    """Whether an idle connection has something to read: then it is its end."""
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLHUP | select.POLLERR)
    return bool(poll.poll(0))
