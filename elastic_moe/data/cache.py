"""Token ids in a folder that the processes of a node share: made once, mapped by all.

A file has its name only once it is whole, and says how long it is and what its bytes add up to, so one that a crash
has torn is made again. Whoever makes one holds a lock that ends with its process. What has been made of a large one by
then is marked now and then, and the next one goes on from there.
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
from launcher import worker

log = logging.getLogger(__name__)

_HEADER_BYTES = 4096  # a page, so that what follows can be mapped
_VERSION = 1
_SUFFIX, _PARTIAL = ".tokens", ".partial"
_KEY = re.compile(r"[0-9a-f]{40}")
_NUM_LOCKS = 64  # files, that many keys share: a lock file for each would never go away
_FULL = (errno.ENOSPC, errno.EDQUOT)
_POLL_S = 0.1
_BUFFER_IDS = 1 << 20
_MARK_BYTES = 16 << 20
_LOOK_S = 5.0
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
    """Takes the ids of one file of the cache, in order, all of the type of the first.

    Attributes:
        done: of how much of its source the ids are in the file, as `mark` was told, by an earlier process maybe.
    """

    def __init__(self, file: Any, check: Callable[[int], None]) -> None:
        """Args:
        file: to read and write; what it holds of an earlier try is gone on from, if that is whole up to its mark.
        check: called with the bytes written so far; raises where they are too many.
        """
        self._file = file
        self._check = check
        self._waiting: list[Ids] = []
        self._num_waiting = 0
        self._sum = 0
        self._num_unmarked = 0
        self.dtype: np.dtype[Any] = np.dtype(np.uint8)
        self.count = 0
        self.done = 0
        self._resume()

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
            self._sum = zlib.crc32(joined.data, self._sum)
            self._num_unmarked += joined.nbytes
            self.count += len(joined)
            self._waiting.clear()
            self._num_waiting = 0
            self._check(self.count * self.dtype.itemsize)

    def mark(self, done: int) -> None:
        """Note that all ids of so much of the source were taken, if it is worth a note."""
        if self._num_unmarked + self._num_waiting * self.dtype.itemsize >= _MARK_BYTES:
            self.flush()
            self._num_unmarked = 0
            self.done = done
            told = {"dtype": self.dtype.str, "count": self.count, "sum": self._sum, "done": done}
            os.pwrite(self._file.fileno(), _header(told), 0)

    def close(self, check: int) -> None:
        """Say that it is whole, in place of a mark.

        Args:
            check: what its bytes add up to, as `TokenCache` counts.
        """
        os.pwrite(self._file.fileno(), _header({"dtype": self.dtype.str, "count": self.count, "check": check}), 0)

    def _resume(self) -> None:
        """Take the ids before the file's mark for ours, and cut off what is behind them."""
        try:
            told = json.loads(os.pread(self._file.fileno(), _HEADER_BYTES, 0))
            dtype, count, done = np.dtype(told["dtype"]), told["count"], told["done"]
            if told["version"] == _VERSION and self._sum_of(count * dtype.itemsize) == told["sum"]:
                self.dtype, self.count, self.done, self._sum = dtype, count, done, told["sum"]
        except (ValueError, KeyError, TypeError):
            pass  # it has no mark
        self._file.truncate(_HEADER_BYTES + self.count * self.dtype.itemsize)
        self._file.seek(0, os.SEEK_END)

    def _sum_of(self, num_bytes: int) -> int | None:
        """Of the bytes behind the header; None where there are fewer."""
        found = 0
        self._file.seek(_HEADER_BYTES)
        while num_bytes and (part := self._file.read(min(num_bytes, _MARK_BYTES))):
            found = zlib.crc32(part, found)
            num_bytes -= len(part)
        return None if num_bytes else found


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
        with self._told(), self._kept_if_marked(partial) as opened:
            with open(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:
                sink = TokenSink(file, lambda num_bytes: self._make_room(num_bytes, keep))
                opened.append(sink)
                if sink.done:
                    log.info("data: %d ids of %s were there already, and are gone on from", sink.count, partial)
                make(sink)
                sink.flush()
                sink.close(_checksum(_mapped(partial, sink.dtype, sink.count)))
            partial.rename(self._path(key))
            return _mapped(self._path(key), sink.dtype, sink.count)

    @contextlib.contextmanager
    def _kept_if_marked(self, partial: Path) -> Iterator[list[TokenSink]]:
        """Leave what was begun to the next process, unless it has no mark, or would be refused again."""
        opened: list[TokenSink] = []
        try:
            yield opened
        except BaseException as error:
            is_full = isinstance(error, OSError) and error.errno in _FULL
            if is_full or isinstance(error, UserError) or not any(sink.done for sink in opened):
                partial.unlink(missing_ok=True)
            raise

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
            size, look_s = self._size_of_partials(), time.monotonic() + _LOOK_S
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
                    if time.monotonic() >= look_s:
                        before, size = size, self._size_of_partials()
                        look_s = time.monotonic() + _LOOK_S
                        if size != before:
                            worker.alive()  # as the other is; one that hangs lets us count as hung as well
            yield is_mine
        finally:
            os.close(fd)

    def _size_of_partials(self) -> int:
        found = 0
        for path in self._folder.glob(f"*{_PARTIAL}"):
            with contextlib.suppress(OSError):  # it has its name by now
                found += path.stat().st_size
        return found

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
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


def _header(fields: Mapping[str, Any]) -> bytes:
    return json.dumps({"version": _VERSION, **fields}).encode().ljust(_HEADER_BYTES)


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> Ids:
    if not count:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=_HEADER_BYTES, shape=(count,))


def _checksum(ids: Ids) -> int:
    check = 0
    for part in parts_to_check(ids):
        check = zlib.crc32(part.data, check)
    return check
