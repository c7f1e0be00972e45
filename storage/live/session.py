"""A Checkpointer's live state and its way to the node's service, put together where all ranks have both."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Self

from storage.agent import AgentEnvironment
from storage.arena.arena import Guard
from storage.events import Reporter
from storage.live.link import LiveLink
from storage.live.state import LiveState
from storage.ranks.agreement import AgreeingGroup
from storage.run.job import Origin


class LiveSession:
    """Of one rank, from `start` to `close`.

    Attributes:
        state: what is noted there after each step.
        guard: has the service hold the slots of this rank's saves, see `storage.arena.arena.Guard`.
        on_connect: called with each connection to the service, which has heard of no slots by that one.
    """

    def __init__(self, path: Path, url: str, origin: Origin, group: AgreeingGroup, report: Reporter) -> None:
        self._link = LiveLink(path, url, group.rank, origin)
        self.guard: Guard = functools.partial(self._link.guard, "saves")
        self.state = LiveState(group, self._link.keep, report, functools.partial(self._link.guard, "live"))
        self._link.on_connect.append(self.state.have_guarded)
        self._link.on_refused = self.state.refused
        self.on_connect = self._link.on_connect

    def start(self) -> Self:
        """Hear of optimizers' steps, and be asked by the service."""
        self.state.start()
        self._link.start(self.state.ask)
        return self

    def close(self, *, rescue: bool) -> None:
        """End; with `rescue`, since an error ends the training, the state is staged first."""
        self.state.close(rescue=rescue)
        self._link.close()


def live_session(
    url: str, origin: Origin, group: AgreeingGroup, report: Reporter, service: bool | None
) -> LiveSession | None:
    """The live state of this rank; None on all ranks, unless each has an agent whose service keeps it. A collective.

    `service` is the option of `Checkpointer`.
    """
    path = "" if service is False else AgentEnvironment.from_env(os.environ).service
    if group.any(not path):
        return None
    return LiveSession(Path(path), url, origin, group, report).start()
