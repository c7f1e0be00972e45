"""Where agents meet without a server: the launcher's `Register` on an object store or a folder."""

from __future__ import annotations

import contextlib
import functools
import logging
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from elastic_moe.mounts import mount_that_remembers_absence
from launcher import KVUnavailable, UsageError
from storage import AlreadyExists, Capability, NotFound, ObjectStore, StorageError, open_store

log = logging.getLogger(__name__)

_TIMEOUT_S = 3.0
_SIGN, _SIGNED = "elastic-moe", b"Nodes meet here; of many who create the same object one does.\n"
_UNSURE = b"Nodes meet here; it is not known yet whether of many who create the same object one does.\n"
_TAKES_LONG_NAMES = ("s3://", "fsspec+s3://", "gs://", "gcs://")
_NAME_SIZE_BYTES_MAX = 1000  # of 1024
_NUM_RACERS, _NUM_RACES = 4, 2


class StoreRegister:
    """A `launcher.kv.bucket.Register` on `store`, which is closed with it."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._quick = store.impatient(_TIMEOUT_S)

    @property
    def is_remote(self) -> bool:
        return not self._is_folder and not self._store.url.startswith("memory:")

    @property
    def name_size_bytes_max(self) -> int:
        """See `Register`. The prefix counts, which the URL has."""
        url = self._store.url
        return _NAME_SIZE_BYTES_MAX - len(url.encode()) if url.startswith(_TAKES_LONG_NAMES) else 0

    @property
    def _is_folder(self) -> bool:
        return self._store.url.startswith(("/", "file:"))

    def check(self) -> None:
        """Raises UsageError where the store lets two writers through, or cannot be written."""
        try:
            honours = self._store.can(Capability.CONDITIONAL_PUTS)
            needs_locks = self._store.can(Capability.HOST_LOCKS)
            is_raced = not (honours and self.is_remote) or self._is_signed()
            num_winners, is_sure = (1, honours) if is_raced else self._num_winners()
            if num_winners == 1:
                self._quick.put(_SIGN, [_SIGNED if is_sure else _UNSURE])
        except StorageError as error:
            raise UsageError(f"--rdzv-endpoint {self._store.url} cannot be used: {error}") from error
        if not honours:
            raise UsageError(
                f"--rdzv-endpoint {self._store.url} honours no conditional puts (If-None-Match), without which two "
                "nodes could lead at once: meet elsewhere, in a folder that all nodes share, or on etcd"
            )
        if num_winners > 1:
            raise UsageError(
                f"--rdzv-endpoint {self._store.url} lets two create one object at once (it looks, and writes then), so "
                "two nodes could lead at once: meet elsewhere, in a folder that all nodes share, or on etcd"
            )
        if needs_locks:
            raise UsageError(
                f"--rdzv-endpoint {self._store.url} has no hard links, without which nodes of two hosts could lead at "
                "once: meet at the URL of what is mounted there (s3://...), in another folder, or on etcd"
            )
        if self._is_folder and (mount := mount_that_remembers_absence(_path(self._store.url))):
            log.warning(
                "--rdzv-endpoint %s: NFS at %s remembers for up to a minute that a file was not there, so nodes hear "
                "late of one another; mount it with lookupcache=positive",
                self._store.url,
                mount,
            )

    def _is_signed(self) -> bool:
        """Whether somebody has met here before, and found that there is one winner."""
        try:
            return self._quick.read(_SIGN) == _SIGNED
        except NotFound:
            return False

    def _num_winners(self) -> tuple[int, bool]:
        """How many of some that create the same object at once succeed, and whether all heard if they have. There are
        gateways that one client cannot tell from a sound one, since they honour conditions that were settled before."""
        most, is_sure = 1, True
        with ThreadPoolExecutor(_NUM_RACERS, thread_name_prefix="register-race") as pool:
            for _ in range(_NUM_RACES):  # the first one opens the connections
                name = f"{_SIGN}.race-{uuid.uuid4().hex}"
                racers = [f"racer {number}\n".encode() for number in range(_NUM_RACERS)]
                won = list(pool.map(functools.partial(self._has_created, name), racers))
                most, is_sure = max(most, won.count(True)), is_sure and None not in won
                with contextlib.suppress(StorageError):
                    self._quick.delete(name)
        return most, is_sure

    def _has_created(self, name: str, content: bytes) -> bool | None:
        """None where that is not known."""
        try:
            self._quick.put(name, [content], if_absent=True)
        except AlreadyExists:
            return False
        except StorageError as error:
            log.info("%s is raced once more by the next: %s", self._store.url, error)
            return None
        return True

    def read(self, name: str) -> bytes | None:
        with self._told():
            try:
                return self._quick.read(name)
            except NotFound:
                return None

    def create(self, name: str, content: bytes) -> bool:
        with self._told():
            try:
                self._quick.put(name, [content], if_absent=True)
            except AlreadyExists:
                return False
            return True

    def write(self, name: str, content: bytes) -> None:
        with self._told():
            self._quick.put(name, [content])

    def names(self, prefix: str) -> list[str]:
        with self._told():
            return [info.key for info in self._quick.list(prefix)]

    def remove(self, name: str) -> None:
        with self._told():
            self._quick.delete(name)

    def close(self) -> None:
        self._store.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            raise KVUnavailable(f"{self._store.url}: {error}") from error


def _path(url: str) -> str:
    return url.removeprefix("file://").partition("?")[0]


def open_register(url: str) -> StoreRegister:
    """What the entry point `storage` in group `elastic_moe.registers` names.

    Raises:
        UsageError: no store has such a URL, or the store honours no conditional puts.
    """
    try:
        store = open_store(url)
    except (StorageError, ValueError) as error:
        raise UsageError(f"--rdzv-endpoint {url}: {error}") from error
    register = StoreRegister(store)
    try:
        register.check()
    except BaseException:
        register.close()
        raise
    return register
