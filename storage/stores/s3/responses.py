"""HTTP/1.1 responses whose head, body and tail have an end, with bodies that go straight into memory.

A body that ends or breaks before its end is Interrupted, a Transient that knows how many bytes have come.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
from collections.abc import Sequence

from storage.errors import Cause, Interrupted, Transient
from storage.stores.buffers import size_of

_SLICE_SIZE_BYTES = 4 * 1024 * 1024
_UNREAD_SIZE_BYTES = 64 * 1024
"""The most that is read of a body that nobody asked for, or of a refusal: a longer one costs the connection."""
_NUM_INTERIM_MAX = 10
_NUM_TRAILERS_MAX = 100


class TooLong(Exception):
    """A body is longer than anything that was asked for; `size_bytes` is what is known of its length."""

    def __init__(self, message: str, size_bytes: int) -> None:
        super().__init__(message)
        self.size_bytes = size_bytes


class BoundedResponse(http.client.HTTPResponse):
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
        self, response: http.client.HTTPResponse, *, is_early: bool = False, plain: socket.socket | None = None
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
        left = size_of(views)
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
        """Read so much of the body, or all of it if it is shorter. Raises Interrupted."""
        try:
            body = self._response.read(size_bytes)
        except http.client.IncompleteRead as error:
            raise self._broken(f"the body ended after {len(error.partial)} bytes", Cause.TRUNCATED) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(str(error), cause_of(error)) from error
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
            raise self._broken(str(error), cause_of(error)) from error

    def _broken(self, text: str, cause: Cause) -> Interrupted:
        return Interrupted(f"the answer broke off: {text}", cause, self.received_bytes, self.headers.get("ETag", ""))


def error_body(response: Response) -> bytes:
    """The start of a refusal's body; empty where it breaks off."""
    with contextlib.suppress(Transient):
        return response.read_start()
    return b""


def cause_of(error: Exception) -> Cause:
    return Cause.STALLED if isinstance(error, TimeoutError) else Cause.RESET


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
