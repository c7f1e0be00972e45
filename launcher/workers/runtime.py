"""Makes a private folder for an agent's channels and sockets, which goes with the agent however that ends.

A small process beside it waits for the end of a pipe that the agent alone writes to, and removes the folder then. Where
that process was killed too, the next agent of the user does: an agent holds a lock on a file in its folder for as long
as it lives, and the kernel lets go of it. So a folder whose lock can be taken is nobody's: no pid, which may be
another's by now, has to be believed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_PREFIX = "elastic-moe-"
_LOCK = "agent.lock"
_END_S = 5.0
_SWEEPER = """
import sys
path = sys.stdin.buffer.read()
import os, shutil, time
for _ in range(50):
    shutil.rmtree(path, ignore_errors=True)
    if not os.path.lexists(path):
        break
    time.sleep(0.1)
"""
"""Whoever dies with the agent may still make files there for a moment."""


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
        with _sweeping(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


@contextlib.contextmanager
def _sweeping(path: Path) -> Iterator[None]:
    """Have the folder removed should this process be killed within the block."""
    reading, writing = os.pipe()
    try:
        sweeper = _start_sweeper(reading)
        os.write(writing, os.fsencode(path))  # what is to be removed, once this is the end of it
    except OSError as error:
        sweeper = None
        log.warning("%s stays until the next agent starts, should this one be killed: %s", path, error)
    finally:
        os.close(reading)
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(writing)
        if sweeper is not None:
            sweeper.kill()  # there is nothing left to do, and others that were forked may have the pipe still
            with contextlib.suppress(subprocess.TimeoutExpired):
                sweeper.wait(_END_S)


def _start_sweeper(reading: int) -> subprocess.Popen[bytes]:
    """Start the process, in a session of its own and without this job's environment: it is not one of its processes."""
    return subprocess.Popen(
        [sys.executable, "-ISc", _SWEEPER],
        stdin=reading,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
        start_new_session=True,
    )


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
