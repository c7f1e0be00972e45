"""A folder as an object store: `file:///path` or a plain path.

An object is one file of mode 0600, in folders of mode 0700; `file:///path?mode=0640` lets the group read, as far as the
umask does. How a file comes into its place, and what that asks of the file system: `storage.stores.atomic_files`. The
lock described there is held to delete one version of an object, too.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

from storage.errors import AlreadyExists, BadURL, Corrupt, Denied, Forbidden, NotFound, StorageError, Transient
from storage.parallel import run_all
from storage.stores.atomic_files import TMP, AtomicFiles, read_at, sync_folder, write_all, write_at
from storage.stores.buffers import Buffer
from storage.stores.keys import check_key, check_prefix
from storage.stores.objects import (
    PART_SIZE_BYTES,
    Capability,
    Fetch,
    ObjectInfo,
    ObjectStore,
    check_read_size,
    parts_of_size,
)

log = logging.getLogger(__name__)

MODE = 0o600
MODES = (MODE, 0o640, 0o644, 0o660, 0o664)
"""Modes that files may have: nobody but the owner and the group ever writes."""
_CAPABILITIES = {Capability.CONDITIONAL_PUTS, Capability.GUARDED_READS, Capability.HOST_CACHE}
_NOT_A_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_NO_FOLDER = {errno.ENOENT, errno.ENOTDIR}
_SHOWN = 60


class LocalStore(ObjectStore):
    """Objects as files below one folder, which is created by the first put."""

    def __init__(self, root: str | os.PathLike[str], mode: int = MODE) -> None:
        try:
            self._root = Path(os.path.abspath(root))
            is_file = self._root.exists() and not self._root.is_dir()
        except FileNotFoundError:
            raise BadURL(f"{root} is below the current folder, which is gone; give the whole path") from None
        except OSError as error:
            raise BadURL(f"{str(root)[:_SHOWN]!r} cannot be a folder: {error.strerror}") from None
        if is_file:
            raise BadURL(f"{self._root} is a file; a checkpoint URL names a folder")
        self._mode = mode
        self._files = AtomicFiles(self._root, self.url, mode)

    @property
    def url(self) -> str:
        """The folder's absolute path; as a URL where it has options."""
        return str(self._root) if self._mode == MODE else f"file://{self._root}?mode={self._mode:04o}"

    def can(self, capability: Capability) -> bool:
        """See `ObjectStore.can`. Puts are conditional by hard links, or else by a lock; deletes by a lock only."""
        match capability:
            case Capability.HOST_LOCKS:
                with self._translated(""):
                    return not self._files.can_link()
            case Capability.CONDITIONAL_DELETES:
                return self._can_lock()
        return capability in _CAPABILITIES

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        """See `ObjectStore.put`."""
        return self._put(key, lambda fd: write_all(fd, buffers), if_absent=if_absent)

    def put_from(self, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
        """See `ObjectStore.put_from`."""
        if size_bytes <= PART_SIZE_BYTES:
            return self.put(key, fetch(0, size_bytes))

        def write(fd: int) -> None:
            def copy(offset: int, length: int) -> None:
                write_at(fd, fetch(offset, length), offset)

            run_all(pool, [functools.partial(copy, *part) for part in parts_of_size(size_bytes)])

        return self._put(key, write, if_absent=False)

    def _put(self, key: str, write: Callable[[int], None], *, if_absent: bool) -> ObjectInfo:
        path = self._path(key)
        with self._translated(key):
            try:
                return _info(key, self._files.put(path, write, if_absent=if_absent))
            except _NOT_A_FILE as error:
                if self._root.is_dir():
                    raise
                raise Denied(f"{self.url} is no folder, and cannot be made one: {error.strerror}") from None

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        """See `ObjectStore.read_into`. Tells no etag: on some mounts (FUSE) a file has another inode each time."""
        with self._translated(key):
            fd = self._open(key)
            try:
                if if_match is not None and _info(key, os.fstat(fd)).etag != if_match:
                    raise Corrupt(f"{key} in {self.url} changed while it was read")
                if not read_at(fd, buffers, offset):
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
                    folders[:] = [name for name in folders if name != TMP]
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
        return sorted(name for name in names if prefix or name != TMP)

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
                sync_folder(folder)

    def _can_lock(self) -> bool:
        try:
            with self._files.locked():
                return True
        except BadURL:
            return False

    def delete_version(self, key: str, etag: str) -> bool:
        """See `ObjectStore.delete_version`. As good between hosts as the mount's `flock`."""
        with self._files.locked():
            try:
                if self.info(key).etag != etag:
                    return False
            except NotFound:
                return True
            self.delete(key)
            return True

    def _open(self, key: str) -> int:
        """Open an object's file to read it. Raises Corrupt for what is no file: a pipe's end would never come."""
        fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode):
            return fd
        os.close(fd)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError
        raise Corrupt(f"{key} in {self.url} is not a file")

    def _path(self, key: str) -> Path:
        """The file of `key`. A link inside the store must not lead out of it either."""
        path = self._root / check_key(key)
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self._root)):
            raise Denied(f"{key} in {self.url} leads out of the store")
        if key.split("/", 1)[0] == TMP:
            raise Denied(f"refused object name {key!r}: {TMP} is the store's own")
        return path

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except FileExistsError:
            raise AlreadyExists(f"{key} exists in {self.url}") from None
        except _NOT_A_FILE:
            raise NotFound(f"{key} is not in {self.url}") from None
        except PermissionError as error:
            raise Forbidden(f"{key or 'the folder'} in {self.url}: {error.strerror}") from error
        except OSError as error:
            if error.errno == errno.EROFS:
                raise Forbidden(f"{self.url}: {error.strerror}; what is only read takes Access.READ") from error
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
