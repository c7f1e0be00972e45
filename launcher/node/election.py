"""Who leads: one node's claim to the key `job/leader`, which it holds as long as it leads.

The key lies under the node's lease, so a leader that is lost makes room by itself; one that goes says so in the key
first, and its successor need not wait for what it may have left undone. Two nodes may believe to lead for a moment,
when one has not yet heard that its lease ended; every decision of a leader is a compare-and-swap on the round, so only
one of them has an effect.
"""

from __future__ import annotations

import logging
import math

from launcher.kv.base import WatchEvent
from launcher.node.asking import RETRY_S, Asking
from launcher.node.board import LEADER, Board
from launcher.node.effects import Delete, Lane, Put, Task
from launcher.node.events import Answered, Unanswered

log = logging.getLogger(__name__)

_LOST_RACE_S = 1.0  # until it is tried again though nothing was heard of a winner
_LAST_WORDS_S = 5.0  # for so long they are waited for: what is under way for the job may hold them up
_NUM_LAST_WORDS = 2  # the endpoint in use may be down; one that was carried out unheard makes the next one void


class Election:
    """One node's part in it. Each method that may write says what is to be written now, or nothing."""

    def __init__(self, node_id: str, board: Board) -> None:
        self._node_id = node_id
        self._board = board
        self._asking = Asking()
        self._heard_revision = 0  # of the board's leader
        self._num_words_left = _NUM_LAST_WORDS
        self._said_revision = 0  # of the claim that says already how this node goes
        self._gives_up_s = math.inf
        self.has_left = False
        """Whether the last words of `leave` were said, as far as the store let them be."""

    @property
    def is_won(self) -> bool:
        """Whether this node leads, as far as it has heard."""
        return self._board.leader == self._node_id

    @property
    def due_s(self) -> float:
        """When time alone makes another try possible."""
        return min(self._asking.due_s, self._gives_up_s)

    def hear(self) -> None:
        """The board has changed."""
        if self._board.leader_revision != self._heard_revision:
            self._heard_revision = self._board.leader_revision
            self._asking.resume()

    def campaign(self, lease_id: int, now_s: float) -> list[Task]:
        """Claim the lead where nobody leads."""
        if self._board.leader or not self._asking.is_free(now_s):
            return []
        return [self._asking.ask(Put(Lane.LEAD, LEADER, self._node_id.encode(), 0, lease_id))]

    def resign(self, how: str, lease_id: int | None, now_s: float) -> list[Task]:
        """Let another node lead at once: the lease may stand for as long as this node's workers cannot be stopped.

        `how` this node went, where it has evicted itself: no other node would know.
        """
        if not self.is_won or not self._asking.is_free(now_s):
            return []
        if how and lease_id is not None and self._board.leader_revision != self._said_revision:
            self._said_revision = self._board.leader_revision
            return [self._say(how, lease_id)]
        return [self._asking.ask(Delete(Lane.LEAD, LEADER, self._board.leader_revision))]

    def proclaim(self, how: str, lease_id: int, now_s: float) -> list[Task]:
        """Tell the successor how this node goes; its lease is about to be revoked."""
        self._gives_up_s = min(self._gives_up_s, now_s + _LAST_WORDS_S)
        if now_s >= self._gives_up_s:
            self.has_left = True
        if self.has_left or not self._asking.is_free(now_s):
            return []
        if not self.is_won or self._num_words_left == 0:  # a successor's claim is not written over
            self.has_left = True
            return []
        self._num_words_left -= 1
        return [self._say(how, lease_id)]

    def _say(self, how: str, lease_id: int) -> Task:
        words = f"{self._node_id} {how}".encode()
        return self._asking.ask(Put(Lane.LEAD, LEADER, words, self._board.leader_revision, lease_id))

    def depose(self, node_id: str) -> list[Task]:
        """Delete the claim of a node that is known to be dead."""
        if self._board.leader != node_id:
            return []
        return [Delete(Lane.LEAD, LEADER, self._board.leader_revision)]

    def answered(self, event: Answered, now_s: float) -> None:
        """The store has answered."""
        if not self._asking.is_open(event.task):
            return
        self._asking.close(now_s)
        match event.task:
            case Put(value=value) if b" " in value:
                self._num_words_left = 0
                if event.entry is not None:
                    self._said_revision = event.entry.revision
                    self._board.apply([WatchEvent(LEADER, event.entry, event.entry.revision)])
            case Put() if event.entry is None:  # who won is about to be heard
                self._asking.close(now_s, pause_s=_LOST_RACE_S)
            case Put():
                self._board.apply([WatchEvent(LEADER, event.entry, event.entry.revision if event.entry else 0)])
            case Delete():
                self._asking.close(now_s, pause_s=_LOST_RACE_S)

    def unanswered(self, event: Unanswered, now_s: float) -> None:
        """The store did not answer: what it did shows on the board, or in the answer to the next try."""
        if self._asking.is_open(event.task):
            words = isinstance(event.task, Put) and b" " in event.task.value
            if words:
                log.warning("[%s] last word as the leader not written: %s", self._node_id, event.why)
            self._asking.close(now_s, pause_s=0.0 if words else RETRY_S)
