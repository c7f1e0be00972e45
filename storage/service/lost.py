"""Saves of which nothing is left: workers, service and keeper were killed. They are said to have failed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

from pydantic import ValidationError

from storage.errors import AlreadyExists
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


def tell_lost(notes: Sequence[FormerNote]) -> None:
    """Say so of each whose worker is gone as well; a worker that lives has what it staged, and sees to it.

    A note goes once that was said, so that a process which dies meanwhile leaves it to the next.
    """
    for note in notes:
        try:
            stage = Stage.model_validate_json(note.stage)
        except ValidationError as error:
            log.warning("what %s says of a save cannot be read: %s", note.file.name, error.errors()[0]["msg"])
        else:
            if not is_alive(stage.pid, stage.pid_began):
                _tell_one(stage)
        note.drop()


def _tell_one(stage: Stage) -> None:
    try:
        with open_store(stage.url) as store:
            _tell(store, stage)
    except Exception as error:  # noqa: BLE001 - whatever keeps the others from hearing of it, it is said here
        log.warning("other ranks cannot be told that step %d is lost: %s", stage.attempt.step, error)
        Reporter(None, stage.told)(CheckpointEvent.FAILED, step=stage.attempt.step, reason=_REASON, bytes=0)


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
