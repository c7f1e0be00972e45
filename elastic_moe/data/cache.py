"""Token ids in a folder that the processes of a node share: made once, mapped by all.

A file has its name only once it is whole, and says how long it is and what its bytes add up to, so one that a crash
has torn is made again. Whoever makes one holds a lock that ends with its process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from elastic_moe.data.tokenizer import Ids
from elastic_moe.errors import UserError

log = logging.getLogger(__name__)

_HEADER_BYTES = 4096  # a page, so that what follows can be mapped
_VERSION = 1
_SUFFIX, _PARTIAL = ".tokens", ".partial"
_KEY = re.compile(r"[0-9a-f]{40}")
_NUM_LOCKS = 64  # files, that many keys share: a lock file for each would never go away
_POLL_S = 0.1
_BUFFER_IDS = 1 << 20
# Files larger than this are looked through by pages spread over them: nobody reads terabytes at a start.
WHOLE_BYTES = 256 << 20
_CHUNK_IDS = 8 << 20
_PAGE_BYTES = 64 << 10
_NUM_PAGES = 64


def parts_to_check(ids: Any) -> Iterator[Ids]:
    """All of an array in parts, or, of a very large one, pages spread over it."""
    if ids.nbytes <= WHOLE_BYTES:
        for start in range(0, len(ids), _CHUNK_IDS):
            yield np.ascontiguousarray(ids[start : start + _CHUNK_IDS])
        return
    page = _PAGE_BYTES // ids.itemsize
    for start in np.linspace(0, len(ids) - page, _NUM_PAGES, dtype=np.int64):
        yield np.ascontiguousarray(ids[int(start) : int(start) + page])


class TokenSink:
    """Takes the ids of one file of the cache, in order, all of the type of the first."""

    def __init__(self, file: Any, check: Callable[[int], None]) -> None:
        """Args:
        check: called with the bytes written so far; raises where they are too many.
        """
        self._file = file
        self._check = check
        self._waiting: list[Ids] = []
        self._num_waiting = 0
        self.dtype: np.dtype[Any] = np.dtype(np.uint8)
        self.count = 0

    def append(self, ids: Ids) -> None:
        """Take some more."""
        if not self.count and not self._num_waiting:
            self.dtype = ids.dtype
        self._waiting.append(ids)
        self._num_waiting += len(ids)
        if self._num_waiting >= _BUFFER_IDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._num_waiting:
            joined = np.concatenate(self._waiting).astype(self.dtype, copy=False)
            self._file.write(joined.data)
            self._file.flush()  # its size is looked at
            self.count += len(joined)
            self._waiting.clear()
            self._num_waiting = 0
            self._check(self.count * self.dtype.itemsize)


Make = Callable[[TokenSink], None]


class TokenCache:
    """A folder of arrays by their keys. Files are for their owner alone."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Raises UserError: the folder cannot be made."""
        self._folder = folder
        self._max_bytes = max_bytes
        with self._told():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def arrays(self, wanted: Mapping[str, Make]) -> dict[str, Ids]:
        """The arrays of all keys, mapped; what is not there is made, by this process or another of this node.

        What another is at is left to it, and waited for at the end: so the processes of a node share the work.

        Raises:
            UserError: they do not fit, or cannot be written.
        """
        found: dict[str, Ids] = {}
        keep = frozenset(wanted)
        for waits in (False, True):
            for key in [key for key in wanted if key not in found]:
                array = self._open(key)
                if array is None:
                    with self._lock(key, waits=waits) as is_mine:
                        if not is_mine:
                            continue
                        array = self._open(key)
                        if array is None:
                            array = self._made(key, wanted[key], keep)
                found[key] = array
        return found

    def _made(self, key: str, make: Make, keep: frozenset[str]) -> Ids:
        partial = self._path(key).with_suffix(_PARTIAL)
        with self._told():
            try:
                with open(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "r+b") as file:
                    file.seek(_HEADER_BYTES)
                    sink = TokenSink(file, lambda num_bytes: self._make_room(num_bytes, keep))
                    make(sink)
                    sink.flush()
                    check = _checksum(_mapped(partial, sink.dtype, sink.count))
                    header = {"version": _VERSION, "dtype": sink.dtype.str, "count": sink.count, "check": check}
                    file.seek(0)
                    file.write(json.dumps(header).encode().ljust(_HEADER_BYTES))
                partial.rename(self._path(key))
            finally:
                partial.unlink(missing_ok=True)
            return _mapped(self._path(key), sink.dtype, sink.count)

    def _open(self, key: str) -> Ids | None:
        """The array of a key; None if there is none that is whole."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                header = json.loads(file.read(_HEADER_BYTES))
                size = os.fstat(file.fileno()).st_size
            dtype, count = np.dtype(header["dtype"]), header["count"]
            if header["version"] == _VERSION and size == _HEADER_BYTES + count * dtype.itemsize:
                array = _mapped(path, dtype, count)
                if _checksum(array) == header["check"]:
                    with contextlib.suppress(OSError):  # of a read-only disk, or it was removed since: it is mapped
                        os.utime(path)  # used now
                    return array
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass  # whatever is wrong with it, it is made again
        log.warning("data: %s is damaged and is made again", path)
        return None

    def _make_room(self, num_bytes: int, keep: Iterable[str]) -> None:
        """Remove what was used longest ago, so that the file that is being written fits; not what is in `keep`.

        What a process that was killed has begun goes as well; one that is alive holds the lock of what it is at.
        """
        kept = {self._path(key).name for key in keep}
        files = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process makes room as well
                if path.suffix in (_SUFFIX, _PARTIAL) and _KEY.fullmatch(path.stem):
                    files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total_bytes = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total_bytes <= self._max_bytes:
                return
            if path.name not in kept and self._removed(path):
                log.info("data: %s makes room for other data in the cache", path.name)
                total_bytes -= size
        if total_bytes > self._max_bytes:
            raise UserError(
                f"data.cache: the token ids of data.url take more than data.cache_gib = {self._max_bytes / (1 << 30):g}"
                f" in {self._folder} ({num_bytes / (1 << 30):.2f} GiB so far of one file): raise it"
            )

    def _removed(self, path: Path) -> bool:
        """Remove a file, unless it is one that a process is still writing; whether it is gone."""
        if path.suffix == _SUFFIX:
            path.unlink(missing_ok=True)  # whoever has it mapped keeps it
            return True
        with self._lock(path.stem, waits=False) as is_nobodys:
            if is_nobodys:
                path.unlink(missing_ok=True)
            return is_nobodys

    @contextlib.contextmanager
    def _lock(self, key: str, *, waits: bool) -> Iterator[bool]:
        """Hold the lock of a key; False if another process does and it is not waited for."""
        path = self._folder / f"lock-{int(key[:8], 16) % _NUM_LOCKS:02d}"
        with self._told():
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            is_mine, is_told = False, False
            while not is_mine:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    is_mine = True
                except BlockingIOError:
                    if not waits:
                        break
                    if not is_told:
                        log.info("data: another process of this node is reading the data: waiting for it")
                        is_told = True
                    time.sleep(_POLL_S)
            yield is_mine
        finally:
            os.close(fd)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"data.cache: {self._folder} is on a full disk: set data.cache to another") from error
            if error.filename is None or not str(error.filename).startswith(str(self._folder)):
                raise  # of what is read, not of the cache
            raise UserError(
                f"data.cache: {self._folder} cannot be written ({error.strerror}): set data.cache to a folder on a "
                "local disk"
            ) from error


def default_folder(environ: Mapping[str, str]) -> Path:
    """Where the cache is if the job does not say.

    Raises:
        UserError: there is no home.
    """
    if named := environ.get("XDG_CACHE_HOME"):
        return Path(named, "elastic-moe")
    try:
        return Path.home() / ".cache" / "elastic-moe"
    except RuntimeError:
        raise UserError("data.cache: there is no home for a cache: set it to a folder on a local disk") from None


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> Ids:
    if not count:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=_HEADER_BYTES, shape=(count,))


def _checksum(ids: Ids) -> int:
    check = 0
    for part in parts_to_check(ids):
        check = zlib.crc32(part.data, check)
    return check
