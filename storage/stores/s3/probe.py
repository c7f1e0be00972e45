"""What a server honours, asked of the server: vendors differ, and the same vendor differs between versions."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from typing import Protocol

from storage.errors import AlreadyExists, Denied
from storage.stores.buffers import Buffer
from storage.stores.objects import PROBE_PREFIX, ObjectInfo

log = logging.getLogger(__name__)


class Probed(Protocol):
    """What the probe needs of a store."""

    @property
    def url(self) -> str: ...

    def put_object(self, key: str, buffers: Sequence[Buffer], *, with_condition: bool) -> ObjectInfo: ...

    def delete(self, key: str) -> None: ...

    def delete_version(self, key: str, etag: str) -> bool: ...


def honours_conditions(store: Probed) -> bool:
    """Whether a second put with `If-None-Match: *` is refused. Puts an object of its own and removes it.

    Raises Transient, and Denied where nothing can be put at all.
    """
    key = f"{PROBE_PREFIX}{uuid.uuid4().hex}"
    store.put_object(key, [b"probe"], with_condition=False)
    try:
        store.put_object(key, [b"probe"], with_condition=True)
    except AlreadyExists:
        return True
    except Denied as error:
        log.warning("%s refuses conditional puts (%s); races for one name are found by reading back", store.url, error)
        return False
    finally:
        store.delete(key)
    log.warning("%s ignores the condition of puts; races for one name are found by reading back", store.url)
    return False


def honours_conditional_deletes(store: Probed) -> bool:
    """Whether a delete with the `If-Match` of another version is refused. Puts an object of its own and removes it.

    Raises Transient, and Denied where nothing can be put at all.
    """
    key = f"{PROBE_PREFIX}{uuid.uuid4().hex}"
    store.put_object(key, [b"probe"], with_condition=False)
    try:
        if not store.delete_version(key, "0" * 32):
            return True
    except Denied as error:
        log.info("%s refuses conditional deletes: %s", store.url, error)
        return False
    finally:
        store.delete(key)
    log.info("%s ignores the condition of deletes", store.url)
    return False
