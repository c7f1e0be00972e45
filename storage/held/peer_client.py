"""Another node's memory: reading from it, and having it hold a copy."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence

from storage.errors import Corrupt, NotFound, StorageError
from storage.held.buddies import PeerCard
from storage.held.inventory import HeldPart, PartKey
from storage.held.nearest import Nearness
from storage.held.papers import PartLabel, PartPapers, dump_papers, load_labels, load_papers
from storage.held.rate import RateLimit
from storage.held.wire import (
    READ_BYTES_MAX,
    STALL_S,
    AskBytes,
    AskLabels,
    AskPapers,
    Follows,
    HoldCopy,
    Ready,
    Wire,
    WireError,
    greet,
)
from storage.stores.buffers import cut, size_of
from storage.stores.objects import parts_of_size

_CONNECT_S = 3.0
_NUM_IDLE_MAX = 16
_NUM_READS_MAX = 4
"""At once, of one rank: more connections bring no more bytes, and a service has to hear many ranks."""


class Peer:
    """The service of one node, over as many connections as are used at once. Thread-safe.

    `nearness`: OWN for that of this rank's own node. Every method raises Denied, Transient, Corrupt, or NotFound where
    the node does not hold what is asked for.
    """

    def __init__(self, card: PeerCard, nearness: Nearness = Nearness.PEER, stall_s: float = STALL_S) -> None:
        self.card = card
        self._nearness = nearness
        self._stall_s = stall_s
        self._lock = threading.Lock()
        self._idle: list[Wire] = []
        self._reading = threading.BoundedSemaphore(_NUM_READS_MAX)
        self._is_closed = False

    @property
    def nearness(self) -> Nearness:
        """See `ByteSource.nearness`."""
        return self._nearness

    @property
    def name(self) -> str:
        """See `ByteSource.name`."""
        return self.card.node

    def labels(self) -> tuple[PartLabel, ...]:
        """What it holds."""
        with self._connection() as wire:
            wire.send(AskLabels())
            return load_labels(wire.receive_bytes(wire.receive(Follows).length), f"the labels of {self.name}")

    def papers(self, part: PartKey) -> PartPapers:
        """The papers of a part."""
        attempt, rank = part
        with self._connection() as wire:
            wire.send(AskPapers(attempt=attempt, rank=rank))
            data = wire.receive_bytes(wire.receive(Follows).length)
        found = load_papers(data, f"the papers of rank {rank} in attempt {attempt} from {self.name}")
        if (found.label.attempt, found.label.rank) != part:
            raise WireError(f"{self.name} has sent the papers of another part")
        return found

    def read_into(self, part: PartKey, name: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """See `ByteSource.read_into`."""
        attempt, rank = part
        at = offset
        for views in cut(buffers, READ_BYTES_MAX):
            length = size_of(views)
            with self._reading, self._connection() as wire:
                wire.send(AskBytes(attempt=attempt, rank=rank, name=name, offset=at, length=length))
                if wire.receive(Follows).length != length:
                    raise WireError("has sent another number of bytes than it was asked for")
                wire.receive_into(views)
            at += length

    def hold(self, of_node: str, part: HeldPart, rate: RateLimit, stop: threading.Event) -> None:
        """Have it hold a copy of the part, which it compares with the papers' checksums before it says that it does."""
        papers = dump_papers(part.papers)
        with self._connection() as wire:
            wire.send(HoldCopy(of_node=of_node, length=len(papers)), [memoryview(papers)])
            wire.receive(Ready)
            try:
                self._send_objects(wire, part, rate, stop)
                wire.receive(Ready)
            except StorageError:
                wire.close()  # who refuses a copy on its way ends the connection: the rest of it cannot be told apart
                raise

    @staticmethod
    def _send_objects(wire: Wire, part: HeldPart, rate: RateLimit, stop: threading.Event) -> None:
        for entry in part.papers.receipt.objects:
            held = part.objects[entry.name]
            for at, length in parts_of_size(held.size_bytes, rate.bite_bytes):
                if not rate.wait(length, stop):
                    raise WireError("was closed meanwhile")
                wire.send_bytes(held.views(at, length))

    def close(self) -> None:
        """Close all connections that are idle, and those in use when they are given back."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Wire]:
        """A connection for one question and its answer. After an error it is not used again, except for an answer."""
        with self._lock:
            wire = self._idle.pop() if self._idle else None
        try:
            if wire is not None and wire.is_stale():
                wire.close()
                wire = None
            if wire is None:
                wire = self._connect()
            yield wire
        except (NotFound, Corrupt):
            self._give_back(wire)
            raise
        except StorageError as error:
            if wire is not None:
                wire.close()
            raise type(error)(f"{self.name} {error}") from None
        except BaseException:
            if wire is not None:
                wire.close()
            raise
        else:
            self._give_back(wire)

    def _give_back(self, wire: Wire | None) -> None:
        with self._lock:
            if wire is not None and not self._is_closed and len(self._idle) < _NUM_IDLE_MAX:
                self._idle.append(wire)
                return
        if wire is not None:
            wire.close()

    def _connect(self) -> Wire:
        try:
            connection = socket.create_connection((self.card.address, self.card.port), _CONNECT_S)
        except OSError as error:
            raise WireError(f"cannot be reached at {self.card.address}:{self.card.port}: {error}") from None
        wire = Wire(connection, self._stall_s, time.monotonic() + self._stall_s)
        try:
            greet(wire, self.card.token)
        except BaseException:
            wire.close()
            raise
        wire.trust(self._stall_s)
        return wire
