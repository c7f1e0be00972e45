"""A limit on bytes per second, shared by all who ask it."""

from __future__ import annotations

import threading
import time

from storage.held.truce import Truce

_BITE_BYTES = 4 * 1024 * 1024
_SILENT_S = 5.0


class RateLimit:
    """Lets so many bytes through in a second, on average since it was last idle. None: any number. Thread-safe.

    Whoever asks for more at once than one may have is let through first and waits with the next. During a `truce`
    nobody is let through, but as often as keeps the other side from taking the connection for dead.
    """

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self.truce = Truce()
        self._free_s = 0.0

    @property
    def bite_bytes(self) -> int:
        """How much to ask for at once, so that nobody is silent for longer than a second."""
        return _BITE_BYTES if self._bytes_per_s is None else max(1, min(_BITE_BYTES, int(self._bytes_per_s)))

    def pause_s(self, num_bytes: int, now_s: float) -> float:
        """How long to wait before that many bytes, which then count as sent."""
        if self._bytes_per_s is None:
            return 0.0
        with self._lock:
            begin_s = max(self._free_s, now_s)
            self._free_s = begin_s + num_bytes / self._bytes_per_s
        return begin_s - now_s

    def wait(self, num_bytes: int, stop: threading.Event) -> bool:
        """Wait until that many bytes may go; False if it was told to stop meanwhile."""
        return self.truce.wait(stop, _SILENT_S) and not stop.wait(self.pause_s(num_bytes, time.monotonic()))
