"""What runs in the service's process: puts its parts together, and serves."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Sequence

from storage.saving.uploads import Tried
from storage.service.capturing import LiveKeeper
from storage.service.keeper import KeeperSafe, State
from storage.service.lost import tell_lost
from storage.service.memory import HeldStates
from storage.service.messages import Stage
from storage.service.server import Server, ServerOptions, TakenOver

log = logging.getLogger(__name__)


class _Safe:
    """A `storage.service.lanes.Safe` that is the keeper's."""

    def __init__(self, keeper: KeeperSafe) -> None:
        self._keeper = keeper
        self.stored, self.done = keeper.stored, keeper.done

    def keep(self, name: str, stage: Stage, fds: Sequence[int]) -> None:
        """See `storage.service.lanes.Safe`."""
        self._keeper.keep(name, stage.model_dump_json(), fds)


def serve(
    listener: socket.socket, link: socket.socket, state: State, options: ServerOptions, lifeline: int | None
) -> None:
    """Serve until there is nothing more to do, first what a process before this one has left."""
    safe = _Safe(KeeperSafe(link, list(state.kept)))
    held = HeldStates(options.rate_bytes_per_s)
    server = Server(listener, options, safe, holder=held, lifeline=lifeline, num_restarts=state.num_restarts)
    held.serve(server)
    LiveKeeper(held.node.add).serve(server)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    server.take_up(_records(state))
    lost = [Stage.model_validate_json(stage) for stage in state.lost]
    threading.Thread(target=tell_lost, args=(lost,), name="lost", daemon=True).start()
    server.run()
    held.close()


def _records(state: State) -> list[TakenOver]:
    records = []
    for name, kept in state.kept.items():
        tried = Tried.STORED if kept.is_stored else Tried.BEGUN
        stage = Stage.model_validate_json(kept.stage).model_copy(update={"tried": tried})
        records.append(TakenOver(name, stage, kept.fds, kept.num_crashes))
    return records
