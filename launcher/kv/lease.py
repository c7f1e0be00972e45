"""A lease as one object with one `lost` signal, whichever back end grants it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from launcher.errors import KVUnavailable, StoreHostSilent

log = logging.getLogger(__name__)

_RETRY_S = 0.2


@dataclass(frozen=True)
class StoreSilence:
    """Renewals are not answered since `since_s` (monotonic). `stands`: the store is known to end no lease meanwhile."""

    since_s: float
    reason: str
    stands: bool
    host: str = ""
    """Id of the node that hosts the store, where one does."""
    refused: bool = False
    """Whether it refuses connections: its process is gone, and the store with it."""


class Lease:
    """Keeps itself alive from its own thread, over `renew`, some times per `ttl_s`, from `start` to `stop` or `revoke`.

    `lost` is set once the store says that the lease is gone, or once nothing has shown for `ttl_s` that it stands: from
    then on the keys under it may have been deleted.
    """

    renewals_per_ttl: float = 4

    def __init__(
        self,
        lease_id: int,
        ttl_s: float,
        *,
        granted_s: float,
        renew: Callable[[], bool],
        revoke: Callable[[], None],
        close: Callable[[], None] = lambda: None,
        stands: Callable[[], bool] | None = None,
    ) -> None:
        """`granted_s`: monotonic time just before the grant was asked for.

        `renew` returns False if the store no longer knows the lease and raises `KVUnavailable` where there is no
        answer; `close` frees what the two use. `stands` is asked where there was no answer: whether the store is known
        to end no lease before a TTL from now. It must answer within a fraction of the TTL.
        """
        self.lease_id = lease_id
        self.ttl_s = ttl_s
        self.lost = threading.Event()
        self._granted_s = granted_s
        self._deadline_s = granted_s + ttl_s
        self._renew = renew
        self._revoke = revoke
        self._close = close
        self._stands = stands
        self.silence: StoreSilence | None = None
        """While renewals are not answered: since when, and how."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name=f"lease-{lease_id}", daemon=True)

    def start(self) -> Self:
        """Keep the lease alive from now on."""
        self._thread.start()
        return self

    @property
    def deadline_s(self) -> float:
        """Monotonic time until which the lease surely stands: the last answered renewal's sending, plus the TTL; or
        that of the last proof that the store ends none.

        The store counts from when the renewal arrived, which is later; so whoever stops at this time stops before
        anybody else can see the lease end (Gray and Cheriton, "Leases", 1989).
        """
        return self._deadline_s

    def count_from(self, granted_s: float) -> None:
        """It was granted only now, no earlier than this: it stands for a TTL from then on."""
        self._deadline_s = max(self._deadline_s, granted_s + self.ttl_s)

    def _keep_alive(self) -> None:
        period_s = self.ttl_s / self.renewals_per_ttl
        period_s = max(0.0, period_s - (time.monotonic() - self._granted_s))  # the grant may have been long on its way
        while not self._stopped.wait(period_s):
            sent_s = time.monotonic()
            try:
                alive = self._renew()
            except Exception as error:  # noqa: BLE001 (a thread that ends here would leave a lease nobody knows lost)
                alive = self._unanswered(sent_s, error)
                period_s = max(0.0, min(self.ttl_s / self.renewals_per_ttl, _RETRY_S) - (time.monotonic() - sent_s))
            else:
                if alive:
                    self._deadline_s = max(self._deadline_s, sent_s + self.ttl_s)
                    self.silence = None
                period_s = self.ttl_s / self.renewals_per_ttl
            if not alive:
                if not self._stopped.is_set():
                    self.lost.set()
                break
        self._close()

    def _unanswered(self, sent_s: float, error: Exception) -> bool:
        """Note that a renewal was not answered. Returns whether the lease may still stand."""
        asked_s = time.monotonic()
        try:
            stands = self._stands is not None and self._stands()
        except Exception:  # as above
            log.exception("lease %x: not known whether it stands", self.lease_id)
            stands = False
        if stands and time.monotonic() < self._deadline_s:  # later, it may have ended before the store was asked
            self._deadline_s = asked_s + self.ttl_s
        before = self.silence
        host, refused = (error.node_id, error.refused) if isinstance(error, StoreHostSilent) else ("", False)
        if before is None or before.stands != stands:
            how = "but the store ends no lease now" if stands else "it may end"
            log.warning("lease %x not renewed, %s: %s", self.lease_id, how, error)
        if before is None or (before.stands, before.host, before.refused) != (stands, host, refused):
            since_s = before.since_s if before else sent_s
            self.silence = StoreSilence(since_s, str(error), stands, host, refused)
        return time.monotonic() < self._deadline_s

    def stop(self) -> None:
        """Stop renewing and let the lease end by itself."""
        self._stopped.set()

    def revoke(self) -> None:
        """End the lease now, with every key under it. An unreachable store ends it later by itself."""
        self._stopped.set()
        try:
            self._revoke()
        except KVUnavailable as error:
            log.warning("lease %x not revoked, it ends in %.1f s: %s", self.lease_id, self.ttl_s, error)
