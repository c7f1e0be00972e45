"""Publishes how this node's workers are, for `elastic-moe status`, by a small put now and then that nobody waits for;
on a bucket, where each put of a key is read by all, along with its lease's renewals.

The keys are of their own, so that no node is sent what others publish. All nodes together make at most
`PUTS_PER_S_MAX` puts a second, and each one in `INTERVAL_S_MIN`: of a thousand nodes each publishes every 100 s.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from launcher.errors import KVError
from launcher.kv import KV, Lease
from launcher.kv.aside import tell
from launcher.lifecycle import Lifecycle
from launcher.rounds.vitals import Vitals

log = logging.getLogger(__name__)

INTERVAL_S_MIN = 5.0
PUTS_PER_S_MAX = 10.0
_TICK_S = 1.0


def vitals_prefix(run_id: str) -> str:
    """What goes before a node's id in its key; it is no prefix of the keys that members follow."""
    return f"elastic-moe/vitals:{run_id}/"


def interval_s(num_nodes: int) -> float:
    """How long a node waits between two puts. Pure."""
    return max(INTERVAL_S_MIN, num_nodes / PUTS_PER_S_MAX)


class VitalsPublisher(Lifecycle):
    """Puts what was published last, under the node's lease, on a thread of its own. Any thread may call it."""

    def __init__(self, kv: KV, run_id: str, node_id: str, lease: Callable[[], Lease | None]) -> None:
        self._kv = kv
        self._key = vitals_prefix(run_id) + node_id
        self._lease = lease
        self._latest: Vitals | None = None
        self._interval_s = INTERVAL_S_MIN
        self._due_s = 0.0
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="member-vitals", daemon=True)

    def start(self) -> None:
        """Begin to put what is published."""
        self._thread.start()

    def due(self, now_s: float) -> bool:
        """Whether something new would be put soon; else it need not be gathered. `now_s` is the monotonic clock's."""
        return now_s >= self._due_s

    def publish(self, vitals: Vitals, num_nodes: int) -> None:
        """Have `vitals` put when it is time. Never waits."""
        with self._wake:
            self._latest, self._interval_s = vitals, interval_s(num_nodes)
            self._due_s = time.monotonic() + min(_TICK_S, self._interval_s)
            self._wake.notify()

    def close(self) -> None:
        """Put nothing any more."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        put: tuple[Vitals, Lease] | None = None
        is_told = False
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._latest is not None)
                if self._stopping:
                    return
                vitals, self._latest = self._latest, None
                pause_s = self._interval_s
            lease = self._lease()
            if vitals is None or lease is None or put == (vitals, lease):
                continue
            try:
                tell(self._kv, self._key, vitals.to_json(), lease)
                put, is_told = (vitals, lease), False
            except KVError as error:
                if not is_told:
                    log.info("how this node's workers are cannot be told: %s", error)
                is_told = True
            with self._wake:
                self._wake.wait_for(lambda: self._stopping, timeout=pause_s)
