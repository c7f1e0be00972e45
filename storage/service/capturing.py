"""The service's part in live states: keeps what workers stage of them, and has all of a node stage theirs."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from storage.errors import StorageError
from storage.format.manifest import ItemTable, Receipt
from storage.held.inventory import HeldPart
from storage.held.keeping import KeepingStore
from storage.held.papers import Contents, PartLabel, PartPapers
from storage.saving.writing import write_payloads
from storage.service.live_messages import Captured, CaptureLive, CaptureNode, KeepLive, NodeCaptured, WatchLive
from storage.service.messages import Accepted, Rejected
from storage.service.parcels import unpack_slots
from storage.service.server import Server
from storage.service.sessions import ServiceCaller
from storage.service.table import HandedOver
from storage.stores.memory import MemoryStore

log = logging.getLogger(__name__)


@dataclass
class _Watcher:
    """A worker that can stage its live state."""

    rank: int
    generation: int


@dataclass
class _Node:
    """What is known of this node's workers. `kept`: by generation and rank, after which step its state is held; `lost`:
    why one is not that a worker has handed over.
    """

    watchers: dict[ServiceCaller, _Watcher] = field(default_factory=dict)
    answers: dict[int, dict[int, Captured]] = field(default_factory=dict)
    kept: dict[tuple[int, int], int] = field(default_factory=dict)
    lost: dict[tuple[int, int], str] = field(default_factory=dict)
    num_keeping: int = 0


class LiveKeeper:
    """Handles the messages about live states; each connection has a thread of its own.

    Args:
        hold: takes a part in, whose memory is its own from here on.
    """

    def __init__(self, hold: Callable[[HeldPart], object]) -> None:
        self._hold = hold
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._node = _Node()

    def serve(self, server: Server) -> None:
        """Have the server's messages of live states come here; before it runs."""
        server.handle(WatchLive, self._watch)
        server.handle(KeepLive, self._keep)
        server.handle(Captured, self._captured)
        server.handle(CaptureNode, self._capture)
        server.on_leave.append(self._left)

    def _watch(self, caller: ServiceCaller, watch: WatchLive, fds: list[int]) -> None:
        with self._changed:
            self._node.watchers[caller] = _Watcher(watch.rank, watch.generation)
            for known in (self._node.kept, self._node.lost):
                for key in [key for key in known if key[0] < watch.generation]:
                    del known[key]

    def _left(self, caller: ServiceCaller) -> None:
        with self._changed:
            self._node.watchers.pop(caller, None)
            self._changed.notify_all()

    def _keep(self, caller: ServiceCaller, keep: KeepLive, fds: list[int]) -> None:
        """Answer once it is safe from the worker's death; its checksums come after that."""
        with self._changed:
            self._node.num_keeping += 1
        try:
            staged = unpack_slots(fds)
        except (StorageError, ValueError, OSError) as error:
            log.warning("a live state after step %d cannot be taken: %s", keep.attempt.step, error)
            self._end_keeping()
            caller.answer(Rejected(reason=str(error), attempt=keep.attempt.id))
            return
        with contextlib.suppress(OSError):  # it is gone, which is what its state is kept for
            caller.answer(Accepted(attempt=keep.attempt.id))
        try:
            self._hold(part_of(keep, staged))
            with self._changed:
                self._node.kept[keep.origin.generation, keep.attempt.rank] = keep.attempt.step
        except Exception as error:
            log.exception("the live state after step %d cannot be held", keep.attempt.step)
            why = f"the state after step {keep.attempt.step} cannot be held: {type(error).__name__}: {error}"
            with self._changed:
                self._node.lost[keep.origin.generation, keep.attempt.rank] = why
        finally:
            self._end_keeping()

    def _end_keeping(self) -> None:
        with self._changed:
            self._node.num_keeping -= 1
            self._changed.notify_all()

    def _captured(self, caller: ServiceCaller, captured: Captured, fds: list[int]) -> None:
        with self._changed:
            if (answers := self._node.answers.get(captured.number)) is not None:
                answers[captured.rank] = captured
            self._changed.notify_all()

    def _capture(self, caller: ServiceCaller, ask: CaptureNode, fds: list[int]) -> None:
        """Have all workers stage their state, and answer when each has, or is gone, or the time is over."""
        number, ends_s = next(self._numbers), time.monotonic() + ask.timeout_s
        with self._changed:
            asked = dict(self._node.watchers)
            answers = self._node.answers[number] = {}
        for worker in asked:
            try:
                worker.answer(CaptureLive(number=number, timeout_s=ask.timeout_s))
            except OSError as error:
                log.info("a worker cannot be asked for its state: %s", error)

        def is_done() -> bool:
            silent = [w for w, who in asked.items() if w in self._node.watchers and who.rank not in answers]
            return not silent and self._node.num_keeping == 0

        with self._changed:
            self._changed.wait_for(is_done, max(0.0, ends_s - time.monotonic()))
            del self._node.answers[number]
            known = (*self._node.kept, *self._node.lost)
            newest = max([0, *(generation for generation, _ in known), *(who.generation for who in asked.values())])
            steps = {rank: step for (generation, rank), step in self._node.kept.items() if generation == newest}
            missed = {who.rank: "it has not answered in time" for who in asked.values()}
            missed |= {rank: captured.reason for rank, captured in answers.items()}
            missed |= {rank: why for (generation, rank), why in self._node.lost.items() if generation == newest}
        caller.answer(NodeCaptured(steps=steps, missed={r: why for r, why in missed.items() if r not in steps}))


def part_of(keep: KeepLive, staged: HandedOver) -> HeldPart:
    """The part that a worker has staged, with its checksums. Raises StorageError."""
    attempt, origin, contents = keep.attempt, keep.origin, staged.contents
    if contents is None:
        raise StorageError("it does not say what the whole state is")
    objects = KeepingStore(MemoryStore("live"), stores=False)
    entries, items = write_payloads(objects, attempt.prefix, attempt.id, attempt.rank, staged.payloads)
    receipt = Receipt(rank=attempt.rank, attempt=attempt.id, objects=entries, items=ItemTable.of(items))
    label = PartLabel(
        run=keep.url,
        lineage=origin.lineage,
        generation=origin.generation,
        step=attempt.step,
        attempt=attempt.id,
        world_size=attempt.world_size,
        rank=attempt.rank,
        size_bytes=sum(entry.size_bytes for entry in entries),
        is_all=True,
        has_contents=True,
    )
    papers = PartPapers(
        label=label,
        receipt=receipt,
        created_unix_s=time.time(),
        mesh=origin.mesh,
        contents=Contents.of(contents),
    )

    def release() -> None:
        staged.payloads.clear()
        for slot in staged.slots:
            slot.close()

    return HeldPart(papers, objects.objects(attempt.prefix), memories=tuple(staged.slots), release=release)
