"""What runs in the service's process: puts its parts together, and serves."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Sequence

from storage.saving.uploads import Tried
from storage.service.capturing import LiveKeeper
from storage.service.guarded_slots import GuardedSlots
from storage.service.guests import is_guest
from storage.service.keeper import KeeperSafe, State
from storage.service.lost import LostSaves
from storage.service.memory import HeldStates
from storage.service.messages import Stage
from storage.service.notes import Notes
from storage.service.parcels import TakenOver
from storage.service.server import Server, ServerOptions

log = logging.getLogger(__name__)


class _Safe:
    """A `storage.service.lanes.Safe` that is the keeper's."""

    def __init__(self, keeper: KeeperSafe, notes: Notes) -> None:
        self._keeper = keeper
        self._notes = notes
        self.stored, self.released = keeper.stored, keeper.released

    def keep(self, name: str, stage: Stage, fds: Sequence[int]) -> None:
        """See `storage.service.lanes.Safe`."""
        self._keeper.keep(name, stage.model_dump_json(), fds)

    def done(self, name: str) -> None:
        """See `storage.service.lanes.Safe`."""
        self._notes.drop(name)
        self._keeper.done(name)


def serve(
    listener: socket.socket, link: socket.socket, state: State, options: ServerOptions, lifeline: int | None
) -> None:
    """Serve until there is nothing more to do, first what a process before this one has left."""
    keeper = KeeperSafe(link, list(state.kept))
    safe = _Safe(keeper, state.notes)
    held = HeldStates(options.rate_bytes_per_s, keeper)
    server = Server(listener, options, safe, holder=held, lifeline=lifeline, num_restarts=state.num_restarts)
    held.serve(server)
    LiveKeeper(held.add_live).serve(server)
    guarded = GuardedSlots(server.truce)
    guarded.serve(server)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    unfinished, ended = _records(state)
    held.take_up(ended, state.remembered, {n: (k.stage, k.fds) for n, k in state.kept.items() if is_guest(n)})
    if state.shed_bytes:
        held.tell_shed(state.shed_bytes)
    server.take_up(unfinished)
    lost = LostSaves(state.notes, server.has).start()
    server.run()
    lost.close()
    guarded.close()
    held.close()


def _records(state: State) -> tuple[list[TakenOver], list[TakenOver]]:
    """What is to be brought to its end, and what has come to it and is only held in memory."""
    unfinished, ended = list[TakenOver](), list[TakenOver]()
    for name, kept in state.kept.items():
        if is_guest(name):
            continue
        tried = Tried.STORED if kept.is_stored else Tried.BEGUN
        stage = Stage.model_validate_json(kept.stage).model_copy(update={"tried": tried})
        record = TakenOver(name, stage, kept.fds, kept.num_crashes, is_intact=not kept.is_released)
        (ended if kept.is_done else unfinished).append(record)
    return unfinished, ended
