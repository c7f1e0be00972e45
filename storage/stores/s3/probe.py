"""What a server honours, asked of the server: vendors differ, and the same vendor differs between versions."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterator, Sequence
from typing import Protocol

from storage.errors import AlreadyExists, Denied
from storage.stores.buffers import Buffer
from storage.stores.keys import PROBE_PREFIX
from storage.stores.objects import ObjectInfo

log = logging.getLogger(__name__)


class Probed(Protocol):
    """What the probe needs of a store."""

    @property
    def url(self) -> str: ...

    def put_object(self, key: str, buffers: Sequence[Buffer], *, with_condition: bool) -> ObjectInfo: ...

    def delete(self, key: str) -> None: ...

    def delete_version(self, key: str, etag: str) -> bool: ...


@contextlib.contextmanager
def _probe_object(store: Probed) -> Iterator[str]:
    """Put an object of the probe's own and yield its key; it is removed at the end."""
    key = f"{PROBE_PREFIX}{uuid.uuid4().hex}"
    store.put_object(key, [b"probe"], with_condition=False)
    try:
        yield key
    finally:
        store.delete(key)


def honours_conditions(store: Probed) -> bool:
    """Whether a second put with `If-None-Match: *` is refused. Puts an object of its own and removes it.

    Raises Transient, and Denied where nothing can be put at all.
    """
    with _probe_object(store) as key:
        try:
            store.put_object(key, [b"probe"], with_condition=True)
        except AlreadyExists:
            return True
        except Denied as error:
            found = f"refuses conditional puts ({error})"
        else:
            found = "ignores the condition of puts"
    log.warning("%s %s; races for one name are found by reading back", store.url, found)
    return False


def honours_conditional_deletes(store: Probed) -> bool:
    """Whether a delete with the `If-Match` of another version is refused. Puts an object of its own and removes it.

    Raises Transient, and Denied where nothing can be put at all.
    """
    with _probe_object(store) as key:
        try:
            if not store.delete_version(key, "0" * 32):
                return True
        except Denied as error:
            found = f"refuses conditional deletes ({error})"
        else:
            found = "ignores the condition of deletes"
    log.info("%s %s", store.url, found)
    return False
