"""The node's memory of states, in the service: holds what is staged before it is stored, and answers about it."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from storage.agent import AgentEnvironment
from storage.arena.slot import Slot
from storage.errors import StorageError
from storage.events import CheckpointEvent, Reporter
from storage.format.manifest import ItemTable, Receipt
from storage.held.inventory import HeldPart
from storage.held.keeping import KeepingStore
from storage.held.node_memory import NodeIdentity, NodeMemory
from storage.held.papers import Contents, PartLabel, PartPapers
from storage.held.peer_server import CopyRules
from storage.held.rate import RateLimit
from storage.saving.writing import MadeObjects, write_payloads
from storage.service import guests
from storage.service.channel import close_all
from storage.service.guests import MemoryKeeper, NoKeeper
from storage.service.held_messages import (
    AskCard,
    AskHeld,
    AskPart,
    DropHeld,
    HeldHere,
    MakeWay,
    MeetNodes,
    NodeCard,
    Noted,
    NoteRestored,
    NotHeld,
    PartHere,
    WayFree,
)
from storage.service.messages import Rejected
from storage.service.on_the_way import OnTheWay
from storage.service.parcels import Parcel, TakenOver, unpack
from storage.service.server import Server
from storage.service.sessions import ServiceCaller
from storage.stores.memory import MemoryStore

log = logging.getLogger(__name__)

_STARTED_AGAIN = (
    "the node's checkpoint service was started again: it holds no states in memory until the workers start again"
)
_WHO, _CARDS, _RESTORES, _TOLD = "who", "cards", "restores", "told"
_LACKED_MEMORY = "the node's checkpoint service was killed, as far as can be told for lack of memory"
_WHOLE_S_MAX = 20.0  # less than who asks waits for an answer
_NUM_RESTORES_MAX = 16


def copies_bytes_max() -> int:
    """How much is held for other nodes: what half of this machine's memory is."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class HeldStates:
    """A `storage.service.lanes.Holder`, and the handlers of all messages about states in memory.

    Args:
        rate_bytes_per_s: at most so much is copied to the buddy; None: as fast as it goes.
        keeper: has what a process after this one takes up, should this one crash (see `take_up`).
    """

    def __init__(self, rate_bytes_per_s: float | None = None, keeper: MemoryKeeper | None = None) -> None:
        self._keeper = keeper or NoKeeper()
        rules = CopyRules(Slot.create_empty, copies_bytes_max(), functools.partial(guests.keep, self._keeper))
        self._rate = RateLimit(rate_bytes_per_s)
        self.node = NodeMemory(rules, self._rate, self._tell)
        self._remember = self._keeper.remember
        self._lock = threading.Lock()
        self._on_the_way = OnTheWay()
        self._is_started = False
        self._is_told = False
        self._report = Reporter(None, {})
        self._is_reported = False
        self._restores: list[tuple[str, int]] = []

    def add_live(self, part: HeldPart) -> None:
        """Hold a live state, beyond a crash of this process too."""
        self.node.add(guests.keep(self._keeper, part))

    def take_up(
        self,
        records: Sequence[TakenOver],
        remembered: Mapping[str, str],
        kept: Mapping[str, tuple[str, list[int]]] = MappingProxyType({}),
    ) -> None:
        """Be the memory that a process before this one was, at the same address, and hold what that held.

        Of saves of this node's own ranks checksums are made anew, on a thread; whoever asks meanwhile what is held
        waits for it.

        Args:
            kept: what is in no lane: see `storage.service.guests.taken_up`.
        """
        if _TOLD in remembered:
            self._report = Reporter(None, json.loads(remembered[_TOLD]))
        for part in guests.taken_up(self._keeper, kept, self._not_held):
            self.node.inventory.add(part)
        if _WHO in remembered:
            who = NodeIdentity(**json.loads(remembered[_WHO]))
            try:
                self.node.start(who)
            except OSError as error:
                self._not_held(f"port {who.port} is another's, and others do not find this node's memory: {error}")
                self.node.start(dataclasses.replace(who, port=0))
            self._is_started = True
            for attempt, step in json.loads(remembered.get(_RESTORES, "[]")):
                self._note_restored(attempt, step)
            if _CARDS in remembered:
                self.node.meet(MeetNodes.model_validate_json(remembered[_CARDS]).cards)
        if records:
            again = self._on_the_way.begin()
            threading.Thread(target=self._hold_again, args=(records, again), name="hold-again", daemon=True).start()

    def _not_held(self, why: str) -> None:
        self._tell(CheckpointEvent.MEMORY_AWAY, reason=f"since the node's checkpoint service was started again {why}")

    def tell_shed(self, size_bytes: int) -> None:
        """Tell what of it was let go of, before this process was started in place of one that lacked memory."""
        self._tell(CheckpointEvent.MEMORY_SHED, bytes=size_bytes, reason=_LACKED_MEMORY)

    def _hold_again(self, records: Sequence[TakenOver], again: Callable[[], None]) -> None:
        def let_go(parcel: Parcel) -> None:
            self._keeper.released(parcel.safe)
            parcel.let_go()

        try:
            for record in sorted(records, key=lambda record: record.stage.attempt.step):
                try:
                    parcel = unpack(record)
                except (StorageError, ValueError, OSError) as error:
                    self._not_held(f"step {record.stage.attempt.step} is held no more: {error}")
                    self._keeper.released(record.safe)
                    continue
                report, release = Reporter(None, record.stage.told), functools.partial(let_go, parcel)
                if self.hold(parcel, report, release, lambda: None, lambda: None) is None:
                    let_go(parcel)
        finally:
            again()

    def serve(self, server: Server) -> None:
        """Have the server's messages about memory come here; before it runs."""
        server.handle(AskCard, self._card)
        server.handle(MeetNodes, self._meet)
        server.handle(AskHeld, self._held)
        server.handle(AskPart, self._part)
        server.handle(NoteRestored, self._restored)
        server.handle(DropHeld, self._drop)
        self._rate.truce = server.truce
        server.handle(MakeWay, self._make_way)
        server.handle(WayFree, self._way_free)

    def close(self) -> None:
        """End all threads, and let go of all that is held."""
        self.node.close()

    def hold(
        self,
        parcel: Parcel,
        report: Reporter,
        release: Callable[[], None],
        kept: Callable[[], object],
        settled: Callable[[], object],
    ) -> MadeObjects | None:
        """See `storage.service.lanes.Holder`."""
        with self._lock:
            self._report = report
            if not self._is_reported:
                self._is_reported = True
                self._remember(_TOLD, json.dumps(parcel.stage.told))
            is_lost = (
                not self._is_started and not self._is_told and bool(AgentEnvironment.from_env(parcel.stage.told).node)
            )
            self._is_told = self._is_told or is_lost
            is_wanted = self._is_started and parcel.staged.staging_error is None
        if is_lost:  # the worker's Checkpointer has asked when it started, so that was another process
            report(CheckpointEvent.MEMORY_AWAY, reason=_STARTED_AGAIN)
        if not is_wanted:
            return None  # nobody has asked for this node's memory, so nobody would restore from it
        made = self._on_the_way.begin()
        try:
            kept()  # who asks from here on what is held waits until it is
            return self._hold(parcel, report, release, settled)
        finally:
            made()

    def _hold(
        self, parcel: Parcel, report: Reporter, release: Callable[[], None], settled: Callable[[], object]
    ) -> MadeObjects | None:
        stage, attempt = parcel.stage, parcel.stage.attempt
        keeping = KeepingStore(MemoryStore("held"), stores=False)
        try:
            entries, items = write_payloads(keeping, attempt.prefix, attempt.id, attempt.rank, parcel.staged.payloads)
        except (StorageError, OSError, MemoryError) as error:
            log.warning("step %d is not held in memory: %s", attempt.step, error)
            report(CheckpointEvent.MEMORY_AWAY, reason=f"step {attempt.step} is not held in memory: {error}")
            return None
        contents, objects = parcel.staged.contents, keeping.objects(attempt.prefix)
        label = PartLabel(
            run=stage.url,
            lineage=stage.origin.lineage,
            generation=stage.origin.generation,
            step=attempt.step,
            attempt=attempt.id,
            world_size=attempt.world_size,
            rank=attempt.rank,
            size_bytes=sum(entry.size_bytes for entry in entries),
            healthy=stage.healthy,
            has_contents=contents is not None,
        )
        papers = PartPapers(
            label=label,
            receipt=Receipt(rank=attempt.rank, attempt=attempt.id, objects=entries, items=ItemTable.of(items)),
            created_unix_s=stage.created_unix_s,
            mesh=stage.origin.mesh,
            contents=None if contents is None else Contents.of(contents),
        )
        memories = tuple(parcel.staged.slots)
        part = HeldPart(papers, objects, memories=memories, release=release, is_copied=stage.copies)
        self.node.add(part, settled)
        return MadeObjects(entries, items, objects)

    def _tell(self, event: CheckpointEvent, **fields: Any) -> None:
        with self._lock:
            report = self._report
        report(event, **fields)

    def _card(self, caller: ServiceCaller, ask: AskCard, fds: list[int]) -> None:
        close_all(fds)
        with self._lock:
            if not self._is_started:
                who = NodeIdentity(ask.node, socket.gethostname(), ask.zone, ask.address)
                try:
                    self.node.start(who)
                except OSError as error:
                    caller.answer(Rejected(reason=f"cannot listen at {ask.address}: {error}"))
                    return
                self._is_started = True
                who = dataclasses.replace(who, port=self.node.card().port)
                self._remember(_WHO, json.dumps(dataclasses.asdict(who)))
        caller.answer(NodeCard(card=self.node.card()))

    def _meet(self, caller: ServiceCaller, told: MeetNodes, fds: list[int]) -> None:
        close_all(fds)
        self.node.meet(told.cards)
        self._remember(_CARDS, told.model_dump_json())
        caller.answer(Noted())

    def _held(self, caller: ServiceCaller, ask: AskHeld, fds: list[int]) -> None:
        close_all(fds)
        self._await_all()
        labels = tuple(self.node.labels(ask.run))
        caller.answer(HeldHere(labels=labels, num_restores=self.node.num_restores()))

    def _await_all(self) -> None:
        if not self._on_the_way.wait(_WHOLE_S_MAX):
            reason = f"a state is still being taken into memory after {_WHOLE_S_MAX:g} s: who asks goes on without it"
            self._tell(CheckpointEvent.MEMORY_AWAY, reason=reason)

    def _part(self, caller: ServiceCaller, ask: AskPart, fds: list[int]) -> None:
        close_all(fds)
        try:
            found = self.node.descriptors((ask.attempt, ask.rank))
        except (StorageError, OSError) as error:
            caller.answer(NotHeld(reason=str(error)))
            return
        try:
            caller.channel.send(PartHere(), found)
        finally:
            close_all(found)

    def _restored(self, caller: ServiceCaller, note: NoteRestored, fds: list[int]) -> None:
        close_all(fds)
        self._note_restored(note.attempt, note.step)
        caller.answer(Noted())

    def _drop(self, caller: ServiceCaller, drop: DropHeld, fds: list[int]) -> None:
        close_all(fds)
        self._await_all()
        self.node.drop(drop.attempts, drop.reason)
        caller.answer(Noted())

    def _make_way(self, caller: ServiceCaller, told: MakeWay, fds: list[int]) -> None:
        close_all(fds)
        self.node.make_way(told.seconds)
        caller.answer(Noted())

    def _way_free(self, caller: ServiceCaller, told: WayFree, fds: list[int]) -> None:
        close_all(fds)
        self.node.way_free(told.after_s)
        caller.answer(Noted())

    def _note_restored(self, attempt: str, step: int) -> None:
        self.node.restored(attempt, step)
        with self._lock:
            self._restores = [*self._restores, (attempt, step)][-_NUM_RESTORES_MAX:]
            self._remember(_RESTORES, json.dumps(self._restores))
