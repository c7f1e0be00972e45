"""Makes a private folder for an agent's channels and sockets, and removes those that killed agents have left.

An agent holds a lock on a file in its folder for as long as it lives, and the kernel lets go of it however it ends. So
a folder whose lock can be taken is nobody's: no pid, which may be another's by now, has to be believed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_PREFIX = "elastic-moe-"
_LOCK = "agent.lock"


@contextlib.contextmanager
def runtime_dir() -> Iterator[Path]:
    """Make a private folder (0700) where temporary files go, for as long as it is used; abandoned ones go first."""
    remove_abandoned(Path(tempfile.gettempdir()))
    path = Path(tempfile.mkdtemp(prefix=_PREFIX))
    # Locked before it has the name by which others look for it: there is no moment at which they could take it.
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        (path / "lock").rename(path / _LOCK)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def remove_abandoned(folder: Path) -> list[Path]:
    """Remove what killed agents of this user have left in `folder`; returns the folders that were removed."""
    removed = []
    for path in sorted(folder.glob(f"{_PREFIX}*")):
        if _is_own_folder(path) and _is_abandoned(path / _LOCK):
            shutil.rmtree(path, ignore_errors=True)
            log.info("removed %s, which an agent that was killed had left", path)
            removed.append(path)
    return removed


def _is_own_folder(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _is_abandoned(lock: Path) -> bool:
    try:
        fd = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False  # no agent's, or one that is being made or removed just now
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)
