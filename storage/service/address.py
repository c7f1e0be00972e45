"""Where a service listens. Imports nothing but Python's own, as all that its keeper does."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_PATH_BYTES_MAX = 107  # of a Unix socket's address
_LOOK_S = 0.05


def path_for(name: str) -> Path:
    """The socket of the service that this user's processes share which know it by `name`, where no agent has one."""
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
    return base / f"elastic-moe-{os.getuid()}" / f"{digest}.sock"


def lock(path: Path, patience_s: float = 0.0) -> int | None:
    """A descriptor that holds the lock on the socket at `path`, as only a living service does; None if one does.

    For an instant whoever sweeps that folder holds it, too: a service that begins has patience.
    """
    make_private(path.parent)
    ends_s = time.monotonic() + patience_s
    while True:
        fd = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            if time.monotonic() >= ends_s:
                return None
            time.sleep(_LOOK_S)
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), path.with_suffix(".lock").stat()):
                return fd
        os.close(fd)  # of one that has ended since, and has removed its file


def used(path: Path) -> Path:
    """A file that is there when the service at `path` has something to do, or had."""
    return path.with_suffix(".used")


def kept(path: Path) -> Path:
    """A folder with a note for each save that the service at `path` has, or is about to have, to bring to its end."""
    return path.with_suffix(".kept")


def sweep(folder: Path, besides: Path, before: Callable[[Path], object]) -> None:
    """Remove what services have left in the folder that were killed; `before` that sees the folder of their notes."""
    left = {file.with_suffix(".sock") for kind in ("*.sock", "*.kept") for file in folder.glob(kind)}
    for found in left - {besides}:
        with contextlib.suppress(OSError):
            if (fd := lock(found)) is not None:
                before(kept(found))
                remove(found)
                os.close(fd)


def remove(path: Path) -> None:
    """Remove the socket, its log and its lock file, by who holds the lock. Notes of what is still to be told stay."""
    begun = kept(path).glob("*.tmp")
    for file in (path, used(path), path.with_suffix(".log"), path.with_suffix(".lock"), *begun):
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        kept(path).rmdir()


def listen(path: Path) -> socket.socket:
    """A socket that listens at `path`, 0600 in a folder 0700, which are made. Raises OSError."""
    make_private(path.parent)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with short_path(path) as short:
            listener.bind(short)
        path.chmod(0o600)
        listener.listen(64)
    except BaseException:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """An address of at most 107 bytes for a socket at `path`, however long that is, within the block."""
    if len(os.fsencode(path)) <= _PATH_BYTES_MAX:
        yield str(path)
        return
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def make_private(folder: Path) -> None:
    """Make the folder, where there is none; no other user may look into it.

    Raises:
        FileNotFoundError: the folder that it is in is gone, with the agent that had made it.
        PermissionError: it is another user's, or open to others.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{folder} is open to other users; the service's socket needs a folder of mode 0700")
