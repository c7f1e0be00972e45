"""A term of leading: when a decision is due, and what follows from it. The decision itself is `membership.decide`'s."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable

from launcher.kv.base import WatchEvent
from launcher.node.asking import RETRY_S, Asking
from launcher.node.board import NODES, ROUND, Board, Departure, News
from launcher.node.effects import Decide, Delete, Lane, Put, Task
from launcher.node.events import Answered, Decided, Unanswered
from launcher.node.roster import Roster
from launcher.rounds.membership import BUSY, Evict, Propose, Rules, Wait
from launcher.rounds.records import Round

log = logging.getLogger(__name__)

_TICK_S = 1.0
_REST_FACTOR = 3.0  # so deciding takes about a quarter of a core, however many records change
_LONGEST_REST_S = 0.25


class Leader:
    """One per term."""

    def __init__(self, node_id: str, rules: Rules, board: Board, roster: Roster) -> None:
        self._node_id = node_id
        self._rules = rules
        self._board = board
        self._roster = roster
        self._asking = Asking()
        self._seen_revision = 0  # of the round that the last decision was about, 0 where there was none
        self._proposed: tuple[Round, Round | None] | None = None  # and the one that it would replace
        self._is_news = True  # since the last decision
        self._wake_s = -math.inf  # else to be asked again then
        self._rest_s = -math.inf
        self.why = ""
        """What is waited for."""
        self.is_stale = False
        """Whether what was learnt is not to be relied on: list again."""

    @property
    def due_s(self) -> float:
        """When time alone makes a decision due."""
        if self.is_stale or not self._roster.is_listed:
            return math.inf
        return max(self._asking.due_s, self._rest_s, -math.inf if self._is_news else self._wake_s)

    def hear(self, news: Iterable[News], now_s: float, *, listed: bool) -> list[Departure]:
        """Learn what is new on the board. Who has departed with that."""
        self._is_news = True
        if listed:
            self.is_stale = False
        return self._roster.take(news, now_s, listed=listed)

    @property
    def awaited(self) -> frozenset[str]:
        """Participants that are not there and may still come back."""
        return self._roster.awaited

    @property
    def awaits_stop(self) -> bool:
        """Whether the round is broken, and the next one waits until no workers of it run."""
        current = self._board.round
        return current is not None and current.broken is not None and not current.outcome

    def may_run_workers(self, node_id: str) -> bool:
        """Whether a node's workers may still run."""
        node = self._board.nodes.get(node_id)
        return node is not None and node.status in BUSY

    def give_up(self, node_id: str, reason: str) -> list[Departure]:
        """An awaited node will not come back."""
        self._is_news = True
        return self._roster.give_up(node_id, reason)

    def evict(self, node_id: str, reason: str) -> list[Task]:
        """Delete another node's record ahead of its lease: it is known to be dead, or holds everybody up."""
        if self._roster.is_listed and not self._roster.presume_lost(node_id, reason):
            return []
        return [Delete(Lane.LEAD, f"{NODES}{node_id}")]

    def pass_time(self, now_s: float) -> list[Departure]:
        """Note what time has changed, where a decision is due. Who has departed with that."""
        return self._roster.settle(now_s) if now_s >= self.due_s else []

    def next(self, now_s: float) -> list[Task]:
        """Have a decision made, if one is due."""
        if now_s < self.due_s:
            return []
        self._is_news = False
        self._seen_revision = self._board.round_revision if self._board.round else 0
        return [self._asking.ask(Decide(Lane.LEAD, self._roster.view(), self._rules))]

    def decided(self, event: Decided, now_s: float) -> list[Task]:
        """Carry a decision out, or wait."""
        if not self._asking.is_open(event.task):
            return []
        assert isinstance(event.task, Decide)
        seen = event.task.view
        self._asking.close(now_s)
        match event.action:
            case Wait(why, until_s):
                # Hundreds of nodes join one by one, and what a decision takes grows with their number: after one, let
                # as many join as do so meanwhile.
                self._rest_s = now_s + min(_LONGEST_REST_S, _REST_FACTOR * event.took_s)
                self.why = why
                self._wake_s = now_s + _TICK_S if until_s is None else min(now_s + _TICK_S, until_s)
            case Evict(node_id, reason):
                if self._board.nodes.get(node_id) != seen.node(node_id):  # it has moved meanwhile
                    self._is_news = True
                    return []
                self._wake_s = now_s + RETRY_S  # the watch tells that it is gone
                for task in self.evict(node_id, reason):
                    log.warning("[%s] node %s is evicted: %s", self._node_id, node_id, reason)
                    return [self._asking.ask(task)]
            case Propose(proposed):
                return [self._propose(proposed, seen.round, event.epoch_s)]
        return []

    def _propose(self, proposed: Round, current: Round | None, epoch_s: float) -> Put:
        if current is None or current.generation != proposed.generation:
            proposed = dataclasses.replace(proposed, formed_ts=round(epoch_s, 3))
        self._proposed = proposed, current
        return self._asking.ask(Put(Lane.LEAD, ROUND, proposed.to_json(), self._seen_revision))

    def answered(self, event: Answered, now_s: float) -> tuple[Round, Round | None] | None:
        """The store has answered. The round that was written and the one before, if one was."""
        if not self._asking.is_open(event.task):
            return None
        self._asking.close(now_s)
        if not isinstance(event.task, Put):
            return None
        written, self._proposed = self._proposed, None
        if event.entry is None:
            log.info("[%s] another node was first to change the round", self._node_id)
            self.is_stale = True
            return None
        self.hear(self._board.apply([WatchEvent(ROUND, event.entry, event.entry.revision)]), now_s, listed=False)
        return written

    def unanswered(self, event: Unanswered, now_s: float) -> None:
        """The store did not answer, or the decision failed: decide anew."""
        if self._asking.is_open(event.task):
            self._asking.close(now_s, pause_s=RETRY_S)
            self._is_news = True
            self.why = event.why
            self.is_stale = self.is_stale or isinstance(event.task, Decide)
