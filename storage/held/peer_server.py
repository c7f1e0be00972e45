"""Serves what a node holds to the services and ranks of others, who know its token, and takes copies in for them."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from storage.errors import Corrupt, Denied, NotFound, StorageError, Transient
from storage.format.sealed import Document
from storage.held.copy_buffer import Allocate, CopyBuffer
from storage.held.inventory import HeldPart, Inventory
from storage.held.papers import PartPapers, dump_labels, dump_papers, load_papers
from storage.held.strangers import Strangers
from storage.held.wire import (
    STALL_S,
    AskBytes,
    AskLabels,
    AskPapers,
    Follows,
    HoldCopy,
    OddMessage,
    PeerRefusal,
    Ready,
    Wire,
    WireError,
    welcome,
)
from storage.priority import step_back

log = logging.getLogger(__name__)

_NUM_CONNECTIONS_MAX = 256
_NUM_STRANGERS_MAX = 64
_IDLE_S = 600.0
_GREETING_S = 5.0
_GREETING_S_MIN = 1.0  # where others wait for one to go
_TEXT_MAX = 1000


@dataclass(frozen=True)
class CopyRules:
    """How much of others' parts a node holds: `allocate` finds the memory, of `bytes_max` in all.

    `keep` sees each that is to be held, and returns what is held in its place.
    """

    allocate: Allocate
    bytes_max: int
    keep: Callable[[HeldPart], HeldPart] = lambda part: part


class PeerServer:
    """Listens from `start` to `close`, a thread for each connection.

    Args:
        inventory: what is served, and where copies come.
        token: what the other side has to know.
        copies: None where this node takes no copies.
        refused: hears why a connection was refused.
    """

    def __init__(
        self,
        inventory: Inventory,
        token: str,
        copies: CopyRules | None,
        refused: Callable[[str, str], None] = lambda who, why: None,
    ) -> None:
        self._inventory = inventory
        self._token = token
        self._copies = copies
        self._refused = refused
        self._listener: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        self._threads: list[threading.Thread] = []  # of connections; those that have ended go when another one comes
        self._wires: set[Wire] = set()
        self._strangers = Strangers[Wire](_NUM_STRANGERS_MAX, _GREETING_S_MIN)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._reserving = threading.Lock()
        self._reserved_bytes = 0  # of copies on their way in, which the inventory does not count yet
        self._is_closed = False

    def start(self, address: str = "127.0.0.1", port: int = 0) -> int:
        """Listen; the port, which is a free one where none is given. Raises OSError."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, port), family=family, backlog=128)
        self._accepting = threading.Thread(target=self._accept, name="storage-peers", daemon=True)
        self._accepting.start()
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        """End all connections and threads. Closing twice is harmless."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._listener is not None and self._accepting is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._accepting.join()  # from here on nobody comes any more
            self._listener.close()
        with self._lock:
            wires, threads = list(self._wires), list(self._threads)
        for wire in wires:
            wire.close()
        for thread in threads:
            thread.join()

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError as error:
                with self._lock:
                    if self._is_closed:
                        return
                log.warning("a connection of a peer cannot be accepted: %s", error)
                time.sleep(0.05)  # of too many descriptors there are fewer later
                continue
            wire = Wire(connection, _GREETING_S, time.monotonic() + _GREETING_S)
            if not self._take_in(wire, address[0]):
                wire.close()
                continue
            thread = threading.Thread(target=self._converse, args=(wire, address[0]), name="storage-peer", daemon=True)
            try:
                with self._lock:
                    thread.start()
                    self._threads = [*(other for other in self._threads if other.is_alive()), thread]
            except RuntimeError as error:  # the system has no thread left, for the moment
                log.warning("a connection of a peer cannot be served: %s", error)
                self._let_go(wire)

    def _take_in(self, wire: Wire, who: str) -> bool:
        """Wait until there is room for one more stranger; whether there is."""
        with self._changed:
            # many ranks may come at once: those that are too many wait in the backlog until others are known
            while not self._is_closed and (wait_s := self._strangers.wait_s(time.monotonic())) > 0:
                self._changed.wait(wait_s)
            if self._is_closed or len(self._wires) >= _NUM_CONNECTIONS_MAX:
                return False
            gone = self._strangers.take_in(wire, who, time.monotonic())
            self._wires.add(wire)
        if gone is not None:
            log.info("a connection that had not told in time who it is was closed, as others wait")
            gone.close()
        return True

    def _converse(self, wire: Wire, who: str) -> None:
        try:
            welcome(wire, self._token)
            self._is_known(wire)
            wire.trust(STALL_S)
            while True:
                wire.wait(_IDLE_S)
                self._answer(wire, wire.receive(AskLabels, AskPapers, AskBytes, HoldCopy))
        except Denied as error:
            self._refused(who, str(error))
        except OddMessage as error:
            log.warning("the connection of %s was ended: it %s", who, error)
        except StorageError as error:
            log.debug("the connection of %s ends: %s", who, error)
        except Exception as error:  # noqa: BLE001 - whatever one has sent, the others are served
            log.warning("the connection of %s ends: %s: %s", who, type(error).__name__, str(error).partition("\n")[0])
        finally:
            self._let_go(wire)

    def _let_go(self, wire: Wire) -> None:
        with self._lock:
            self._wires.discard(wire)
        self._is_known(wire)
        wire.close()

    def _is_known(self, wire: Wire) -> None:
        """It has told who it is, or has gone."""
        with self._changed:
            self._strangers.leave(wire)
            self._changed.notify_all()

    def _answer(self, wire: Wire, asked: Document) -> None:
        """Answer one question. Raises WireError where the connection is of no more use."""
        try:
            if isinstance(asked, AskBytes):
                self._send_bytes(wire, asked)
            elif isinstance(asked, HoldCopy):
                self._hold(wire, asked)
            else:
                wire_bytes = self._papers(asked)
                wire.send(Follows(length=len(wire_bytes)), [memoryview(wire_bytes)])
        except WireError:
            raise
        except (NotFound, Corrupt, Transient) as error:
            cause = next(kind for kind in (NotFound, Corrupt, Transient) if isinstance(error, kind))
            wire.send(PeerRefusal(cause=cause.__name__, text=str(error)[:_TEXT_MAX]))
        except Exception as error:
            text = f"cannot make anything of that: {type(error).__name__}: {error}"
            with contextlib.suppress(WireError):
                wire.send(PeerRefusal(cause="Transient", text=text[:_TEXT_MAX]))
            raise  # what is on its way behind it cannot be told from a question

    def _papers(self, asked: Document) -> bytes:
        if isinstance(asked, AskPapers):
            with self._inventory.reading(asked.attempt, asked.rank) as part:
                return dump_papers(part.papers)
        return dump_labels(self._inventory.labels())

    def _send_bytes(self, wire: Wire, asked: AskBytes) -> None:
        with self._inventory.reading(asked.attempt, asked.rank) as part:
            held = part.objects.get(asked.name)
            if held is None:
                raise NotFound(f"{asked.name} is no object of that part")
            if asked.offset + asked.length > held.size_bytes:
                stop = asked.offset + asked.length
                raise Corrupt(f"{asked.name} ends at {held.size_bytes}, wanted bytes up to {stop}")
            wire.send(Follows(length=asked.length), held.views(asked.offset, asked.length))

    def _hold(self, wire: Wire, asked: HoldCopy) -> None:
        """Take a copy in. Nothing of it is held before all of it is what its papers say."""
        step_back()  # who sends copies reads nothing on that connection that a restore would wait for
        papers = load_papers(wire.receive_bytes(asked.length), f"the papers from {asked.of_node}")
        with self._buffer(papers, asked.of_node) as buffer:
            try:
                wire.send(Ready())
                for view in buffer.bites():
                    wire.receive_into([view])
            except BaseException as error:
                buffer.close()
                if not isinstance(error, Corrupt):
                    raise
                with contextlib.suppress(WireError):
                    wire.send(PeerRefusal(cause="Corrupt", text=str(error)[:_TEXT_MAX]))
                # the rest is on its way, so nothing else can be said on this connection
                raise OddMessage(f"has sent a damaged copy of {asked.of_node}'s: {error}") from None
            assert self._copies is not None, "there is a buffer"
            self._inventory.add(self._copies.keep(buffer.part()))
        wire.send(Ready())

    @contextlib.contextmanager
    def _buffer(self, papers: PartPapers, of_node: str) -> Iterator[CopyBuffer]:
        """Memory for a copy, which counts as reserved within the block; others come in beside it. Raises Transient."""
        if self._copies is None:
            raise Transient("holds no copies")
        self._inventory.prepare(papers.label, of_node)
        size_bytes, bytes_max = papers.label.size_bytes, self._copies.bytes_max
        with self._reserving:
            held_bytes = self._inventory.copied_bytes + self._reserved_bytes
            if held_bytes + size_bytes > bytes_max:
                raise Transient(
                    f"holds {held_bytes} bytes of copies, and {size_bytes} more would be more than {bytes_max}"
                )
            self._reserved_bytes += size_bytes
        try:
            try:
                buffer = CopyBuffer(papers, of_node, self._copies.allocate)
            except (MemoryError, OSError) as error:
                raise Transient(f"has no memory for a copy of {size_bytes} bytes: {error}") from None
            yield buffer
        finally:
            with self._reserving:
                self._reserved_bytes -= size_bytes
