"""One task at a time, and a pause after one that was not answered."""

from __future__ import annotations

import math
from typing import TypeVar

from launcher.node.effects import Task

RETRY_S = 0.2

T = TypeVar("T", bound=Task)


class Asking:
    """What one part of the engine is waiting for."""

    def __init__(self) -> None:
        self._open: Task | None = None
        self._paused_until_s = -math.inf

    def is_free(self, now_s: float) -> bool:
        """Whether the next task may be asked for."""
        return self._open is None and now_s >= self._paused_until_s

    def is_open(self, task: Task) -> bool:
        """Whether this is the task that is waited for."""
        return self._open is task

    def ask(self, task: T) -> T:
        """The task, which is now waited for."""
        self._open = task
        return task

    def close(self, now_s: float, *, pause_s: float = 0.0) -> None:
        """The task was answered, or will not be."""
        self._open = None
        self._paused_until_s = now_s + pause_s

    def resume(self) -> None:
        """What was paused for is no more."""
        self._paused_until_s = -math.inf

    @property
    def due_s(self) -> float:
        """When time alone makes the next task possible; infinity while an answer is waited for."""
        return math.inf if self._open else self._paused_until_s
