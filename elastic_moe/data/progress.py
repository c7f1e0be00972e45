"""A line on the log every few seconds while data is read."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from launcher import worker

log = logging.getLogger(__name__)

_EVERY_S = 5.0
_MIB = 1 << 20


class ReadProgress:
    """Bytes of the sources of a corpus that this process has read, of those that were not in the cache."""

    def __init__(self, what: str, total_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._total_bytes = total_bytes
        self._clock = clock
        self._began_s = self._told_s = clock()
        self._done_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count bytes, and tell of them now and then; the agent hears that this process is at work."""
        worker.alive()
        self._done_bytes += num_bytes
        now_s = self._clock()
        if now_s - self._told_s >= _EVERY_S:
            self._told_s = now_s
            self._tell(now_s)

    def close(self) -> None:
        """Tell what was read, if anything was."""
        if self._done_bytes:
            self._tell(self._clock())

    def _tell(self, now_s: float) -> None:
        log.info(
            "data: this process has read %.1f of %.1f MiB of %s (%.1f MiB/s)",
            self._done_bytes / _MIB,
            self._total_bytes / _MIB,
            self._what,
            self._done_bytes / _MIB / max(1e-3, now_s - self._began_s),
        )
