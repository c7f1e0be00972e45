"""Any file system that fsspec knows as an object store: `gs://`, `az://`, `http(s)://` to read, `fsspec+s3://`, ...

fsspec promises less than our own back ends: no conditional puts (a put with `if_absent` looks first), no guard on
ranged reads (the etag is compared before), and every read and put is copied once. It has its own settings and its own
retries, below ours. A file system whose names show what is half written (`fsspec+file://`, `sftp://`) is written under
`.tmp`, and the file renamed: a reader never sees half of a rewrite.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations, registry

from storage.errors import AlreadyExists, BadURL, Cause, Corrupt, Denied, Forbidden, NotFound, StorageError, Transient
from storage.parallel import windowed
from storage.stores.adaptive_limit import AdaptiveLimit
from storage.stores.buffers import Buffer, fill, size_of, views_of
from storage.stores.keys import check_key, check_prefix
from storage.stores.objects import Fetch, ObjectInfo, ObjectStore, check_read_size, parts_of_size
from storage.stores.retry_policy import Retrier
from storage.stores.retrying_store import RetryingStore

log = logging.getLogger(__name__)

_ETAGS = ("ETag", "etag", "md5Hash", "content_md5", "generation")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")
_NUM_REQUESTS = 32
_STREAMED_SIZE_BYTES = 64 * 1024 * 1024
_NUM_PARTS_AHEAD = 4
_PASSWORD = re.compile(r"([^/\s:@]*):[^/\s]+@")
_IN_MEMORY = f"{MemoryFileSystem.__module__}.{MemoryFileSystem.__qualname__}"
_TMP = ".tmp"  # as in a folder that is opened without fsspec (see `storage.stores.atomic_files`)
_TMP_NAME = re.compile(r"/[0-9a-f]{32}/?$")
_TMP_AGE_S = 24 * 3600.0


class FsspecStore(ObjectStore):
    """One folder of an fsspec file system. Thread-safe as far as the file system is."""

    def __init__(self, url: str, fs: AbstractFileSystem, root: str) -> None:
        self._url = url
        self._fs = fs
        self._root = root.rstrip("/")
        # object stores have no rename of their own, only fsspec's copy; with them an object appears whole
        self._renames = type(fs).mv is not AbstractFileSystem.mv
        self._is_swept = False

    @property
    def url(self) -> str:
        """The URL that the store was opened by."""
        return self._url

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        """See `ObjectStore.put`."""
        path, views = self._path(key), views_of(buffers)
        with self._translated(key):
            if if_absent and self._fs.exists(path):
                raise AlreadyExists(f"{key} exists in {self.url}")
            try:
                self._write(path, views)
                return self.info(key)
            except (FileNotFoundError, NotFound) as error:
                # JuiceFS's gateway, when the last other object of the folder is deleted at that moment
                raise Transient(
                    f"{key} in {self.url} was not found while it was put: {error}", Cause.CONFLICT
                ) from error

    def _write(self, path: str, views: Sequence[memoryview]) -> None:
        if size_of(views) < _STREAMED_SIZE_BYTES:
            self._place(path, lambda at: self._fs.pipe_file(at, b"".join(views)))
        else:
            self._place(path, lambda at: self._stream(at, views))

    def put_from(self, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
        """See `ObjectStore.put_from`. The parts are fetched ahead, but written one after the other."""
        if size_bytes < _STREAMED_SIZE_BYTES:
            return self.put(key, list(self._ahead(size_bytes, fetch, pool)))
        path = self._path(key)
        with self._translated(key):
            self._place(path, lambda at: self._stream(at, self._ahead(size_bytes, fetch, pool)))
            return self.info(key)

    @staticmethod
    def _ahead(size_bytes: int, fetch: Fetch, pool: Executor) -> Iterator[memoryview]:
        parts = windowed(pool, lambda part: fetch(*part), parts_of_size(size_bytes), _NUM_PARTS_AHEAD)
        return itertools.chain.from_iterable(parts)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        """See `ObjectStore.read_into`. Tells no etag: what is known of the object was asked for before it was read."""
        path, size_bytes = self._path(key), size_of(buffers)
        with self._translated(key):
            info = self.info(key)
            if if_match not in (None, info.etag):
                raise Corrupt(f"{key} in {self.url} changed while it was read")
            if offset + size_bytes > info.size_bytes:
                raise Corrupt(f"{key} in {self.url} is shorter than it must be ({info.size_bytes} bytes)")
            data = memoryview(self._fs.cat_file(path, start=offset, end=offset + size_bytes) if size_bytes else b"")
        if data.nbytes != size_bytes:
            raise Transient(f"{key} in {self.url}: {data.nbytes} of {size_bytes} bytes came", Cause.TRUNCATED)
        fill(buffers, data)
        return ""

    def read(self, key: str) -> bytes:
        """See `ObjectStore.read`."""
        path = self._path(key)
        check_read_size(f"{key} in {self.url}", self.info(key).size_bytes)
        with self._translated(key):
            return bytes(self._fs.cat_file(path))

    def info(self, key: str) -> ObjectInfo:
        """See `ObjectStore.info`."""
        path = self._path(key)
        with self._translated(key):
            found = self._fs.info(path)
            if found.get("type") == "directory":
                raise NotFound(f"{key} is not in {self.url}")
            size_bytes = _size(found)
            if size_bytes is None:
                raise Denied(
                    f"{key} in {self.url}: the server does not tell how long it is, so it cannot be read safely"
                )
            return ObjectInfo(key, size_bytes, _etag(found))

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        """See `ObjectStore.list`."""
        check_prefix(prefix)
        folder = "/".join([self._root, *prefix.split("/")[:-1]])
        with self._translated(prefix):
            try:
                found = self._fs.find(folder, detail=True)
            except FileNotFoundError:
                return []
            infos = [self._listed(self._key(path), info) for path, info in found.items()]
        found_keys = (info for info in infos if info.key.startswith(prefix) and not info.key.startswith(f"{_TMP}/"))
        return sorted(found_keys, key=lambda info: info.key)

    def _listed(self, key: str, info: Mapping[str, Any]) -> ObjectInfo:
        """One row of a listing; what tells no sizes (pages of a web server) is asked for each."""
        size_bytes = _size(info)
        return self.info(key) if size_bytes is None else ObjectInfo(key, size_bytes, _etag(info), _when(info))

    def folders(self, prefix: str) -> Sequence[str]:
        """See `ObjectStore.folders`. A folder without any object counts as none where the file system has such."""
        check_prefix(prefix)
        folder = f"{self._root}/{prefix}".rstrip("/")
        with self._translated(prefix):
            try:
                rows = self._fs.ls(folder, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
            paths = [row["name"].rstrip("/") for row in rows if row["type"] == "directory"]
            paths = [path for path in paths if self._key(path) != prefix.rstrip("/") and self._fs.find(path)]
        names = (self._key(path).removeprefix(prefix) for path in paths)
        return sorted(name for name in names if prefix or name != _TMP)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        path = self._path(key)
        with self._translated(key), contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
            if not self._fs.isdir(path):
                self._fs.rm_file(path)

    def _place(self, path: str, write: Callable[[str], None]) -> None:
        """Have the object written; where names show what is half written, under another name, and renamed."""
        self._make_folder(path)
        if not self._renames:
            write(path)
            return
        if not self._is_swept:
            self._is_swept = True
            self._sweep(time.time() - _TMP_AGE_S)
        temporary = f"{self._root}/{_TMP}/{uuid.uuid4().hex}"
        self._make_folder(temporary)
        try:
            write(temporary)
            self._rename(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):  # the error at hand says more
                self._fs.rm_file(temporary)
            raise

    def _rename(self, temporary: str, path: str) -> None:
        """Put a file in its place. Where a server renames to no name that is taken, what has that name goes first."""
        try:
            self._fs.mv(temporary, path)
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            if not self._fs.exists(path):
                raise
        if self._fs.exists(temporary):  # some refuse by an error (SMB), and some by doing nothing (WebHDFS)
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(path)
            self._fs.mv(temporary, path)

    def _sweep(self, before_unix_s: float) -> None:
        """Remove what processes that died have left half written."""
        try:
            rows = self._fs.ls(f"{self._root}/{_TMP}", detail=True)
        except FileNotFoundError:
            return
        for row in rows:
            when, is_ours = _when(row), _TMP_NAME.search(row["name"])
            if is_ours and when is not None and when < before_unix_s:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(row["name"])

    def _stream(self, path: str, views: Iterable[memoryview]) -> None:
        """In blocks of the file system's own size, so that no second copy of a large object is made."""
        file = self._fs.open(path, "wb")
        try:
            for view in views:
                file.write(view)
        except BaseException:
            with contextlib.suppress(Exception):  # the error at hand says more
                if self._renames:
                    file.close()
                else:
                    file.discard()
                    file.closed = True  # else it is flushed when it is collected
            raise
        file.close()

    def _make_folder(self, path: str) -> None:
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _key(self, path: str) -> str:
        return str(self._fs._strip_protocol(path)).strip("/").removeprefix(self._root.strip("/")).lstrip("/")

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        where = f"{key} in {self.url}"
        try:
            yield
        except StorageError:
            raise
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise NotFound(f"{where} does not exist") from None
        except FileExistsError:
            raise AlreadyExists(f"{where} exists") from None
        except PermissionError as error:
            raise Forbidden(f"{where}: {error}") from error
        except NotImplementedError:
            raise Denied(f"{where}: {type(self._fs).__name__} cannot do this; the store can only be read") from None
        except OSError as error:
            raise Transient(f"{where}: {error or type(error).__name__}") from error
        except Exception as error:
            raise StorageError(f"{where}: {type(error).__name__}: {error}") from error


def open_fsspec(url: str, protocol_url: str) -> ObjectStore:
    """Open `protocol_url` with fsspec; `url` is what the user wrote. Raises BadURL."""
    protocol, _, rest = protocol_url.partition("://")
    if found := _PASSWORD.match(rest):  # each message names the URL
        raise BadURL(
            f"{protocol}://{found[1]}:...@... has a password, which logs and checkpoints would tell: take it out, and"
            f" give it to fsspec by FSSPEC_{protocol.upper()}_PASSWORD in the environment"
        )
    try:
        fs, root = fsspec.core.url_to_fs(protocol_url, use_listings_cache=False)
    except ImportError as error:
        hint = known_implementations.get(protocol, {}).get("err") or str(error)
        raise BadURL(f"no store for {protocol}:// in {url!r} yet: {hint}") from None
    except Exception as error:  # noqa: BLE001 - each file system has errors of its own
        raise BadURL(f"{url!r} cannot be opened: {type(error).__name__}: {error}") from None
    store = FsspecStore(url, fs, root)
    return RetryingStore(store, Retrier(AdaptiveLimit(_NUM_REQUESTS), store.retries))


def is_known(protocol: str) -> bool:
    """Whether fsspec has a file system for the protocol, installed or not."""
    return protocol in known_implementations or protocol in registry


def is_memory(protocol: str) -> bool:
    """Whether the protocol's file system is in the memory of this process. No package is looked for."""
    named = known_implementations.get(protocol, {}).get("class", "")
    loaded = registry.get(protocol)
    return named == _IN_MEMORY or (isinstance(loaded, type) and issubclass(loaded, MemoryFileSystem))


def _size(info: Mapping[str, Any]) -> int | None:
    """The size that a file system tells; None where it tells none. Raises ValueError for what is no size."""
    size = info.get("size")
    if size is None:
        return None
    if int(size) < 0:
        raise ValueError(f"a size of {size}")
    return int(size)


def _when(info: Mapping[str, Any]) -> float | None:
    value = next((info[name] for name in _TIMES if info.get(name)), None)
    if isinstance(value, datetime.datetime):
        return value.timestamp()
    return float(value) if isinstance(value, (int, float)) else None


def _etag(info: Mapping[str, Any]) -> str:
    """Whatever tells one version of a file from another; with nothing better, its size."""
    for name in _ETAGS:
        if info.get(name):
            return str(info[name]).strip('"')
    when = _when(info)  # one file system has it as a date in one place and as a number in another
    text = next((str(info[name]) for name in _TIMES if info.get(name)), "") if when is None else str(when)
    return f"{text}-{_size(info)}"
