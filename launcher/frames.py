"""Sends JSON objects over a stream socket, each after its length in four bytes. Nothing is unpickled."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

HEADER_BYTES = 4


class ProtocolError(ValueError):
    """The other side does not speak this protocol, or does not know the token."""


def send(sock: socket.socket, message: dict[str, Any]) -> None:
    """Send one message."""
    send_body(sock, json.dumps(message, separators=(",", ":")).encode())


def send_body(sock: socket.socket, body: bytes) -> None:
    """Send one frame, whatever is in it."""
    sock.sendall(struct.pack(">I", len(body)) + body)


def receive(
    sock: socket.socket, limit_bytes: int, header: bytes = b"", *, ends_s: float | None = None
) -> dict[str, Any]:
    """Receive one message.

    Args:
        sock: where it comes from.
        limit_bytes: the most that a message may be long.
        header: what has come of its length already.
        ends_s: when all of it must be there, by the monotonic clock, however slowly the other side sends; None: the
            socket's own time-out counts, for each piece of it.

    Raises:
        EOFError: the other side closed the connection.
        TimeoutError: it did not come in time.
        ProtocolError: the frame is too large or is not a JSON object.
    """
    body = receive_body(sock, limit_bytes, header, ends_s=ends_s)
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a frame that is not JSON") from error
    if not isinstance(message, dict):
        raise ProtocolError("a frame that is not a JSON object")
    return message


def receive_body(sock: socket.socket, limit_bytes: int, header: bytes = b"", *, ends_s: float | None = None) -> bytes:
    """Receive one frame, whatever is in it; as `receive`."""
    (size_bytes,) = struct.unpack(">I", header + _exactly(sock, HEADER_BYTES - len(header), ends_s))
    if size_bytes > limit_bytes:
        raise ProtocolError(f"a frame of {size_bytes} bytes, more than {limit_bytes}")
    return _exactly(sock, size_bytes, ends_s)


def _exactly(sock: socket.socket, size_bytes: int, ends_s: float | None) -> bytes:
    data = bytearray()
    while len(data) < size_bytes:
        if ends_s is not None:
            if (left_s := ends_s - time.monotonic()) <= 0:
                raise TimeoutError("a message that did not come in time")
            sock.settimeout(left_s)
        chunk = sock.recv(size_bytes - len(data))
        if not chunk:
            raise EOFError("connection closed")
        data += chunk
    return bytes(data)
