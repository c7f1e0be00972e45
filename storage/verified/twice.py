"""Damage counts when it is read twice: the way from the store may have flipped a bit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TypeVar

from storage.errors import Cause, Corrupt
from storage.stores.objects import ObjectStore, read_if_there

log = logging.getLogger(__name__)

T = TypeVar("T")


def read_verified(store: ObjectStore, name: str, read: Callable[[], T], again: Callable[[], T] | None = None) -> T:
    """What `read` returns, which reads from the store and raises Corrupt where that is not what was written.

    Then it is read once more, by `again` where that has to go another way. If it is whole now, a retry is counted in
    the store's log and told under `name`, which is the object's key where it is one object. Of a store that has other
    copies of it (`ObjectStore.doubt`) the next one is read, until none is left but the last, which is read twice.

    Raises:
        Corrupt: it is damaged the second time, too.
        Whatever else `read` and `again` raise.
    """
    read_again = again or read
    try:
        return read()
    except Corrupt as error:
        first = error
    while store.doubt(name, str(first)):
        with contextlib.suppress(Corrupt):
            return read_again()
    found = read_again()
    store.retries.add(Cause.DAMAGED, 0.0)
    log.warning("read again, %s is whole; the first time: %s", name, first)
    return found


def read_document(store: ObjectStore, key: str, load: Callable[[bytes], T]) -> T:
    """What `load` makes of a small object, as `read_verified` reads it. Raises NotFound, and what `load` raises."""
    return read_verified(store, key, lambda: load(store.read(key)))


def read_expected(store: ObjectStore, key: str, expected: bytes) -> bytes | None:
    """The whole object, or None where there is none; what is not `expected` was read twice."""
    found: bytes | None = None

    def read() -> None:
        nonlocal found
        found = read_if_there(store, key)
        if found != expected:
            raise Corrupt(f"{key} is not what it was expected to be")

    with contextlib.suppress(Corrupt):
        read_verified(store, key, read)
    return found


def read_agreed(store: ObjectStore, key: str) -> bytes:
    """The whole object, of which no checksum is known: what two of at most three answers agree on.

    Raises NotFound, and Corrupt where no two agree.
    """
    answers = [store.read(key)]

    def read() -> bytes:
        answers.append(store.read(key))
        if answers[-1] not in answers[:-1]:
            raise Corrupt(f"{key} is read differently each time")
        return answers[-1]

    return read_verified(store, key, read)
