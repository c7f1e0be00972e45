"""Saves that nobody has any more: worker, service and keeper were killed, or a worker before it had handed one over.

It is told what became of each.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from storage.errors import AlreadyExists, Denied, Transient
from storage.events import CheckpointEvent, Reporter
from storage.format.manifest import Receipt
from storage.pace.rules import Tier
from storage.run.attempt import Attempt
from storage.saving import receipts
from storage.service.messages import Stage
from storage.service.notes import NoteOfSave, Notes
from storage.service.processes import is_alive
from storage.stores.objects import ObjectStore
from storage.stores.registry import open_store

log = logging.getLogger(__name__)

_COORDINATOR = 0  # as in storage.ranks.group, which needs torch
_REASON = "the worker was killed, and no checkpoint service has what it had staged"
_LOOK_S = 1.0
_PAUSE_S_MIN, _PAUSE_S_MAX = 1.0, 60.0
"""Between two tries of a store that is away."""
_TELLING_S_MAX = 30.0


class LostSaves:
    """Tells of each save that is noted, whose worker is gone, and which this service does not have.

    A worker that lives has what it staged, and sees to it. A note goes once that was said, so that a process which dies
    meanwhile leaves it to the next.

    Args:
        has: whether the service has a save, or may be about to: its worker is connected.
    """

    def __init__(self, notes: Notes, has: Callable[[Stage], bool]) -> None:
        self._notes = notes
        self._has = has
        self._known: dict[Path, Stage] = {}
        self._seen: set[Path] = set()  # to be lost, by the last look
        self._unknown: set[Path] = set()  # of these, what was told not to be known
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lost", daemon=True)
        self._due: list[tuple[NoteOfSave, Stage]] = []

    def start(self) -> Self:
        """Look; before anybody can connect, so that nobody is about to be heard. Then go on looking, on a thread."""
        self._due = self.find(surely=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Look for the last time, after all connections; what is not told in time stays for the next service."""
        self._stop.set()
        self._thread.join(_TELLING_S_MAX)

    def find(self, *, surely: bool) -> list[tuple[NoteOfSave, Stage]]:
        """What is lost. Without `surely` somebody may have connected this very moment, so it must be so twice."""
        notes, before, self._seen = self._notes.all(), self._seen, set()
        self._known = {note.file: self._known[note.file] for note in notes if note.file in self._known}
        found = []
        for note in notes:
            stage = self._known.get(note.file) or _read(note)
            if stage is None:
                continue
            self._known[note.file] = stage
            if is_alive(stage.pid, stage.pid_began, stage.pid_space) or self._has(stage):
                continue
            self._seen.add(note.file)
            if surely or note.file in before:
                found.append((note, stage))
        return found

    def _run(self) -> None:
        pause_s = _PAUSE_S_MIN
        while True:
            is_last = self._stop.is_set()
            away = [note for note, stage in self._due if not self._tell(note, stage)]
            if is_last:
                return
            pause_s = min(2 * pause_s, _PAUSE_S_MAX) if away else _PAUSE_S_MIN
            self._stop.wait(pause_s if away else _LOOK_S)
            self._due = self.find(surely=self._stop.is_set())

    def _tell(self, note: NoteOfSave, stage: Stage) -> bool:
        """Tell what became of the save, and drop its note; False, and the note stays, where that is not known yet."""
        is_known = _tell_one(stage, is_again=note.file in self._unknown)
        if is_known:
            note.drop()
            self._unknown.discard(note.file)
        else:
            self._unknown.add(note.file)
        return is_known


def _read(note: NoteOfSave) -> Stage | None:
    try:
        return Stage.model_validate_json(note.stage)
    except ValidationError as error:
        log.warning("what %s says of a save cannot be read: %s", note.file.name, error.errors()[0]["msg"])
        note.drop()
        return None


def _tell_one(stage: Stage, *, is_again: bool) -> bool:
    """Whether it is known what became of it, or never will be; the store is asked, which may be away."""
    if stage.tier is Tier.RAM:  # no store has to do with it
        Reporter(None, stage.told)(CheckpointEvent.FAILED, step=stage.attempt.step, reason=_REASON, bytes=0)
        return True
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
