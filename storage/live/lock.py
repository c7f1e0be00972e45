"""Tells after which step the state stands still: hooks of all optimizers say when it begins to change."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, Self, TypeVar
from weakref import WeakSet

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

T = TypeVar("T")


class StepLock(Generic[T]):
    """Keeps the note of the last complete step as long as the state is the one that was noted.

    An optimizer's first `step()` after a note ends that: from there to the next note the state is a mixture of two
    steps. A gradient scaler that skips a step calls no optimizer, so the note stays; of several optimizers the first
    one that begins counts, and the note comes when all are through. Who captures holds the state still: an optimizer
    that is about to begin waits for the end of it.

    Thread-safe. Notes come from the training's thread, captures from others.

    Attributes:
        optimizers: those that have made a step since `start`.
    """

    def __init__(self) -> None:
        self.optimizers: WeakSet[Optimizer] = WeakSet()
        self._changed = threading.Condition()
        self._note: T | None = None
        self._why_not = "no step was noted yet"
        self._is_changing = False  # an optimizer has begun its step, and a note may follow
        self._num_holders = 0
        self._hooks: list[Any] = []

    def start(self) -> Self:
        """Hear of all optimizers of this process from here on."""
        if not self._hooks:
            self._hooks.append(register_optimizer_step_pre_hook(self._before_step))
        return self

    def close(self) -> None:
        """Hear of optimizers no more, and forget the note; harmless where that is done."""
        while self._hooks:
            self._hooks.pop().remove()
        self.clear("the Checkpointer is closed")

    def note(self, note: T) -> None:
        """Every optimizer is through, and what makes up the step is noted."""
        with self._changed:
            self._changed.wait_for(self._is_free)
            self._note, self._is_changing = note, False
            self._changed.notify_all()

    def clear(self, why: str) -> None:
        """The state is about to change otherwise than by an optimizer; `why` is told to who wants to capture it."""
        with self._changed:
            self._changed.wait_for(self._is_free)
            self._note, self._why_not, self._is_changing = None, why, False
            self._changed.notify_all()

    def is_noted(self, is_same: Callable[[T], bool]) -> bool:
        """Whether there is a note, and it is of the step that is asked for."""
        with self._changed:
            return self._note is not None and is_same(self._note)

    @contextlib.contextmanager
    def held(self, timeout_s: float) -> Iterator[T | str]:
        """The note of the state, which stands still for the block; or why there is none.

        A step that is being applied is waited for, for so long: it takes milliseconds, and its note follows.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._note is not None or not self._is_changing, timeout_s)
            note = self._note
            self._num_holders += note is not None
        if note is None:
            yield self._why_not
            return
        try:
            yield note
        finally:
            with self._changed:
                self._num_holders -= 1
                self._changed.notify_all()

    def _before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        with self._changed:
            self._changed.wait_for(self._is_free)
            self.optimizers.add(optimizer)
            self._note, self._why_not = None, "an optimizer's step was applied, and no step noted after it"
            self._is_changing = True

    def _is_free(self) -> bool:
        return self._num_holders == 0
