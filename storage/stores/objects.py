"""The object store contract: bytes with names, and nothing more.

Keys are relative to the store's root, with `/` between parts; they never leave the root. Implementations are
thread-safe: any method may run in any number of threads at once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol, TypeGuard, TypeVar, runtime_checkable

from storage.errors import Cause, Corrupt, Denied, NotFound
from storage.stores.retry_policy import RetryLog

log = logging.getLogger(__name__)

T = TypeVar("T")

Buffer = bytes | bytearray | memoryview

Fetch = Callable[[int, int], Sequence[memoryview]]
"""From an offset and a number of bytes to those bytes of some content, in pieces. Asked by any thread, in any order."""

PART_SIZE_BYTES = 16 * 1024 * 1024
"""Of what is streamed where the store does not want another size."""

READ_SIZE_BYTES_MAX = 256 * 1024 * 1024
"""The largest object that is read as a whole, an index: a larger one is something else, by mistake or on purpose."""

PROBE_PREFIX = ".probe-"
"""Of names that a back end may put for a moment below its root, to find out what the server honours."""

_PROBE = re.compile(r"\.probe-[0-9a-f]{32}")
_BAD_PART = re.compile(r"^$|^\.\.?$|[\x00-\x1f\x7f\\]")


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
    """An upload in parts that was begun and not ended. Its parts cost space, and no listing of objects shows them."""

    key: str
    id: str
    started_unix_s: float


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a back end can promise beyond the contract's least.

    `conditional_puts`: of two puts with `if_absent` at once, the server lets only one through. Without, a put looks
    first, and a race can be missed.
    `guarded_reads`: `if_match` is checked by the server in the same request that reads. Without, it is compared before.
    """

    conditional_puts: bool
    guarded_reads: bool


class ObjectStore(Protocol):
    """Where checkpoints live.

    Atomicity: an object appears whole or not at all, and a reader never sees half of a rewrite. Durability: when
    `put` returns, the object survives the death of this process (and, on a local disk, of the host).
    """

    @property
    def url(self) -> str:
        """The URL that `open_store` would open this store by."""

    @property
    def capabilities(self) -> Capabilities:
        """What this store's server honours. May ask it, once. Raises Transient, Denied."""

    @property
    def retries(self) -> RetryLog:
        """What had to be tried again so far."""

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        """Store the concatenation of `buffers` (no copy is made of them where the back end can avoid it).

        Raises:
            AlreadyExists: `if_absent` and the object is there; it stays as it was. A back end whose server does
                not honour conditions may miss a race, which is why callers read back what must be theirs.
            Transient, Denied: see `storage.errors`.
        """

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        """Fill `buffers`, one after the other, with the object's bytes from `offset` on.

        The buffers are writable, C-contiguous, of format `B`. One call is one request on a remote store.

        Returns:
            The etag of the very version that the bytes are from; "" where the store does not say it with them.

        Raises:
            NotFound: no such object.
            Corrupt: the object ends before the buffers are full, or its etag is not `if_match`.
        """

    def read(self, key: str) -> bytes:
        """The whole object; meant for small ones.

        Raises:
            NotFound: no such object.
            Corrupt: it is larger than READ_SIZE_BYTES_MAX.
        """

    def info(self, key: str) -> ObjectInfo:
        """Size and etag of one object. Raises NotFound."""

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        """All objects whose key starts with `prefix`, sorted by key; empty if there are none."""

    def folders(self, prefix: str) -> Sequence[str]:
        """Names (one part, no slash) of the folders right under `prefix`, sorted. `prefix` is "" or ends in `/`."""

    def delete(self, key: str) -> None:
        """Remove the object; removing what is not there is not an error."""


@runtime_checkable
class MultipartStore(Protocol):
    """A store whose uploads in parts can be left behind."""

    def uploads(self) -> Sequence[Upload]:
        """All that were begun below the store's root and not ended. Raises Transient, Denied."""

    def abort(self, upload: Upload) -> None:
        """Give one up and free its parts. Raises NotFound if it has ended meanwhile."""


@runtime_checkable
class ConditionalStore(Protocol):
    """A store that can remove one version of an object, and spare any other."""

    def deletes_conditionally(self) -> bool:
        """Whether it really can. May ask the server, once. Raises Transient, Denied."""

    def delete_version(self, key: str, etag: str) -> bool:
        """Remove the object if its etag is that; False if another version is there, which stays.

        Only for where `deletes_conditionally`. Two that delete like this see each other's deletes; a plain `delete`
        may come in between.
        """


@runtime_checkable
class StreamingStore(Protocol):
    """A store that takes an object which is larger than memory."""

    def put_from(self, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
        """Like `put`, of content that is fetched in parts of some MiB, and those on the pool's threads.

        Every byte is fetched at least once before the object is there. What `fetch` raises ends the put, and comes out.
        """


def put_fetched(store: ObjectStore, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
    """`StreamingStore.put_from`, or else a `put` of all at once."""
    if isinstance(store, StreamingStore):
        return store.put_from(key, size_bytes, fetch, pool)
    return store.put(key, fetch(0, size_bytes))


def parts_of_size(size_bytes: int, part_bytes: int = PART_SIZE_BYTES) -> list[tuple[int, int]]:
    """Offset and size of each part of an object; all but the last are equal. Pure."""
    return [(offset, min(part_bytes, size_bytes - offset)) for offset in range(0, size_bytes, part_bytes)]


@runtime_checkable
class ImpatientStore(Protocol):
    """A remote store, whose requests wait for each other and for an answer."""

    def impatient(self, timeout_s: float) -> ObjectStore:
        """The same objects, for small requests that must not wait.

        None of them waits for a place among this store's, none is tried more than twice, and where the back end can set
        it, a try has stalled after `timeout_s` without a byte.
        """


@runtime_checkable
class HostCached(Protocol):
    """A store whose bytes, once a process has read them, the host keeps for its other processes: a folder."""

    @property
    def is_host_cached(self) -> bool:
        """Whether it does."""


def read_checked(store: ObjectStore, key: str, load: Callable[[bytes], T]) -> T:
    """What `load` makes of a small object. Damage counts when it is read twice: the way to here may have flipped a bit.

    Raises NotFound, and what `load` raises.
    """
    try:
        return load(store.read(key))
    except Corrupt as error:
        found = load(store.read(key))
        store.retries.add(Cause.DAMAGED, 0.0)
        log.warning("read again, %s is whole; the first time: %s", key, error)
        return found


def check_read_size(what: str, size_bytes: int) -> None:
    """Raise Corrupt unless an object of that size is read as a whole."""
    if size_bytes > READ_SIZE_BYTES_MAX:
        raise Corrupt(f"{what} has {size_bytes} bytes; what is read as a whole has {READ_SIZE_BYTES_MAX} at most")


def is_probe_name(name: str) -> bool:
    """Whether a back end's probe would have put `name`."""
    return _PROBE.fullmatch(name) is not None


def exists(store: ObjectStore, key: str) -> bool:
    """Whether the object is there."""
    try:
        store.info(key)
    except NotFound:
        return False
    return True


def read_if_there(store: ObjectStore, key: str) -> bytes | None:
    """The whole object, or None."""
    try:
        return store.read(key)
    except NotFound:
        return None


def can_delete_version(store: ObjectStore) -> TypeGuard[ConditionalStore]:
    """Whether the store can remove one version of an object and no other."""
    return isinstance(store, ConditionalStore) and store.deletes_conditionally()


def check_key(key: str) -> str:
    """Return `key` if it is a relative name that stays under the root, else raise Denied."""
    if any(_BAD_PART.search(part) for part in key.split("/")):
        raise Denied(f"refused object name {key!r}: it must be relative, without empty, '.' or '..' parts")
    return key


def check_prefix(prefix: str) -> str:
    """Like `check_key` for the start of a key: the last part may be empty or unfinished."""
    head, _, tail = prefix.rpartition("/")
    if head:
        check_key(head)
    if prefix.startswith("/") or tail == "..":
        raise Denied(f"refused prefix {prefix!r}: it must be relative")
    return prefix
