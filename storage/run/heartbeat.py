"""The sign of life that the owner of a run writes: an object of its own below the run, `beat-TOKEN`, every 5 s.

Whoever finds a run claimed by another job watches it, see `storage.run.in_use`. A job that closes while its last save
goes on says so in it. Nothing that is committed relies on it.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from typing import Self

from storage.errors import StorageError
from storage.events import CheckpointEvent, Reporter
from storage.format import layout
from storage.run import owner
from storage.run.owner import Owner
from storage.stores.objects import ObjectStore

log = logging.getLogger(__name__)

INTERVAL_S = 5.0
TIMEOUT_S = 5.0
"""A request for a heartbeat that has not moved a byte for so long has stalled."""
_RETRY_INTERVAL_S = 1.0  # while the store is away, so that its return is soon known
_CLOSE_S = 15.0
CLOSING = b" closing\n"
"""How the heartbeat of a job ends that is closing."""


def write(store: ObjectStore, token: str, count: int, *, is_closing: bool = False) -> None:
    """Tell others that the process which claims by `token` is alive, and whether it will soon let the run go."""
    store.put(layout.heartbeat_name(token), [b"%d" % count + (CLOSING if is_closing else b"\n")])


def renew(store: ObjectStore, mine: Owner, count: int, *, is_closing: bool = False) -> Owner | None:
    """Write the heartbeat of the claim `mine`, unless that was superseded. Returns the claim that holds now, or None.

    Raises Transient, Denied, Corrupt.
    """
    recorded = owner.read_owner(store)
    if recorded is not None and (recorded.token == mine.token or owner.is_late(recorded, mine)):
        write(store, mine.token, count, is_closing=is_closing)
        return mine
    return recorded


class Heartbeat:
    """Writes the heartbeat of a claim from `start` to `close`, on a thread of its own.

    The thread ends if the claim is superseded, and reports that; it keeps neither `report` nor, by it, the listener
    alive. A process that ends without `close`, but not by a signal, lets the run go all the same.

    Args:
        previous_token: of the claim that `mine` has replaced, whose heartbeat is removed.
    """

    def __init__(
        self,
        store: ObjectStore,
        mine: Owner,
        previous_token: str | None,
        report: Reporter,
        interval_s: float = INTERVAL_S,
    ) -> None:
        # heartbeats must not wait behind the parts of a checkpoint, nor for long
        self._store = store.impatient(TIMEOUT_S)
        self._mine = mine
        self._previous_token = previous_token
        self._interval_s = interval_s
        self._report = weakref.ref(report)
        self._fenced: str | None = None
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Start the thread, which first removes the heartbeat of the claim that this one replaces."""
        self._thread = threading.Thread(target=self._run, name="storage-heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def fenced(self) -> str | None:
        """Why this process can never commit again, once the thread has found out; else None."""
        return self._fenced

    def announce_end(self) -> None:
        """Tell whoever waits for the run that this job will soon let it go."""
        self._is_closing = True
        self._wake.set()

    def stop(self) -> None:
        """Ask the thread to let the run go and end, without waiting: the garbage collector may call this anywhere."""
        self._stop.set()
        self._wake.set()

    def close(self) -> None:
        """Let the run go. Waits no longer than 15 s for it: a store that is away must not keep a job from ending."""
        atexit.unregister(self.close)
        self.stop()
        if self._thread is None:
            return
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("%s: the store does not answer, so another job will have to wait for it", self._store.url)

    def _run(self) -> None:
        if self._previous_token is not None:
            self._remove(self._previous_token)
        count, is_told = 0, False
        while True:
            self._wake.wait(min(self._interval_s, _RETRY_INTERVAL_S) if is_told else self._interval_s)
            self._wake.clear()
            if self._stop.is_set():
                break
            count += 1
            try:
                recorded = renew(self._store, self._mine, count, is_closing=self._is_closing)
                if recorded is not self._mine:
                    self._lose(recorded)
                    break
                is_told = False
            except StorageError as error:
                if not is_told:
                    log.warning("other jobs cannot be told that this one works on %s: %s", self._store.url, error)
                is_told = True
        self._remove(self._mine.token)

    def _lose(self, recorded: Owner | None) -> None:
        self._fenced = str(owner.fenced(recorded, self._mine))
        if (report := self._report()) is not None:
            by = "nobody" if recorded is None else recorded.who
            report(CheckpointEvent.FENCED, url=self._store.url, by=by, reason=self._fenced)

    def _remove(self, token: str) -> None:
        try:
            self._store.delete(layout.heartbeat_name(token))
        except StorageError as error:
            log.warning("a heartbeat is left behind in %s: %s", self._store.url, error)
