"""When what the service does behind a training stands still: its job changes workers, or restores, and waits for that.

A restore of a second is what a whole job waits for; an upload or a copy that waits as long is one that nobody does.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

LONGEST_S = 30.0
_LOOK_S = 0.1  # for the end of everything


@dataclass(frozen=True)
class Standstill:
    """From when to when nothing is done. Pure.

    After one, so much time passes before the next that at least half of all time is for what waits: a job that fails
    and starts again for ever has its saves stored all the same.
    """

    began_s: float = -math.inf
    ends_s: float = -math.inf

    def is_on(self, now_s: float) -> bool:
        """Whether it lasts."""
        return now_s < self.ends_s

    def asked(self, now_s: float, seconds: float) -> Standstill:
        """The one that is there when somebody asks for so many seconds: a new one, a longer one, or this one still."""
        if self.is_on(now_s):
            return Standstill(self.began_s, min(max(self.ends_s, now_s + seconds), self.began_s + LONGEST_S))
        if self.ends_s > -math.inf and now_s < self.ends_s + (self.ends_s - self.began_s):
            return self
        return Standstill(now_s, now_s + min(seconds, LONGEST_S))

    def ended(self, now_s: float, after_s: float = 0.0) -> Standstill:
        """Nobody waits any more: it lasts for so long at most."""
        return Standstill(self.began_s, min(self.ends_s, now_s + after_s)) if self.is_on(now_s) else self


class Truce:
    """A `Standstill` that threads wait out. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._now = Standstill()
        self._is_over = False

    @property
    def is_on(self) -> bool:
        """Whether it lasts."""
        with self._changed:
            return not self._is_over and self._now.is_on(self._clock())

    def ask(self, seconds: float) -> None:
        """Have others wait, for at most so long."""
        with self._changed:
            self._now = self._now.asked(self._clock(), seconds)

    def end(self, after_s: float = 0.0) -> None:
        """Let them go on, after so long."""
        with self._changed:
            self._now = self._now.ended(self._clock(), after_s)
            self._changed.notify_all()

    def end_all(self) -> None:
        """There is none any more: what is to be done has to be done in time."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def wait(self, stop: threading.Event, longest_s: float = math.inf) -> bool:
        """Wait until there is none, or for so long; False if it was told to stop meanwhile."""
        with self._changed:
            ends_s = self._clock() + longest_s
            while not self._is_over and not stop.is_set():
                left_s = min(self._now.ends_s, ends_s) - self._clock()
                if left_s <= 0:
                    break
                self._changed.wait(min(left_s, _LOOK_S))
        return not stop.is_set()
