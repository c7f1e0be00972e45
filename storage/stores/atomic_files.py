"""Files that appear whole, or not at all, below one folder of a POSIX file system.

A file is written under `ROOT/.tmp`, synced, and then linked (if it must be new) or renamed into its place: both are
atomic, and the folder is synced after. What a killed process leaves under `.tmp` is swept a day later, with the first
put of another.

Where there are no hard links (many FUSE and SMB mounts, FAT), a file that must be new is looked for and renamed under a
lock on `ROOT/.tmp/.lock`, which the kernel frees when its holder dies. That is as good among the processes of one
host; between hosts it is as good as the mount's `flock`, and one that locks for each host alone can miss a race.
Where files cannot be locked either, such a put raises BadURL.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from storage.errors import BadURL
from storage.stores.buffers import Buffer, skip, views_of

log = logging.getLogger(__name__)

TMP = ".tmp"
"""The folder below the root in which files are written."""
_TMP_AGE_S = 24 * 3600.0
_LOCK = ".lock"
_PLACE_TRIES = 100
_IOV_MAX = 512  # below every Linux's IOV_MAX of 1024
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class AtomicFiles:
    """Puts files below `root`. Thread-safe, and safe against other processes that do the same.

    Args:
        name: of the folder, for messages.
        mode: of the files that are made. Folders that are made can be entered and listed by whoever may read the files;
            those that exist stay as they are.
    """

    def __init__(self, root: Path, name: str, mode: int) -> None:
        self._root = root
        self._name = name
        self._mode = mode
        self._is_swept = False
        self._is_mode_told = False

    def put(self, path: Path, write: Callable[[int], None], *, if_absent: bool) -> os.stat_result:
        """Have `write` fill a new file by its descriptor, and put the file at `path`; its status there.

        Raises FileExistsError if there is a file and `if_absent`, OSError, and what `write` raises.
        """
        self._make_folder(self._root / TMP)
        if not self._is_swept:  # not when the folder is opened: a reader writes nothing
            self._is_swept = True
            self._sweep()
            self._check_folder()
        temporary = self._root / TMP / uuid.uuid4().hex
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode)
        try:
            try:
                self._check_mode(fd)
                write(fd)
                os.fsync(fd)
            finally:
                os.close(fd)
            self.place(temporary, path, if_absent=if_absent)
            status = os.stat(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        sync_folder(path.parent)
        return status

    def place(self, temporary: Path, path: Path, *, if_absent: bool) -> None:
        """Link or rename a whole file into its place."""
        for left in reversed(range(_PLACE_TRIES)):
            try:
                self._make_folder(path.parent)
                if if_absent:
                    self._place_if_absent(temporary, path)
                else:
                    os.replace(temporary, path)
                return
            except FileNotFoundError:
                # a concurrent delete took the folder along while it was empty; it got on, so shall we
                if not left:
                    raise

    def can_link(self) -> bool:
        """Whether there are hard links. Raises OSError."""
        self._make_folder(self._root / TMP)
        names = [self._root / TMP / uuid.uuid4().hex for _ in range(2)]
        try:
            os.close(os.open(names[0], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode))
            os.link(*names)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return False
        finally:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
        return True

    def _place_if_absent(self, temporary: Path, path: Path) -> None:
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            return
        with self.locked():
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            os.rename(temporary, path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep out all threads and processes that take the same lock. Raises BadURL where files cannot be locked."""
        self._make_folder(self._root / TMP)
        fd = os.open(self._root / TMP / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, self._mode)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                raise BadURL(
                    f"the file system of {self._root} has neither hard links nor file locks ({error.strerror}), so two"
                    " processes could commit over each other; choose another folder"
                ) from error
            yield
        finally:
            os.close(fd)

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        if not folder.parent.is_dir():
            self._make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, self._folder_mode)
            sync_folder(folder.parent)

    @property
    def _folder_mode(self) -> int:
        return self._mode | 0o100 | (self._mode & 0o044) >> 2

    def _check_mode(self, fd: int) -> None:
        """Warn once if files do not get the mode that was asked for."""
        found = stat.S_IMODE(os.fstat(fd).st_mode)
        if self._mode & ~found and not self._is_mode_told:
            self._is_mode_told = True
            log.warning("%s: files get the mode %04o: the umask, or the mount, takes the rest away", self._name, found)

    def _check_folder(self) -> None:
        """Warn if a folder that was there keeps the group from what it may read."""
        found = stat.S_IMODE(os.stat(self._root).st_mode)
        if self._folder_mode & ~found:
            log.warning(
                "%s: the folder has the mode %04o and keeps it (chmod %04o)", self._name, found, self._folder_mode
            )

    def _sweep(self) -> None:
        with contextlib.suppress(OSError), os.scandir(self._root / TMP) as entries:
            for entry in entries:
                # the lock is never removed: two processes could each hold a lock of that name
                if entry.name != _LOCK and entry.stat().st_mtime < time.time() - _TMP_AGE_S:
                    os.unlink(entry.path)


def write_all(fd: int, buffers: Sequence[Buffer]) -> None:
    """Write the buffers, one after the other, at the file's position."""
    rest = views_of(buffers)
    while rest:
        rest = skip(rest, os.writev(fd, rest[:_IOV_MAX]))


def write_at(fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Write the buffers, one after the other, from byte `offset` on."""
    rest = views_of(buffers)
    while rest:
        num_bytes = os.pwritev(fd, rest[:_IOV_MAX], offset)
        rest, offset = skip(rest, num_bytes), offset + num_bytes


def read_at(fd: int, buffers: Sequence[Buffer], offset: int) -> bool:
    """Fill the buffers, one after the other, from byte `offset` on; False if the file ends before."""
    rest = views_of(buffers)
    while rest:
        num_bytes = os.preadv(fd, rest[:_IOV_MAX], offset)
        if num_bytes == 0:
            return False
        rest, offset = skip(rest, num_bytes), offset + num_bytes
    return True


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that the names in it survive the death of the host."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
