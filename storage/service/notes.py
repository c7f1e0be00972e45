"""Files that outlive a keeper: they say what it had, should it be killed with all that it holds.

Imports nothing but Python's own, as all that the keeper does.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_SIZE_BYTES_MAX = 64 * 1024 * 1024


@dataclass(frozen=True)
class FormerNote:
    """The JSON of a `Stage` that a keeper had which is gone. It stays until somebody has told what became of it."""

    file: Path
    stage: str

    def drop(self) -> None:
        """It was told."""
        with contextlib.suppress(OSError):
            self.file.unlink(missing_ok=True)


class Notes:
    """The notes of one keeper in `folder`, beside those that keepers before it have left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mine = secrets.token_hex(4)  # so that nobody who has told of a former note drops one of this keeper

    def former(self) -> list[FormerNote]:
        """What was noted by keepers before this one, and was not told."""
        found = []
        for file in sorted(self._folder.glob("*.json")):
            if file.name.startswith(self._mine):
                continue
            with contextlib.suppress(OSError, ValueError):
                if file.stat().st_size <= _SIZE_BYTES_MAX:
                    found.append(FormerNote(file, file.read_text()))
        return found

    def add(self, name: str, stage: str) -> None:
        """Note one down, whole or not at all; a full disk costs the note."""
        file = self._file(name)
        begun = file.with_suffix(".tmp")
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            with open(os.open(begun, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as writing:
                writing.write(stage)
            begun.replace(file)
        except OSError as error:
            log.warning("what is staged cannot be noted down in %s: %s", self._folder, error)
            with contextlib.suppress(OSError):
                begun.unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        """It has come to its end."""
        with contextlib.suppress(OSError):
            self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._folder / f"{self._mine}-{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.json"
