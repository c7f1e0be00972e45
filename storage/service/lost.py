"""Saves of which nothing is left: workers, service and keeper were killed. It is told what became of each."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence

from pydantic import ValidationError

from storage.errors import AlreadyExists, Denied, Transient
from storage.events import CheckpointEvent, Reporter
from storage.format.manifest import Receipt
from storage.run.attempt import Attempt
from storage.saving import receipts
from storage.service.messages import Stage
from storage.service.notes import FormerNote
from storage.service.processes import is_alive
from storage.stores.objects import ObjectStore
from storage.stores.registry import open_store

log = logging.getLogger(__name__)

_COORDINATOR = 0  # as in storage.ranks.group, which needs torch
_REASON = "the checkpoint service was killed with all that it held of it, and so was the worker"
_PAUSE_S_MIN, _PAUSE_S_MAX = 1.0, 60.0
"""Between two tries of a store that is away."""


def tell_lost(notes: Sequence[FormerNote], stop: threading.Event) -> None:
    """Say so of each whose worker is gone as well; a worker that lives has what it staged, and sees to it.

    A note goes once it was told what became of its save, so that a process which dies meanwhile leaves it to the next.
    Only the store knows that: while it is away it is asked again and again, until `stop`.
    """
    due, pause_s, is_again = list(notes), _PAUSE_S_MIN, False
    while due:
        due = [note for note in due if not _is_told(note, is_again=is_again)]
        if not due or stop.wait(pause_s):
            return
        pause_s, is_again = min(2 * pause_s, _PAUSE_S_MAX), True


def _is_told(note: FormerNote, *, is_again: bool) -> bool:
    """Tell what became of the save, and drop its note; False, and the note stays, where that is not known yet."""
    try:
        stage = Stage.model_validate_json(note.stage)
    except ValidationError as error:
        log.warning("what %s says of a save cannot be read: %s", note.file.name, error.errors()[0]["msg"])
    else:
        if not is_alive(stage.pid, stage.pid_began) and not _tell_one(stage, is_again=is_again):
            return False
    note.drop()
    return True


def _tell_one(stage: Stage, *, is_again: bool) -> bool:
    """Whether it is known what became of it, or never will be."""
    try:
        with open_store(stage.url) as store:
            _tell(store, stage)
    except Exception as error:  # noqa: BLE001 - whatever keeps this from being known, it is said here
        is_away = isinstance(error, (Transient, Denied))
        if not is_again:
            reason = f"{_REASON}; whether it was committed before is not known: {error}"
            Reporter(None, stage.told)(CheckpointEvent.UNKNOWN, step=stage.attempt.step, reason=reason)
        return not is_away
    return True


def _tell(store: ObjectStore, stage: Stage) -> None:
    rank, report = stage.attempt.rank, Reporter(None, stage.told)
    attempt = Attempt(stage.attempt.prefix, stage.attempt.step, stage.attempt.id, stage.attempt.world_size)
    if (size_bytes := receipts.committed_bytes(store, attempt)) is not None:
        if rank == _COORDINATOR:
            report(CheckpointEvent.COMMITTED, step=attempt.step, bytes=size_bytes)
        return
    if receipts.find_receipt(store, attempt, rank) is None:
        with contextlib.suppress(AlreadyExists):
            receipts.put_receipt(store, attempt, Receipt(rank=rank, attempt=attempt.id, error=_REASON))
    elif rank != _COORDINATOR:
        return  # its part is in the store, and what becomes of it is the coordinator's to tell
    if rank == _COORDINATOR:
        receipts.put_aborted(store, attempt, _REASON)
    report(CheckpointEvent.FAILED, step=attempt.step, reason=_REASON, bytes=0)
