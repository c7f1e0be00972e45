"""Following the keys under a prefix: list them once, then watch for changes, and list anew where some were missed.

This is done here only: whoever wants to know what is in a store, and what becomes of it, drives a `Follower`.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from launcher.errors import Compacted, KVUnavailable
from launcher.kv.base import KV, Remembers, Snapshot, Watch, WatchEvent
from launcher.lifecycle import Closing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Changes:
    """What was written since the last answer, in the order of the writes; nothing if the time ran out."""

    events: tuple[WatchEvent, ...]


class Follower(Closing):
    """Yields a `Snapshot` of the keys under `prefix`, and then their `Changes`, each exactly once.

    It has no thread: one thread calls `next` again and again. `relist` and `close` may be called from any thread, and
    make a `next` that waits return soon.
    """

    def __init__(self, kv: KV, prefix: str = "") -> None:
        self._kv = kv
        self._prefix = prefix
        self._watch: Watch | None = None  # None: list before watching
        self._closed = False
        self._has_listed = False
        self._lock = threading.Lock()  # of these two fields; never held while the store is asked

    def next(self, timeout_s: float) -> Snapshot | Changes:
        """Wait for news.

        Returns:
            A `Snapshot`, which replaces all that was learnt before: at first, after `relist`, and where changes were
            missed because the store has forgotten them. Else `Changes`, without events after `timeout_s` and once this
            follower is closed.

        Raises:
            KVUnavailable: the store does not answer. No news is lost: the next call goes on from the last one.
            KVError: the store refused; the next call lists anew.
        """
        with self._lock:
            watch = self._watch
            if self._closed:
                return Changes(())
        if watch is None:
            return self._list()
        try:
            return Changes(watch.next(timeout_s))
        except Compacted as error:
            log.warning("%s: listing anew", error)
            self._drop(watch)
            return self._list()
        except KVUnavailable:
            raise
        except BaseException:
            self._drop(watch)
            raise

    def relist(self) -> None:
        """Have the next `next` give a `Snapshot`: the caller does not rely on what it has learnt."""
        with self._lock:
            watch = self._watch
        if watch is not None:
            self._drop(watch)

    def close(self) -> None:
        """Stop following, for good."""
        with self._lock:
            self._closed = True
        self.relist()

    def _list(self) -> Snapshot | Changes:
        kv = self._kv
        # What is listed anew is wanted because what was known is doubted.
        found = kv.known(self._prefix) if isinstance(kv, Remembers) and not self._has_listed else kv.list(self._prefix)
        self._has_listed = True
        watch = self._kv.watch(self._prefix, found.revision + 1)
        with self._lock:
            if not self._closed:
                self._watch = watch
                return found
        watch.cancel()
        return Changes(())

    def _drop(self, watch: Watch) -> None:
        with self._lock:
            if self._watch is watch:
                self._watch = None
        watch.cancel()
