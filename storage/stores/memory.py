"""`memory://name`: a store that lives as long as the process; every opener of one name shares it."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor

from storage.errors import AlreadyExists, Corrupt, NotFound
from storage.parallel import run_all
from storage.stores.buffers import Buffer, fill, size_of
from storage.stores.keys import check_key, check_prefix
from storage.stores.objects import Capability, Fetch, ObjectInfo, ObjectStore, check_read_size, parts_of_size

_CAPABILITIES = {Capability.CONDITIONAL_PUTS, Capability.CONDITIONAL_DELETES, Capability.GUARDED_READS}

_instances: dict[str, MemoryStore] = {}
_instances_lock = threading.Lock()


class MemoryStore(ObjectStore):
    """The in-memory twin of the other back ends: same contract, for tests and simulations."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, str]] = {}
        self._written: dict[str, float] = {}
        self._versions = itertools.count(1)

    @classmethod
    def named(cls, name: str) -> MemoryStore:
        """The process's one store of that name."""
        with _instances_lock:
            return _instances.setdefault(name, cls(name))

    @property
    def url(self) -> str:
        """`memory://name`."""
        return f"memory://{self._name}"

    def can(self, capability: Capability) -> bool:
        """See `ObjectStore.can`."""
        return capability in _CAPABILITIES

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        """See `ObjectStore.put`."""
        check_key(key)
        data = b"".join(buffers)
        with self._lock:
            if if_absent and key in self._objects:
                raise AlreadyExists(f"{key} exists in {self.url}")
            etag = f"v{next(self._versions)}"
            self._objects[key] = (data, etag)
            self._written[key] = time.time()
        return ObjectInfo(key, len(data), etag)

    def put_from(self, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
        """See `ObjectStore.put_from`."""
        parts = run_all(pool, [functools.partial(fetch, *part) for part in parts_of_size(size_bytes)])
        return self.put(key, list(itertools.chain.from_iterable(parts)))

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        """See `ObjectStore.read_into`."""
        data, etag = self._get(key)
        if if_match is not None and etag != if_match:
            raise Corrupt(f"{key} in {self.url} changed while it was read")
        end = offset + size_of(buffers)
        if end > len(data):
            raise Corrupt(f"{key} in {self.url} ends at {len(data)}, wanted bytes up to {end}")
        fill(buffers, memoryview(data)[offset:end])
        return etag

    def read(self, key: str) -> bytes:
        """See `ObjectStore.read`."""
        data, _ = self._get(key)
        check_read_size(f"{key} in {self.url}", len(data))
        return data

    def info(self, key: str) -> ObjectInfo:
        """See `ObjectStore.info`."""
        data, etag = self._get(key)
        return ObjectInfo(key, len(data), etag)

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        """See `ObjectStore.list`."""
        check_prefix(prefix)
        with self._lock:
            found = [(key, value) for key, value in self._objects.items() if key.startswith(prefix)]
        return [ObjectInfo(key, len(data), etag, self._written[key]) for key, (data, etag) in sorted(found)]

    def folders(self, prefix: str) -> Sequence[str]:
        """See `ObjectStore.folders`."""
        check_prefix(prefix)
        with self._lock:
            rest = [key[len(prefix) :] for key in self._objects if key.startswith(prefix)]
        return sorted({name.split("/", 1)[0] for name in rest if "/" in name})

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        check_key(key)
        with self._lock:
            self._objects.pop(key, None)

    def delete_version(self, key: str, etag: str) -> bool:
        """See `ObjectStore.delete_version`."""
        check_key(key)
        with self._lock:
            if key in self._objects and self._objects[key][1] != etag:
                return False
            self._objects.pop(key, None)
            return True

    def _get(self, key: str) -> tuple[bytes, str]:
        check_key(key)
        with self._lock:
            try:
                return self._objects[key]
            except KeyError:
                raise NotFound(f"{key} is not in {self.url}") from None
