"""What takes ranks unequally long before the first step, such as their data: they meet all the while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from launcher import worker

T = TypeVar("T")

_EVERY_S = 10.0
_GRACE_S = 5.0


class _Call(threading.Thread, Generic[T]):
    """A call on a thread of its own, which ends with the process."""

    def __init__(self, call: Callable[[], T]) -> None:
        super().__init__(name="elastic-moe-data", daemon=True)
        self._call = call
        self._error: BaseException | None = None
        self._found: T | None = None

    def run(self) -> None:
        try:
            self._found = self._call()
        except BaseException as error:  # noqa: BLE001 - for whoever asks for the result
            self._error = error

    def result(self) -> T:
        """Once it has ended: what it returned. Raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._found  # type: ignore[return-value]


def meanwhile(call: Callable[[], T]) -> T:
    """Make a call on every rank, and return once all have. A collective.

    It may take hours on one rank and a moment on another (a node whose cache is empty has joined), where a collective
    would give up after half an hour. Those who wait count as alive to their agents as long as the others' calls say
    `worker.alive()`.
    """
    thread = _Call(call)
    thread.start()
    signs, before = -1, -1
    while True:
        thread.join(_EVERY_S)
        is_done = not thread.is_alive()
        if is_done:
            found = thread.result()
        if not is_done or signs < 0:
            signs = worker.num_signs  # those of the call; not those of the waiting, which would keep each other alive
        told = torch.tensor([int(not is_done), signs])
        try:
            dist.all_reduce(told)
        except RuntimeError:  # another rank is gone, maybe for a reason that this one is about to find as well
            thread.join(_GRACE_S)
            if not thread.is_alive():
                thread.result()
            raise
        if not told[0]:
            return found
        if is_done and int(told[1]) != before:
            worker.alive()
        before = int(told[1])
