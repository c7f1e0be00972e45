"""`NodeMemory`: all that a node does about states in memory, in the process that outlives its ranks."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from storage.errors import StorageError
from storage.events import CheckpointEvent
from storage.held.buddies import PeerCard, buddy_of
from storage.held.distrust import Distrust
from storage.held.inventory import HeldPart, Inventory, PartKey
from storage.held.own_memory import descriptors_of
from storage.held.papers import PartLabel
from storage.held.peer_client import Peer
from storage.held.peer_server import CopyRules, PeerServer
from storage.held.rate import RateLimit
from storage.priority import step_back

log = logging.getLogger(__name__)

GRACE_S = 5.0
Tell = Callable[..., None]
"""From an event and its fields; any thread."""


@dataclass(frozen=True)
class NodeIdentity:
    """Who this node is to the others.

    `address` is where it listens, and what the others connect to: a loopback address unless the node was given another.
    `port` is 0 for a free one. A service that is started again keeps `port` and `token`, so that the others still find
    and trust it.
    """

    node: str
    host: str
    zone: str = ""
    address: str = "127.0.0.1"
    port: int = 0
    token: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)


class NodeMemory:
    """Holds parts, serves them, and copies this node's own to a buddy. Thread-safe.

    It holds from the beginning, serves and copies from `start` on, and ends with `close`.

    Args:
        copies: how much it holds for others; None: nothing.
        rate: of the bytes that are copied to the buddy.
        tell: hears events.
        grace_s: how long after nodes have met a new buddy is given what was staged before: while a job restores, it
            needs the machine for itself.
    """

    def __init__(self, copies: CopyRules | None, rate: RateLimit, tell: Tell, grace_s: float = GRACE_S) -> None:
        self._grace_s = grace_s
        self.inventory = Inventory()
        self._copies = copies
        self._rate = rate
        self._tell = tell
        self._server: PeerServer | None = None
        self._card: PeerCard | None = None
        self._distrust = Distrust()
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._buddy: Peer | None = None
        self._due: dict[int, tuple[PartKey, float]] = {}  # by rank its newest part, and from when on it is to be copied
        self._is_copying = False
        self._settling: dict[int, list[Callable[[], object]]] = {}  # by rank who waits for the end of that
        self._thread: threading.Thread | None = None

    def start(self, who: NodeIdentity) -> NodeMemory:
        """Listen as the memory of that node, and begin to copy. Raises OSError."""
        assert self._card is None, "it is started once"
        self._server = PeerServer(self.inventory, who.token, self._copies, self._refused)
        port = self._server.start(who.address, who.port)
        self._card = PeerCard(
            node=who.node, host=who.host, zone=who.zone, address=who.address, port=port, token=who.token
        )
        self._thread = threading.Thread(target=self._copy_all, name="storage-copies", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """End all threads and connections, and let go of all that is held. Closing twice is harmless."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
            buddy, self._buddy = self._buddy, None
        if buddy is not None:
            buddy.close()
        if self._server is not None:
            self._server.close()
        if self._thread is not None:
            self._thread.join()
        self.inventory.drop()

    def card(self) -> PeerCard:
        """See `LocalMemory.card`."""
        assert self._card is not None, "it was not started"
        return self._card

    def meet(self, cards: Sequence[PeerCard]) -> None:
        """See `LocalMemory.meet`. A new buddy is given what is held now, once the job has had time to restore."""
        found = buddy_of(self.card().node, cards)
        with self._changed:
            if found == (self._buddy and self._buddy.card):
                return
            before, self._buddy = self._buddy, None if found is None else Peer(found)
            for label in reversed(self.inventory.own_labels()):
                self._due[label.rank] = (label.attempt, label.rank), time.monotonic() + self._grace_s
            settled = [] if found is not None else [call for calls in self._settling.values() for call in calls]
            self._settling = self._settling if found is not None else {}
            self._changed.notify_all()
        for call in settled:
            call()
        if before is not None:
            before.close()
        log.info("copies go to %s", "nobody" if found is None else f"{found.node} on {found.host}")

    def add(self, part: HeldPart, settled: Callable[[], object] = lambda: None) -> None:
        """Hold what a rank of this node has staged, and copy it to the buddy if that is wanted.

        `settled`, which must not take long, is called once nothing of that rank is on its way there any more, from any
        thread.
        """
        with self._changed:
            is_alone = self._buddy is None
        self.inventory.add(replace(part, is_copied=True) if is_alone else part)  # else one more stays for its copies
        is_due, rank = False, part.label.rank
        if (why := self._distrust.why_not(part.label)) is not None:
            self.drop(None, why)
        elif part.is_copied:
            with self._changed:
                self._due[rank] = part.key, 0.0
                if is_due := self._buddy is not None:
                    self._settling.setdefault(rank, []).append(settled)
                self._changed.notify_all()
        if not is_due:
            settled()

    def labels(self, run: str) -> list[PartLabel]:
        """See `LocalMemory.labels`."""
        return [label for label in self.inventory.labels() if label.run == run]

    def num_restores(self) -> dict[str, int]:
        """See `LocalMemory.num_restores`."""
        return self._distrust.num_restores()

    def descriptors(self, part: PartKey) -> list[int]:
        """See `LocalMemory.descriptors`."""
        with self.inventory.reading(*part) as held:
            return descriptors_of(held)

    def restored(self, attempt: str, step: int) -> None:
        """See `LocalMemory.restored`."""
        self._distrust.restored(attempt, step)

    def make_way(self, seconds: float) -> None:
        """See `LocalMemory.make_way`; here that is what is copied."""
        self._rate.truce.ask(seconds)

    def way_free(self, after_s: float = 0.0) -> None:
        """See `LocalMemory.way_free`."""
        self._rate.truce.end(after_s)

    def drop(self, attempts: Collection[str] | None, reason: str) -> None:
        """See `LocalMemory.drop`. An event, where anything was held."""
        steps = sorted({label.step for label in self.inventory.labels() if not attempts or label.attempt in attempts})
        self._distrust.forget(attempts)
        if self.inventory.drop(attempts):
            self._tell(CheckpointEvent.DISTRUSTED, steps=steps, reason=reason)

    def make_room(self, rank: int) -> bool:
        """See `Inventory.make_room`."""
        return self.inventory.make_room(rank)

    def copied(self, timeout_s: float) -> bool:
        """Wait until nothing is to be copied any more; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._due and not self._is_copying, timeout_s)

    def _copy_all(self) -> None:
        step_back()
        while not self._stop.is_set():
            with self._changed:
                self._is_copying = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stop.is_set() or (self._due and self._buddy is not None))
                if self._stop.is_set() or self._buddy is None:
                    return
                rank, (key, begins_s) = min(self._due.items(), key=lambda due: due[1][1])
                if (left_s := begins_s - time.monotonic()) > 0:
                    self._changed.wait(left_s)
                    continue
                del self._due[rank]
                buddy = self._buddy
                self._is_copying = True
            self._copy(key, buddy)
            with self._changed:
                settled = [] if rank in self._due else self._settling.pop(rank, [])
            for call in settled:
                call()

    def _copy(self, key: PartKey, buddy: Peer) -> None:
        started_s = time.monotonic()
        try:
            with self.inventory.reading(*key) as part:
                if part.label in buddy.labels():
                    return
                fields: dict[str, Any] = {"step": part.label.step, "of_rank": part.label.rank, "to": buddy.name}
                buddy.hold(self.card().node, part, self._rate, self._stop)
                fields["bytes"] = part.label.size_bytes
        except StorageError as error:
            if not self._stop.is_set():
                attempt, rank = key
                self._tell(CheckpointEvent.COPY_FAILED, attempt=attempt, of_rank=rank, to=buddy.name, reason=str(error))
            return
        self._tell(CheckpointEvent.COPIED, **fields, seconds=round(time.monotonic() - started_s, 3))

    def _refused(self, who: str, why: str) -> None:
        self._tell(CheckpointEvent.PEER_REFUSED, address=who, reason=why)
