"""The door of a step: all ranks meet before it is applied, so that survivors of a lost peer share a newest step.

Without it they may be a step apart, some with the last gradients applied and some without, and neither step is held
whole then. With it, by construction, they never are:

- Nobody goes through the door of a step before every rank has come to it. Whoever stands there needs no other rank any
  more: what is left, its `Turn`, changes this process's state alone, and the thread that captures can take it as well.
- A capture shuts the door of its rank: who has not come to it does not come any more, so nobody goes through.

So if any survivor has applied step k, all had come to its door, and each holds the state after k, or applies it when it
is captured. If none has, all hold the state after k - 1, which is captured first.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)

_SHUT_S = 60.0
"""So long a captured process is expected to be ended; then its training may go on."""


class Turn:
    """What is left of a step once all ranks have come to its door: done once, by whoever comes first."""

    def __init__(self, step: int, apply: Callable[[], object]) -> None:
        self.step = step
        self._apply = apply
        self._lock = threading.Lock()
        self._is_taken = False
        self._error: BaseException | None = None
        self.ready: torch.cuda.Event | None = None
        """On CUDA, the moment in the training's stream at which all that it needs is there."""
        if torch.cuda.is_initialized():
            self.ready = torch.cuda.Event()
            self.ready.record()

    def take(self, patience_s: float | None = None) -> bool:
        """Do it, or wait until it is done, for so long if need be; on an error, raise that to each who comes.

        Returns whether it is done: False where another thread is still at it.
        """
        if not self._lock.acquire(timeout=-1 if patience_s is None else max(patience_s, 0.0)):
            return False
        try:
            if self._is_taken:
                if self._error is not None:
                    raise self._error
                return True
            self._is_taken = True
            try:
                self._apply()
            except BaseException as error:
                self._error = error
                raise
            return True
        finally:
            self._lock.release()


class Door:
    """Of one rank. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn: Turn | None = None
        self._is_shut = False

    def come(self, turn: Turn) -> None:
        """The training has come to the door of that step; where a capture has shut it, it waits to be ended."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._is_shut, _SHUT_S):
                log.warning("the state was kept, as for an end, which did not come: the training goes on")
                self._is_shut = False
            self._turn = turn

    def leave(self) -> None:
        """The step was applied, and noted."""
        with self._changed:
            self._turn = None

    def shut(self) -> Turn | None:
        """Let nobody come from here on; the turn of who stands at the door, or has not left it yet."""
        with self._changed:
            self._is_shut = True
            return self._turn

    def open(self) -> None:
        """Let the training come again."""
        with self._changed:
            self._is_shut = False
            self._changed.notify_all()
