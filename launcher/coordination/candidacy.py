"""Standing for the lead: one node's claim to the key `job/leader`, and its term while it holds it.

The key lies under the node's lease, so a leader that is lost makes room by itself; one that goes says so in the key
first, and its successor need not wait for what it may have left undone.
"""

from __future__ import annotations

import logging
import threading

from launcher.coordination.keeper import RecordKeeper
from launcher.coordination.leading import Leadership, Office
from launcher.coordination.roster import LEADER, NODES, Board
from launcher.errors import KVUnavailable

log = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 5.0
_NUM_LAST_WORDS = 2  # the endpoint in use may be down; one that was carried out unheard makes the next one void


class Candidacy:
    """For the thread that follows the board; `evict` may be called from any thread. `lock` guards the board."""

    def __init__(self, office: Office, board: Board, own: RecordKeeper, lock: threading.RLock) -> None:
        self._office = office
        self._board = board
        self._own = own
        self._lock = lock
        self._key = f"{office.prefix}{LEADER}"
        self._leading: Leadership | None = None

    def stand(self) -> str:
        """Lead where nobody does, and stop where another node does. Who leads now, "" if nobody.

        Raises:
            KVUnavailable
        """
        office = self._office
        if not self._board.leader:
            written = office.kv.put(self._key, office.node_id.encode(), if_revision=0, lease=self._own.lease)
            if written is not None:
                with self._lock:
                    self._board.apply([(LEADER, written)])
        if self._board.leader != office.node_id:
            self._resign()
        elif self._leading is None:
            predecessor, grace_s = self._board.predecessor, self._own.lease_ttl_s
            with self._lock:
                self._leading = Leadership(office, grace_s=grace_s, predecessor=predecessor)
        return self._board.leader

    def withdraw(self) -> None:
        """Let another node lead at once: the lease may stand for as long as this node's workers cannot be stopped.

        Raises:
            KVUnavailable
        """
        self._resign()
        if self._board.leader == self._office.node_id:
            self._office.kv.delete(self._key, if_revision=self._board.leader_revision)

    def evict(self, node_id: str, reason: str) -> None:
        """Delete another node's record ahead of its lease, and its claim to lead.

        Raises:
            KVUnavailable
        """
        with self._lock:
            leading = self._leading
            leader, revision = self._board.leader, self._board.leader_revision
        if leading is not None:
            leading.evict(node_id, reason)
            return
        self._office.kv.delete(f"{self._office.prefix}{NODES}{node_id}")
        if node_id == leader:
            self._office.kv.delete(self._key, if_revision=revision)

    def leave(self, how: str) -> None:
        """Stop leading, and tell the successor how this node goes; its lease is about to be revoked."""
        leading = self._leading
        if leading is None:
            return
        self._resign()
        leading.join(_JOIN_TIMEOUT_S)
        with self._lock:
            leader, revision = self._board.leader, self._board.leader_revision
        if leader != self._office.node_id:  # a successor's claim is not written over
            return
        told = f"{leader} {how}".encode()
        for _ in range(_NUM_LAST_WORDS):
            try:
                self._office.kv.put(self._key, told, if_revision=revision, lease=self._own.lease)
                return
            except KVUnavailable as error:
                log.warning("[%s] last word as the leader not written: %s", leader, error)

    def _resign(self) -> None:
        with self._lock:
            leading, self._leading = self._leading, None
        if leading is not None:
            leading.end()
