"""How nodes' services talk about what they hold: typed messages after their length, and raw bytes behind some.

    server  Hello(version, nonce)
    client  Proof(version, nonce, proof)         HMAC-SHA256 of the token over both nonces
    server  Proved(proof)                        the same with the sides swapped; or PeerRefusal
    client  a request ...
    server  its answer; PeerRefusal where it has none

Nothing is unpickled, and no message is longer than its kind may be. Data is compared with the papers' checksums by
whoever uses it: one of the way alone would not find what the other side has wrong.
"""

from __future__ import annotations

import contextlib
import hmac
import math
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from storage.errors import Cause, Corrupt, Denied, NotFound, StorageError, Transient
from storage.format.sealed import Document
from storage.stores.buffers import skip

PROTOCOL = 1
MESSAGE_BYTES_MAX = 64 * 1024
PAPERS_BYTES_MAX = 256 * 1024 * 1024
READ_BYTES_MAX = 64 * 1024 * 1024
STALL_S = 10.0
"""Whoever sends nothing for so long in the midst of a message, or does not answer, is given up."""
_HEADER = struct.Struct(">I")
_NUM_VIEWS_AT_ONCE = 512  # of a sendmsg: IOV_MAX is 1024

Attempt_ = Annotated[str, Field(pattern=r"^[0-9a-f-]{8,64}$")]
Rank_ = Annotated[int, Field(ge=0, lt=1 << 20)]
Offset_ = Annotated[int, Field(ge=0, lt=1 << 62)]
Hex_ = Annotated[str, Field(pattern=r"^[0-9a-f]{16,128}$")]


class PeerHello(Document):
    """The server's first word."""

    kind: Literal["hello"] = "hello"
    version: int
    nonce: Hex_


class PeerProof(Document):
    """The client knows the token."""

    kind: Literal["proof"] = "proof"
    version: int
    nonce: Hex_
    proof: Hex_


class PeerProved(Document):
    """So does the server."""

    kind: Literal["proved"] = "proved"
    proof: Hex_


class PeerRefusal(Document):
    """Why there is no answer: `cause` is the name of an error."""

    kind: Literal["refusal"] = "refusal"
    cause: Literal["NotFound", "Denied", "Corrupt", "Transient"]
    text: str = Field(max_length=4096)


class AskLabels(Document):
    """Which parts are held: `Follows`, with labels behind it."""

    kind: Literal["labels"] = "labels"


class AskPapers(Document):
    """A part's papers: `Follows`, with them behind it."""

    kind: Literal["papers"] = "papers"
    attempt: Attempt_
    rank: Rank_


class AskBytes(Document):
    """Bytes of an object of a part: `Follows`, with them behind it."""

    kind: Literal["bytes"] = "bytes"
    attempt: Attempt_
    rank: Rank_
    name: str = Field(max_length=256)
    offset: Offset_
    length: int = Field(ge=1, le=READ_BYTES_MAX)


class HoldCopy(Document):
    """Hold a copy of a part of `of_node`, whose papers of `length` bytes are behind it, and then its objects in order.

    `Ready` says that the objects may come, and a second one that they are held.
    """

    kind: Literal["hold"] = "hold"
    of_node: str = Field(min_length=1, max_length=256)
    length: int = Field(ge=1, le=PAPERS_BYTES_MAX)


class Follows(Document):
    """So many bytes are behind it."""

    kind: Literal["follows"] = "follows"
    length: int = Field(ge=0, le=PAPERS_BYTES_MAX)


class Ready(Document):
    """Go on."""

    kind: Literal["ready"] = "ready"


Message_ = Annotated[
    PeerHello | PeerProof | PeerProved | PeerRefusal | AskLabels | AskPapers | AskBytes | HoldCopy | Follows | Ready,
    Field(discriminator="kind"),
]
_message: TypeAdapter[Document] = TypeAdapter(Message_)
_REFUSALS: dict[str, type[StorageError]] = {
    "NotFound": NotFound,
    "Denied": Denied,
    "Corrupt": Corrupt,
    "Transient": Transient,
}

D = TypeVar("D", bound=Document)


class WireError(Transient):
    """The other side does not speak this protocol, or has broken off."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Cause.RESET)


class OddMessage(WireError):
    """The other side has sent what it must not."""


class Wire:
    """One connection; for one thread at a time. What it raises for the other side's faults is a StorageError.

    `ends_s`, by the monotonic clock: when all that is received must be there, however slowly the other side sends.
    """

    def __init__(self, connection: socket.socket, stall_s: float = STALL_S, ends_s: float = math.inf) -> None:
        connection.settimeout(stall_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._stall_s = stall_s
        self._ends_s = ends_s

    def trust(self, stall_s: float = STALL_S) -> None:
        """Wait for as long as for one who is known, from here on."""
        self._stall_s, self._ends_s = stall_s, math.inf
        self._socket.settimeout(stall_s)

    def send(self, message: Document, behind: Sequence[memoryview] = ()) -> None:
        """Send a message, and bytes behind it. Raises WireError."""
        body = message.model_dump_json().encode()
        views = [memoryview(_HEADER.pack(len(body)) + body), *(view for view in behind if view.nbytes)]
        self.send_bytes(views)

    def send_bytes(self, views: Sequence[memoryview]) -> None:
        """Send bytes. Raises WireError."""
        try:
            self._socket.settimeout(self._stall_s)
            while views:
                views = skip(views, self._socket.sendmsg(views[:_NUM_VIEWS_AT_ONCE]))
        except OSError as error:
            raise WireError(f"takes nothing any more: {error}") from None

    def receive(self, *kinds: type[D]) -> D:
        """The next message, one of those kinds. Raises what the other side refuses by, and WireError."""
        (length,) = _HEADER.unpack(self.receive_bytes(_HEADER.size))
        if length > MESSAGE_BYTES_MAX:
            raise OddMessage(f"has sent a message of {length} bytes, more than {MESSAGE_BYTES_MAX}")
        try:
            message = _message.validate_json(self.receive_bytes(length))
        except ValidationError:
            raise OddMessage("has sent what is no message of this protocol") from None
        if isinstance(message, PeerRefusal):
            raise _REFUSALS[message.cause](message.text)
        for kind in kinds:
            if isinstance(message, kind):
                return message
        raise OddMessage(f"has sent a message that was not asked for: {type(message).__name__}")

    def receive_bytes(self, length: int) -> bytes:
        """So many bytes. Raises WireError."""
        data = bytearray(length)
        self.receive_into([memoryview(data)])
        return bytes(data)

    def receive_into(self, views: Sequence[memoryview]) -> None:
        """Fill the views with the bytes that come next. Raises WireError."""
        for view in views:
            at = 0
            while at < view.nbytes:
                left_s = self._ends_s - time.monotonic()
                try:
                    self._socket.settimeout(max(min(self._stall_s, left_s), 0.001))
                    num_bytes = self._socket.recv_into(view[at:])
                except OSError as error:
                    raise WireError(f"sends nothing any more: {error}") from None
                if not num_bytes:
                    raise WireError("has closed the connection")
                at += num_bytes

    def wait(self, timeout_s: float) -> None:
        """Wait for the next message to begin, for longer than within one. Raises WireError."""
        try:
            self._socket.settimeout(timeout_s)
            begun = self._socket.recv(1, socket.MSG_PEEK)
        except OSError as error:
            raise WireError(f"has said nothing: {error}") from None
        if not begun:
            raise WireError("has closed the connection")

    def is_stale(self) -> bool:
        """Whether the other side has closed the connection, or has said what nobody asked for."""
        try:
            return bool(select.select([self._socket], [], [], 0.0)[0])
        except (OSError, ValueError):
            return True

    def close(self) -> None:
        """Close the connection; a thread that waits for it wakes up."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def welcome(wire: Wire, token: str) -> None:
    """The server's side of the first words. Raises Denied, and WireError."""
    mine = secrets.token_hex(16)
    wire.send(PeerHello(version=PROTOCOL, nonce=mine))
    told = wire.receive(PeerProof)
    if told.version != PROTOCOL:
        raise _refused(wire, f"speaks protocol {PROTOCOL} and not {told.version}: give all nodes one elastic-moe")
    if not hmac.compare_digest(told.proof, _proof(token, "client", mine, told.nonce)):
        raise _refused(wire, "the token is not this node's")
    wire.send(PeerProved(proof=_proof(token, "server", told.nonce, mine)))


def greet(wire: Wire, token: str) -> None:
    """The client's side of the first words. Raises Denied, and WireError."""
    told = wire.receive(PeerHello)
    if told.version != PROTOCOL:
        raise Denied(f"speaks protocol {told.version} and not {PROTOCOL}: give all nodes one elastic-moe")
    mine = secrets.token_hex(16)
    wire.send(PeerProof(version=PROTOCOL, nonce=mine, proof=_proof(token, "client", told.nonce, mine)))
    if not hmac.compare_digest(wire.receive(PeerProved).proof, _proof(token, "server", mine, told.nonce)):
        raise Denied("does not know its own token: somebody else answers at its address")


def _refused(wire: Wire, text: str) -> Denied:
    wire.send(PeerRefusal(cause="Denied", text=text))
    return Denied(text)


def _proof(token: str, side: str, *nonces: str) -> str:
    return hmac.digest(token.encode(), ":".join((side, *nonces)).encode(), "sha256").hex()
