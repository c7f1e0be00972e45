"""What will be there in a moment, and who waits for it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable


class OnTheWay:
    """Counts what has begun and not ended. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._under_way: set[int] = set()

    def begin(self) -> Callable[[], None]:
        """Something has begun; to be called when it has ended."""
        with self._changed:
            number = next(self._numbers)
            self._under_way.add(number)

        def end() -> None:
            with self._changed:
                self._under_way.discard(number)
                self._changed.notify_all()

        return end

    def wait(self, timeout_s: float) -> bool:
        """Wait for all that had begun by now; whether that came in time."""
        with self._changed:
            begun = set(self._under_way)
            return self._changed.wait_for(lambda: not begun & self._under_way, timeout_s)
