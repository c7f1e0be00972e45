"""Files that outlive everybody: a worker notes down what it has staged, until somebody has told what became of it.

Imports nothing but Python's own, as all that a keeper does.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from storage.service import address
from storage.service.processes import is_alive

log = logging.getLogger(__name__)

_SIZE_BYTES_MAX = 64 * 1024 * 1024


@dataclass(frozen=True)
class NoteOfSave:
    """The JSON of a `Stage`."""

    file: Path
    stage: str

    @property
    def is_of_living(self) -> bool:
        """Whether the worker runs that has staged it."""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            found = json.loads(self.stage)
            return is_alive(int(found["pid"]), int(found["pid_began"]), int(found.get("pid_space", 0)))
        return False

    def drop(self) -> None:
        """It was told."""
        with contextlib.suppress(OSError):
            self.file.unlink(missing_ok=True)


class Notes:
    """The notes in `folder`, which is made with the first; other users may not look into what that is in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_made = False

    def all(self) -> list[NoteOfSave]:
        """Of what was staged, and has not come to its end."""
        found = []
        for file in sorted(self._folder.glob("*.json")):
            with contextlib.suppress(OSError, ValueError):
                if file.stat().st_size <= _SIZE_BYTES_MAX:
                    found.append(NoteOfSave(file, file.read_text()))
        return found

    def add(self, name: str, stage: str) -> None:
        """Note one down, whole or not at all; a full disk costs the note."""
        try:
            if not self._is_made:
                self._make()
                self._is_made = True
            try:
                self._write(self._file(name), stage)
            except FileNotFoundError:  # a service that ends has removed the folder as it was empty
                self._make()
                self._write(self._file(name), stage)
        except OSError as error:
            log.warning("what is staged cannot be noted down in %s: %s", self._folder, error)

    def drop(self, name: str) -> None:
        """It has come to its end."""
        with contextlib.suppress(OSError):
            self._file(name).unlink(missing_ok=True)

    def take_over(self, folder: Path) -> None:
        """Have the notes of a service that was killed with all that would tell; a worker that lives sees to its own."""
        for note in Notes(folder).all():
            if not note.is_of_living:
                with contextlib.suppress(OSError):
                    self._make()
                    note.file.replace(self._folder / note.file.name)

    def _write(self, file: Path, stage: str) -> None:
        """Written between a save and the training that goes on, so by as few calls as can be."""
        begun = f"{file}.tmp"
        try:
            fd = os.open(begun, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                data = stage.encode()
                if os.write(fd, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(fd)
            os.replace(begun, file)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(begun)
            raise

    def _make(self) -> None:
        address.make_private(self._folder.parent)
        self._folder.mkdir(mode=0o700, exist_ok=True)

    def _file(self, name: str) -> Path:
        return self._folder / f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.json"
