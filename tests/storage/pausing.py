"""A store that stops its user between any two calls, and lets somebody else act there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from storage.parallel import run_concurrently
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectInfo, ObjectStore
from storage.stores.wrapper import StoreWrapper

R = TypeVar("R")

ORDERS = ("at once", "forwards", "backwards")
"""Of the requests that a commit sends together, see `abreast`."""


class PausingStore(StoreWrapper):
    """One process's view of `store`: before its call number `pause_at` it calls `meanwhile`, which sees `store` itself.

    `num_calls` counts from the moment of construction; `paused_before` names the call that had to wait.
    """

    def __init__(self, store: MemoryStore, pause_at: int, meanwhile: Callable[[], None]) -> None:
        super().__init__(store)
        self._pause_at = pause_at
        self._meanwhile = meanwhile
        self._lock = threading.Lock()
        self.num_calls = 0
        self.paused_before = ""

    put_from = ObjectStore.put_from  # one put: a call like any other

    def put(self, key: str, buffers: Any, *, if_absent: bool = False) -> ObjectInfo:
        self._pause(f"put {key}")
        return super().put(key, buffers, if_absent=if_absent)

    def read_into(self, key: str, offset: int, buffers: Any, *, if_match: str | None = None) -> str:
        self._pause(f"read_into {key}")
        return super().read_into(key, offset, buffers, if_match=if_match)

    def read(self, key: str) -> bytes:
        self._pause(f"read {key}")
        return super().read(key)

    def info(self, key: str) -> ObjectInfo:
        self._pause(f"info {key}")
        return super().info(key)

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        self._pause(f"list {prefix}")
        return super().list(prefix)

    def folders(self, prefix: str) -> Sequence[str]:
        self._pause(f"folders {prefix}")
        return super().folders(prefix)

    def delete(self, key: str) -> None:
        self._pause(f"delete {key}")
        super().delete(key)

    def delete_version(self, key: str, etag: str) -> bool:
        self._pause(f"delete_version {key}")
        return super().delete_version(key, etag)

    def _pause(self, call: str) -> None:
        with self._lock:  # one call at a time, so that the calls of a run can be counted
            number = self.num_calls
            self.num_calls += 1
            if number == self._pause_at:
                self.paused_before = call
                self._meanwhile()


def abreast(order: str) -> Callable[[Sequence[Callable[[], R]]], list[R]]:
    """What stands in for `run_concurrently`, so that a test knows which of its calls comes before which other.

    "forwards" and "backwards" let them come one after the other: between them each call comes once before each other.
    """
    if order == "at once":
        return run_concurrently

    def in_order(calls: Sequence[Callable[[], R]]) -> list[R]:
        pairs = [(call, Future[R]()) for call in calls]
        for call, outcome in pairs if order == "forwards" else pairs[::-1]:
            try:
                outcome.set_result(call())
            except BaseException as error:
                outcome.set_exception(error)
        return [outcome.result() for _, outcome in pairs]

    return in_order
