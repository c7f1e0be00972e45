"""A folder as an object store: `file:///path` or a plain path.

An object is one file of mode 0600, in folders of mode 0700; `file:///path?mode=0640` lets the group read, as far as the
umask does. Folders that exist stay as they are. A put writes a file under `ROOT/.tmp`, syncs it, and then links it
(if_absent) or renames it into place: both are atomic on POSIX file systems, and the folder is synced after. What a
killed process leaves under `.tmp` is swept a day later, with the first put of another.

Where there are no hard links (many FUSE and SMB mounts, FAT), a put with if_absent looks and renames while it holds a
lock on `ROOT/.tmp/.lock`, which the kernel frees when its holder dies. That is as good among the processes of one
host; between hosts it is as good as the mount's `flock`, and one that locks for each host alone can miss a race.
Where files cannot be locked either, such a put raises BadURL. The same lock is held to delete one version of an object.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from urllib.parse import quote

from storage.errors import AlreadyExists, BadURL, Corrupt, Denied, Forbidden, NotFound, StorageError, Transient
from storage.parallel import run_all
from storage.stores.objects import (
    PART_SIZE_BYTES,
    Buffer,
    Capability,
    Fetch,
    ObjectInfo,
    ObjectStore,
    check_key,
    check_prefix,
    check_read_size,
    parts_of_size,
)

log = logging.getLogger(__name__)

MODE = 0o600
MODES = (MODE, 0o640, 0o644, 0o660, 0o664)
"""That files may have: nobody but the owner and the group ever writes."""
_CAPABILITIES = {Capability.CONDITIONAL_PUTS, Capability.GUARDED_READS, Capability.HOST_CACHE}
_TMP = ".tmp"
_TMP_AGE_S = 24 * 3600.0
_PLACE_TRIES = 100
_IOV_MAX = 512  # below every Linux's IOV_MAX of 1024
_NOT_A_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_LOCK = ".lock"
_NO_FOLDER = {errno.ENOENT, errno.ENOTDIR}


class LocalStore(ObjectStore):
    """Objects as files below one folder, which is created by the first put."""

    def __init__(self, root: str | os.PathLike[str], mode: int = MODE) -> None:
        self._root = Path(os.path.abspath(root))
        self._mode = mode
        if self._root.exists() and not self._root.is_dir():
            raise BadURL(f"{self._root} is a file; a checkpoint URL names a folder")
        self._is_swept = False
        self._is_mode_told = False

    @property
    def url(self) -> str:
        """The folder's absolute path; as a URL where it has options."""
        return str(self._root) if self._mode == MODE else f"file://{quote(str(self._root))}?mode={self._mode:04o}"

    def can(self, capability: Capability) -> bool:
        """See `ObjectStore.can`. Puts are conditional by hard links, or else by a lock; deletes by a lock only."""
        return self._can_lock() if capability is Capability.CONDITIONAL_DELETES else capability in _CAPABILITIES

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        """See `ObjectStore.put`."""
        return self._put(key, lambda fd: _write_all(fd, buffers), if_absent)

    def put_from(self, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
        """See `ObjectStore.put_from`."""
        if size_bytes <= PART_SIZE_BYTES:
            return self.put(key, fetch(0, size_bytes))

        def write(fd: int) -> None:
            def copy(offset: int, length: int) -> None:
                _write_at(fd, fetch(offset, length), offset)

            run_all(pool, [functools.partial(copy, *part) for part in parts_of_size(size_bytes)])

        return self._put(key, write, if_absent=False)

    def _put(self, key: str, write: Callable[[int], None], if_absent: bool) -> ObjectInfo:
        """Have a file written, and put it in its place."""
        path = self._path(key)
        with self._translated(key):
            self._make_folder(self._root / _TMP)
            if not self._is_swept:  # not when it is opened: a reader writes nothing
                self._is_swept = True
                self._sweep()
                self._check_folder()
            temporary = self._root / _TMP / uuid.uuid4().hex
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode)
            try:
                try:
                    self._check_mode(fd)
                    write(fd)
                    os.fsync(fd)
                finally:
                    os.close(fd)
                self._place(temporary, path, if_absent)
                status = os.stat(path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
            _sync_folder(path.parent)
            return _info(key, status)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        """See `ObjectStore.read_into`. Tells no etag: on some mounts (FUSE) a file has another inode each time."""
        with self._translated(key):
            fd = self._open(key)
            try:
                if if_match is not None and _info(key, os.fstat(fd)).etag != if_match:
                    raise Corrupt(f"{key} in {self.url} changed while it was read")
                if not _read_all(fd, offset, buffers):
                    raise Corrupt(f"{key} in {self.url} is shorter than it must be ({os.fstat(fd).st_size} bytes)")
                return ""
            finally:
                os.close(fd)

    def read(self, key: str) -> bytes:
        """See `ObjectStore.read`."""
        with self._translated(key), os.fdopen(self._open(key), "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            check_read_size(f"{key} in {self.url}", size_bytes)
            return file.read(size_bytes)

    def info(self, key: str) -> ObjectInfo:
        """See `ObjectStore.info`."""
        with self._translated(key):
            path = self._path(key)
            if path.is_dir():
                raise NotFound(f"{key} is not in {self.url}")
            return _info(key, os.stat(path))

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        """See `ObjectStore.list`."""
        check_prefix(prefix)
        folder, _, _ = prefix.rpartition("/")
        found = []
        with self._translated(prefix):
            for base, folders, names in os.walk(self._root / folder, onerror=_raise_unless_gone):
                if Path(base) == self._root:
                    folders[:] = [name for name in folders if name != _TMP]
                for name in names:
                    path = Path(base, name)
                    key = path.relative_to(self._root).as_posix()
                    if key.startswith(prefix):
                        with contextlib.suppress(FileNotFoundError):  # deleted since the walk saw it
                            found.append(_info(key, os.stat(path)))
        return sorted(found, key=lambda info: info.key)

    def folders(self, prefix: str) -> Sequence[str]:
        """See `ObjectStore.folders`."""
        check_prefix(prefix)
        with self._translated(prefix):
            try:
                with os.scandir(self._root / prefix) as entries:
                    names = [entry.name for entry in entries if entry.is_dir() and _holds_a_file(entry.path)]
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(name for name in names if prefix or name != _TMP)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`. Folders that become empty go as well."""
        path = self._path(key)
        with self._translated(key):
            with contextlib.suppress(*_NOT_A_FILE):
                os.unlink(path)
            folder = path.parent
            try:
                while folder != self._root:
                    os.rmdir(folder)
                    folder = folder.parent
            except OSError as error:  # not empty, or another process was faster
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, *_NO_FOLDER}:
                    raise
            with contextlib.suppress(*_NOT_A_FILE):
                _sync_folder(folder)

    def _can_lock(self) -> bool:
        try:
            with self._locked():
                return True
        except BadURL:
            return False

    def delete_version(self, key: str, etag: str) -> bool:
        """See `ObjectStore.delete_version`. As good between hosts as the mount's `flock`."""
        with self._locked():
            try:
                if self.info(key).etag != etag:
                    return False
            except NotFound:
                return True
            self.delete(key)
            return True

    def _open(self, key: str) -> int:
        """To read. Raises Corrupt for what is no file: a pipe's end would never come."""
        fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode):
            return fd
        os.close(fd)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError
        raise Corrupt(f"{key} in {self.url} is not a file")

    def _check_mode(self, fd: int) -> None:
        """Tell once if files do not get the mode that was asked for."""
        found = stat.S_IMODE(os.fstat(fd).st_mode)
        if self._mode & ~found and not self._is_mode_told:
            self._is_mode_told = True
            log.warning("%s: files get the mode %04o: the umask, or the mount, takes the rest away", self.url, found)

    def _check_folder(self) -> None:
        """Tell it if a folder that was there keeps the group from what it may read."""
        found = stat.S_IMODE(os.stat(self._root).st_mode)
        if self._folder_mode & ~found:
            log.warning(
                "%s: the folder has the mode %04o and keeps it (chmod %04o)", self.url, found, self._folder_mode
            )

    @property
    def _folder_mode(self) -> int:
        """Who may read files may enter and list folders."""
        return self._mode | 0o100 | (self._mode & 0o044) >> 2

    def _path(self, key: str) -> Path:
        """The file of `key`. A link inside the store must not lead out of it either."""
        path = self._root / check_key(key)
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self._root)):
            raise Denied(f"{key} in {self.url} leads out of the store")
        if key.split("/", 1)[0] == _TMP:
            raise Denied(f"refused object name {key!r}: {_TMP} is the store's own")
        return path

    def _place(self, temporary: Path, path: Path, if_absent: bool) -> None:
        for left in reversed(range(_PLACE_TRIES)):
            try:
                self._make_folder(path.parent)
                if if_absent:
                    self._place_if_absent(temporary, path)
                else:
                    os.replace(temporary, path)
                return
            except FileExistsError:
                raise AlreadyExists(f"{path} exists") from None
            except FileNotFoundError:
                # a concurrent delete took the folder along while it was empty; it got on, so shall we
                if not left:
                    raise

    def _place_if_absent(self, temporary: Path, path: Path) -> None:
        """Raises FileExistsError."""
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            return
        with self._locked():
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            os.rename(temporary, path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Among all threads and processes that put into this store. Raises BadURL where that is impossible."""
        self._make_folder(self._root / _TMP)
        fd = os.open(self._root / _TMP / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, self._mode)
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
            _sync_folder(folder.parent)

    def _sweep(self) -> None:
        with contextlib.suppress(OSError), os.scandir(self._root / _TMP) as entries:
            for entry in entries:
                # the lock is never removed: two processes could each hold a lock of that name
                if entry.name != _LOCK and entry.stat().st_mtime < time.time() - _TMP_AGE_S:
                    os.unlink(entry.path)

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except _NOT_A_FILE:
            raise NotFound(f"{key} is not in {self.url}") from None
        except PermissionError as error:
            raise Forbidden(f"{key or 'the folder'} in {self.url}: {error.strerror}") from error
        except OSError as error:
            raise Transient(f"{key} in {self.url}: {error.strerror or error}") from error


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    etag = f"{status.st_mtime_ns:x}-{status.st_ino:x}-{status.st_size:x}"
    return ObjectInfo(key, status.st_size, etag, status.st_mtime)


def _holds_a_file(folder: str) -> bool:
    """Whether there is an object below: a process that died left empty folders, which are no part of a store.

    What cannot be looked into counts as full; whoever needs what is in there meets the error.
    """
    try:
        return any(names for _, _, names in os.walk(folder, onerror=_raise_unless_gone))
    except OSError:
        return True


def _raise_unless_gone(error: OSError) -> None:
    """A folder that cannot be read is not an empty one: what is in it would count as lost."""
    if error.errno not in _NO_FOLDER:
        raise error


def _views(buffers: Sequence[Buffer]) -> list[memoryview]:
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    return [view for view in views if view.nbytes]


def _write_all(fd: int, buffers: Sequence[Buffer]) -> None:
    rest = _views(buffers)
    while rest:
        rest = _advance(rest, os.writev(fd, rest[:_IOV_MAX]))


def _write_at(fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    rest = _views(buffers)
    while rest:
        num_bytes = os.pwritev(fd, rest[:_IOV_MAX], offset)
        rest, offset = _advance(rest, num_bytes), offset + num_bytes


def _read_all(fd: int, offset: int, buffers: Sequence[Buffer]) -> bool:
    """Fill the buffers; False if the file ends before."""
    rest = _views(buffers)
    while rest:
        num_bytes = os.preadv(fd, rest[:_IOV_MAX], offset)
        if num_bytes == 0:
            return False
        offset += num_bytes
        rest = _advance(rest, num_bytes)
    return True


def _advance(views: list[memoryview], num_bytes: int) -> list[memoryview]:
    index = 0
    while index < len(views) and num_bytes >= views[index].nbytes:
        num_bytes -= views[index].nbytes
        index += 1
    if num_bytes:
        return [views[index][num_bytes:], *views[index + 1 :]]
    return views[index:]


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
