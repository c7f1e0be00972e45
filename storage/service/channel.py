"""A connection between a process and the service of its node: messages and descriptors, over a Unix socket.

The socket lies in a folder that is its owner's alone, and both ends look whether the other is of the same user.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

from storage.service.address import short_path
from storage.service.messages import (
    PROTOCOL_VERSION,
    Hello,
    ProtocolError,
    Rejected,
    ServiceMessage,
    Welcome,
    dump,
    load,
)
from storage.service.processes import is_elsewhere

MESSAGE_SIZE_BYTES_MAX = 64 * 1024 * 1024
"""What is larger is no message: state and tables go by descriptor."""
_FDS_MAX = 4
_HEAD = struct.Struct("!4sBI")  # magic, number of descriptors, size of the message
_MAGIC = b"EMcs"
_SEND_S_MAX = 30.0  # a process that is stopped does not read
_HANDSHAKE_S = 30.0


class SaidNothing(ProtocolError):
    """Somebody has connected, and gone: who only wants the service to be there does."""


class Channel:
    """One end of a connection. Any thread may send; one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        timeout = struct.pack("ll", int(_SEND_S_MAX), 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    @property
    def peer_uid(self) -> int:
        """The user of the process at the other end."""
        _, uid, _ = _credentials(self._socket)
        return uid

    def send(self, message: ServiceMessage, fds: Sequence[int] = ()) -> None:
        """Send a message, and copies of descriptors with it. Raises OSError where nobody reads."""
        body = dump(message)
        if len(body) > MESSAGE_SIZE_BYTES_MAX:
            raise OSError(f"a message of {len(body)} bytes is not sent; {MESSAGE_SIZE_BYTES_MAX} is the most")
        data = memoryview(_HEAD.pack(_MAGIC, len(fds), len(body)) + body)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with self._sending:
            sent = self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)
            if sent < len(data):
                self._socket.sendall(data[sent:], socket.MSG_NOSIGNAL)

    def receive(self) -> tuple[ServiceMessage, list[int]] | None:
        """The next message and its descriptors, which are the caller's to close; None at the end of the connection.

        Raises ProtocolError, OSError.
        """
        fds: list[int] = []
        try:
            head = self._read(_HEAD.size, fds)
            if head is None:
                return None
            magic, num_fds, size_bytes = _HEAD.unpack(head)
            if magic != _MAGIC or num_fds > _FDS_MAX or size_bytes > MESSAGE_SIZE_BYTES_MAX:
                raise ProtocolError("the other side does not speak this protocol")
            body = self._read(size_bytes, fds)
            if body is None:
                return None
            if len(fds) != num_fds:
                raise ProtocolError(f"{num_fds} descriptors were announced, and {len(fds)} came")
            message = load(bytes(body))
        except BaseException:
            close_all(fds)
            raise
        return message, fds

    def limit_receive(self, timeout_s: float) -> None:
        """Let `receive` raise TimeoutError where nothing comes for so long."""
        self._socket.settimeout(timeout_s)

    def fileno(self) -> int:
        """To wait for messages by."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the connection, for a thread that receives as well."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size_bytes: int, fds: list[int]) -> bytearray | None:
        data = bytearray(size_bytes)
        view, got = memoryview(data), 0
        room = socket.CMSG_SPACE(_FDS_MAX * array.array("i").itemsize)
        while got < size_bytes:
            count, rights, flags, _ = self._socket.recvmsg_into([view[got:]], room, socket.MSG_CMSG_CLOEXEC)
            for level, kind, payload in rights:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    found = array.array("i")
                    found.frombytes(payload[: len(payload) - len(payload) % found.itemsize])
                    fds.extend(found)
            if flags & socket.MSG_CTRUNC or len(fds) > _FDS_MAX:
                raise ProtocolError("more descriptors came than a message may have")
            if count == 0:
                if got:
                    raise ProtocolError("the connection ended within a message")
                return None
            got += count
        return data


def connect(path: Path, hello: Hello) -> tuple[Channel, Welcome]:
    """Connect to the service at `path`.

    Raises:
        OSError: nobody listens there, or another user does.
        ProtocolError: it is of another version; the message says of which.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    channel = Channel(connection)
    try:
        connection.settimeout(_HANDSHAKE_S)
        with short_path(path) as short:
            connection.connect(short)
        if channel.peer_uid not in (os.getuid(), 0):
            raise PermissionError(f"the service at {path} is user {channel.peer_uid}'s, not this user's")
        with contextlib.suppress(BrokenPipeError):  # a service that has refused it already has said why
            channel.send(hello)
        answer = channel.receive()
        if answer is None:
            raise ConnectionResetError(f"the service at {path} has closed the connection")
        message, fds = answer
        close_all(fds)
        if isinstance(message, Rejected):
            raise ProtocolError(message.reason)
        if not isinstance(message, Welcome) or message.version != PROTOCOL_VERSION:
            raise ProtocolError(f"the service at {path} answers with another protocol than version {PROTOCOL_VERSION}")
        connection.settimeout(None)
    except BaseException:
        channel.close()
        raise
    return channel, message


def welcome(connection: socket.socket, answer: Welcome) -> tuple[Channel, Hello]:
    """Receive a `Hello`, and answer it. Raises ProtocolError, OSError; the connection is closed then."""
    channel = Channel(connection)
    try:
        if channel.peer_uid not in (os.getuid(), 0):
            channel.send(
                Rejected(reason=f"this service is user {os.getuid()}'s; user {channel.peer_uid} may not use it")
            )
            raise ProtocolError(f"refused user {channel.peer_uid}")
        connection.settimeout(_HANDSHAKE_S)
        received = channel.receive()
        if received is None:
            raise SaidNothing("it said nothing")
        hello, fds = received
        close_all(fds)
        if not isinstance(hello, Hello) or hello.version != PROTOCOL_VERSION:
            version = hello.version if isinstance(hello, Hello) else "?"
            reason = f"the service speaks version {PROTOCOL_VERSION} of its protocol, and not {version}"
            channel.send(Rejected(reason=reason))
            raise ProtocolError(reason)
        if hello.session and is_elsewhere(hello.pid_space):
            reason = (
                f"process {hello.pid} is of another PID namespace than the checkpoint service, which would not see it "
                "die: let both run in one"
            )
            channel.send(Rejected(reason=reason))
            raise ProtocolError(reason)
        channel.send(answer)
        connection.settimeout(None)
    except BaseException:
        channel.close()
        raise
    return channel, hello


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that came and are not wanted."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return pid, uid, gid
