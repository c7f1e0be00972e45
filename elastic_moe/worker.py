"""`launcher.worker`, the script's side of the contract with its agent, under the name by which scripts import it."""

from __future__ import annotations

import sys

from launcher import Stop, WorkerContext
from launcher import worker as _worker

__all__ = [
    "Stop",
    "WorkerContext",
    "alive",
    "context",
    "event",
    "gave_up",
    "heartbeat",
    "on_all_ranks",
    "should_stop",
    "untimed",
    "yielded",
]

context = _worker.context
heartbeat = _worker.heartbeat
untimed = _worker.untimed
alive = _worker.alive
should_stop = _worker.should_stop
on_all_ranks = _worker.on_all_ranks
yielded = _worker.yielded
gave_up = _worker.gave_up
event = _worker.event


def _tell_checkpointer(name: str) -> None:
    """A Checkpointer whose listener has just written this event does not write it once more.

    The two packages do not know each other, and one that is not imported has no Checkpointer.
    """
    if reporter := sys.modules.get("storage.events"):
        reporter.note_written(name)


_worker.on_event = _tell_checkpointer
