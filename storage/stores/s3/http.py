"""HTTP/1.1 over pooled connections, with bodies that go straight from and into memory.

What goes wrong on the way comes out as Transient (with its cause) or Denied. A time-out is one without any progress:
a slow transfer that moves goes on.
"""

from __future__ import annotations

import contextlib
import http.client
import io
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

from storage.errors import Cause, Denied, Interrupted, StorageError, Transient
from storage.stores.s3.proxies import Proxy, tunnel_refused

T = TypeVar("T")

_SLICE_SIZE_BYTES = 4 * 1024 * 1024
_UNREAD_SIZE_BYTES = 64 * 1024
"""Of a body that nobody asked for, or that explains a refusal: what goes on for longer costs the connection."""
_NUM_INTERIM_MAX = 10
_NUM_TRAILERS_MAX = 100
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


class TooLong(Exception):
    """A body is longer than anything that was asked for; `size_bytes` is what is known of its length."""

    def __init__(self, message: str, size_bytes: int) -> None:
        super().__init__(message)
        self.size_bytes = size_bytes


class _BoundedResponse(http.client.HTTPResponse):
    """One whose head and tail have an end: `http.client` reads over any number of interim answers and of trailers."""

    _num_heads = 0

    def _read_status(self) -> tuple[str, int, str]:
        self._num_heads += 1
        if self._num_heads > _NUM_INTERIM_MAX:
            raise http.client.HTTPException("no answer after so many interim ones")
        return super()._read_status()  # type: ignore[misc, no-any-return]

    def _read_and_discard_trailer(self) -> None:
        for _ in range(_NUM_TRAILERS_MAX):
            if self.fp.readline(_UNREAD_SIZE_BYTES) in (b"\r\n", b"\n", b""):
                return
        raise http.client.HTTPException("no end of what follows the body")


class Response:
    """A response whose head has come; the body is read by one of the methods.

    `plain`: the socket that the body comes from, if that is one without TLS.
    """

    def __init__(
        self, response: http.client.HTTPResponse, is_early: bool = False, plain: socket.socket | None = None
    ) -> None:
        self._response = response
        self._plain = plain
        self._buffer_is_empty = False
        self._is_early = is_early
        self._length: int | None = response.length
        self.status = response.status
        self.headers = response.headers
        self.received_bytes = 0
        self.is_whole = response.length == 0

    @property
    def may_stay_open(self) -> bool:
        """Whether the connection can carry another request after this one."""
        return self.is_whole and not self._is_early and not self._response.will_close

    def close(self) -> None:
        """Let go of the body. A response that is the last on its connection holds the socket as well."""
        self._response.close()

    def read_into(self, views: Sequence[memoryview]) -> None:
        """Fill the views; raises Interrupted where the body ends or breaks before, and counts what has come."""
        left = sum(view.nbytes for view in views)
        self._body_must_have(left)
        for view in views:
            at = 0
            while at < view.nbytes:
                num_bytes = self._read_some(view[at:])
                if not num_bytes:
                    raise self._broken("the connection was closed in the middle of the body", Cause.TRUNCATED)
                at += num_bytes
                self.received_bytes += num_bytes
        self.is_whole = self.received_bytes == self._length

    def read(self, size_bytes_max: int) -> bytes:
        """The whole body. Raises Interrupted, and TooLong for one that goes on beyond that."""
        if self._length is not None and self._length > size_bytes_max:
            raise TooLong(f"it has {self._length} bytes", self._length)
        body = self.read_start(size_bytes_max + 1)
        if len(body) > size_bytes_max:
            raise TooLong(f"it has no end after {size_bytes_max} bytes", len(body))
        return body

    def read_start(self, size_bytes: int = _UNREAD_SIZE_BYTES) -> bytes:
        """So much of the body, or all of it. Raises Interrupted."""
        try:
            body = self._response.read(size_bytes)
        except http.client.IncompleteRead as error:
            raise self._broken(f"the body ended after {len(error.partial)} bytes", Cause.TRUNCATED) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(str(error), _cause(error)) from error
        if self._length is not None and len(body) < min(self._length, size_bytes):
            raise self._broken(f"the body ended after {len(body)} bytes", Cause.TRUNCATED)
        self.is_whole = self._response.isclosed()
        return body

    def _body_must_have(self, size_bytes: int) -> None:
        if self._length is not None and self._length < size_bytes:
            raise self._broken(f"the body has {self._length} of {size_bytes} bytes", Cause.TRUNCATED)

    def _read_some(self, view: memoryview) -> int:
        try:
            if self._length is None or self._response.chunked:
                return self._response.readinto(view)
            if self._plain is not None:
                if self._buffer_is_empty:
                    return _receive(self._plain, view)
                # asked for as much as it can hold, the file object hands over all that it has
                self._buffer_is_empty = view.nbytes >= io.DEFAULT_BUFFER_SIZE
                return int(self._response.fp.readinto1(view[: io.DEFAULT_BUFFER_SIZE]))
            # one recv, so that a time-out in the middle of a body does not lose count of what has come; beyond the
            # file object's small buffer the bytes go from the socket into `view`
            return int(self._response.fp.readinto1(view[:_SLICE_SIZE_BYTES]))
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(str(error), _cause(error)) from error

    def _broken(self, text: str, cause: Cause) -> Interrupted:
        return Interrupted(f"the answer broke off: {text}", cause, self.received_bytes, self.headers.get("ETag", ""))


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
            response = self._ask(connection, is_fresh, method, target, headers, body)
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
        is_fresh: bool,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: Sequence[memoryview],
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
                raise self._lost(error, is_fresh) from error
            return early
        try:
            plain = None if self._address.tls else connection.sock
            return Response(connection.getresponse(), plain=plain)
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(error, is_fresh) from error

    def _lost(self, error: Exception, is_fresh: bool) -> Transient:
        cause = _cause(error)
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
        connection.response_class = _BoundedResponse
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
        """One that the server has not closed, as far as can be seen."""
        while True:
            with self._lock:
                if not self._connections:
                    return None
                connection = self._connections.pop()
            if not _is_readable(connection.sock):
                return connection
            connection.close()

    def put(self, connection: http.client.HTTPConnection) -> None:
        """Take one back."""
        with self._lock:
            if not self._is_closed:
                self._connections.append(connection)
                return
        connection.close()

    def drop(self) -> None:
        """Close those that wait now."""
        with self._lock:
            connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()

    def close(self) -> None:
        """Close those that wait, and those that come."""
        with self._lock:
            self._is_closed = True
        self.drop()


def connect_error(address: Address, error: Exception) -> StorageError:
    """Why there is no connection to `address`: for good (its certificate), or for now. Holds no password of a proxy."""
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


def error_body(response: Response) -> bytes:
    """The start of a refusal's body; empty where it breaks off."""
    with contextlib.suppress(Transient):
        return response.read_start()
    return b""


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


def _receive(sock: socket.socket, view: memoryview) -> int:
    """Fill the view; less at the end of the stream, or when SO_RCVTIMEO ran out after some bytes had come.

    The kernel waits, in one call: a thread that woke up for every few packets would take the interpreter from the
    others each time. Raises TimeoutError if no byte came in time.
    """
    timeout_s = sock.gettimeout()
    sock.settimeout(None)  # else it would not block, and return what is there
    try:
        return sock.recv_into(view, view.nbytes, socket.MSG_WAITALL)
    except BlockingIOError:
        raise TimeoutError("timed out") from None
    finally:
        sock.settimeout(timeout_s)


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


def _cause(error: Exception) -> Cause:
    return Cause.STALLED if isinstance(error, TimeoutError) else Cause.RESET
