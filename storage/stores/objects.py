"""The object store contract: bytes with names, and nothing more.

`storage.stores.keys` says what a key may be. Implementations are thread-safe: any method may run in any number of
threads at once.
"""

from __future__ import annotations

import abc
import enum
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Self

from storage.errors import Corrupt, NotFound
from storage.stores.buffers import Buffer
from storage.stores.retry_policy import RetryLog

Fetch = Callable[[int, int], Sequence[memoryview]]
"""From an offset and a number of bytes to those bytes of some content, in pieces. Asked by any thread, in any order."""

PART_SIZE_BYTES = 16 * 1024 * 1024
"""Size of the parts in which an object is streamed, where the store does not want another one."""

READ_SIZE_BYTES_MAX = 256 * 1024 * 1024
"""The largest object that is read as a whole, an index: a larger one is something else, by mistake or on purpose."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object. `etag` changes whenever the object's bytes change; it means nothing in another store.

    `modified_unix_s` is when it was written, by the store's clock; only listings tell it, and not those of every store.
    """

    key: str
    size_bytes: int
    etag: str
    modified_unix_s: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload in parts that was begun and not ended. Its parts take space, and no listing of objects shows them."""

    key: str
    id: str
    started_unix_s: float


class Capability(enum.Enum):
    """What a store may promise beyond the least of the contract; `ObjectStore.can` says whether it does."""

    CONDITIONAL_PUTS = "conditional puts"
    """Of two puts with `if_absent` at once, the server lets only one through. Without, a put looks first, and may miss
    a race."""
    HOST_LOCKS = "host locks"
    """Less than the others: puts are conditional by a file lock, which may be one of each host's own."""
    CONDITIONAL_DELETES = "conditional deletes"
    """`delete_version` removes one version of an object and spares any other."""
    GUARDED_READS = "guarded reads"
    """The server checks `if_match` in the same request that reads. Without, it is compared before."""
    HOST_CACHE = "host cache"
    """Bytes that a process has read are kept by its host for other processes: so the page cache does for a folder."""
    ON_EVERY_HOST = "on every host"
    """All bytes of the checkpoint that is read are in the memory of each host that reads it."""


class ObjectStore(abc.ABC):
    """Where checkpoints live.

    A back end implements what is abstract. The other methods hold for any back end as they are; one that can do more
    overrides them. Whatever wraps another store inherits from `storage.stores.wrapper.StoreWrapper` instead, which
    passes every method on.

    Atomicity: an object appears whole or not at all, and a reader never sees half of a rewrite. Durability: when
    `put` returns, the object survives the death of this process (and, on a local disk, of the host).

    Lifetime: whoever opens a store closes it, as a context manager or by `close`, and nobody closes a store that was
    handed to it. No method is called after that.
    """

    @property
    @abc.abstractmethod
    def url(self) -> str:
        """The URL that `open_store` would open this store by."""

    @functools.cached_property
    def retries(self) -> RetryLog:
        """What had to be tried again so far."""
        return RetryLog()

    def can(self, capability: Capability) -> bool:
        """Whether this store has the capability. May ask the server, once. Raises Transient, Denied."""
        return False

    @abc.abstractmethod
    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        """Store the concatenation of `buffers` (no copy is made of them where the back end can avoid it).

        Raises:
            AlreadyExists: `if_absent` and the object is there; it stays as it was. A store without CONDITIONAL_PUTS
                may miss a race, which is why callers read back what must be theirs.
            Transient, Denied: see `storage.errors`.
        """

    def put_from(self, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
        """Like `put`, of content that may be larger than memory.

        It is fetched in parts of some MiB on the pool's threads, every byte at least once before the object is there.
        What `fetch` raises ends the put, and comes out. By default the content is fetched as one part and put.
        """
        return self.put(key, fetch(0, size_bytes))

    @abc.abstractmethod
    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        """Fill `buffers`, one after the other, with the object's bytes from `offset` on.

        The buffers are writable, C-contiguous, of format `B`. One call is one request on a remote store.

        Returns:
            The etag of the very version that the bytes are from; "" where the store does not say it with them.

        Raises:
            NotFound: no such object.
            Corrupt: the object ends before the buffers are full, or its etag is not `if_match`.
        """

    @abc.abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object; meant for small ones.

        Raises:
            NotFound: no such object.
            Corrupt: it is larger than READ_SIZE_BYTES_MAX.
        """

    @abc.abstractmethod
    def info(self, key: str) -> ObjectInfo:
        """Size and etag of one object. Raises NotFound."""

    @abc.abstractmethod
    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        """All objects whose key starts with `prefix`, sorted by key; empty if there are none."""

    @abc.abstractmethod
    def folders(self, prefix: str) -> Sequence[str]:
        """Names (one part, no slash) of the folders right under `prefix`, sorted. `prefix` is "" or ends in `/`."""

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; removing what is not there is not an error."""

    def delete_version(self, key: str, etag: str) -> bool:
        """Remove the object if its etag is that; False if another version is there, which stays.

        Only for a store with CONDITIONAL_DELETES. Two that delete like this see each other's deletes; a plain `delete`
        may come in between.
        """
        raise NotImplementedError(f"{self.url} cannot delete one version of an object and spare another")

    def uploads(self) -> Sequence[Upload]:
        """All uploads in parts that were begun below the store's root and not ended. Raises Transient, Denied.

        By default there are none: an object is put in one request.
        """
        return []

    def abort(self, upload: Upload) -> None:
        """Give an upload up and free its parts. Raises NotFound if it has ended meanwhile."""
        raise NotFound(f"{self.url} has no upload of {upload.key}")

    def impatient(self, timeout_s: float) -> ObjectStore:
        """The same objects, for small requests that must not wait.

        None of them waits for a place among this store's, none is tried more than twice, and where the back end can set
        it, a try has stalled after `timeout_s` without a byte. It is closed with this store. By default it is this
        store: requests that go nowhere remote do not wait.
        """
        return self

    def bite_bytes(self, key: str) -> int | None:
        """How much of the object is best read at once, to be verified while the processor's cache still has it.

        By default (None) as much as there is to read: each read is a request.
        """
        return None

    def num_readers(self, key: str) -> int | None:
        """How many threads read best of the object at once, where that is known: of memory, no more than are free.

        By default (None) as many as there are: each waits for an answer most of its time.
        """
        return None

    def doubt(self, key: str, reason: str) -> bool:
        """What this thread has just read of the object turned out to be damaged: whether there is another copy to read.

        The one that it came from is not read again. By default there is one copy of each object.
        """
        return False

    def close(self) -> None:  # noqa: B027 - most stores hold nothing open
        """Let go of threads and connections. Closing twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def parts_of_size(size_bytes: int, part_bytes: int = PART_SIZE_BYTES) -> list[tuple[int, int]]:
    """Offset and size of each part of an object; all but the last are equal. Pure."""
    return [(offset, min(part_bytes, size_bytes - offset)) for offset in range(0, size_bytes, part_bytes)]


def check_read_size(what: str, size_bytes: int) -> None:
    """Raise Corrupt unless an object of that size is read as a whole."""
    if size_bytes > READ_SIZE_BYTES_MAX:
        raise Corrupt(f"{what} has {size_bytes} bytes; what is read as a whole has {READ_SIZE_BYTES_MAX} at most")


def exists(store: ObjectStore, key: str) -> bool:
    """Whether the object is there."""
    try:
        store.info(key)
    except NotFound:
        return False
    return True


def read_if_there(store: ObjectStore, key: str) -> bytes | None:
    """Read the whole object; None if it is not there."""
    try:
        return store.read(key)
    except NotFound:
        return None
