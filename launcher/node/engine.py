"""One node's part in the job as a state machine: what was heard goes in, what is to be done comes out.

::

    agent's wishes ──┐                     ┌── the record, the claim to lead, the round   (tasks: Put, Get, Delete, ...)
    store's answers ─┼── step(event, now) ─┼── whom to watch and ask                      (WatchPeers, Ring)
    what is followed ┤                     ├── what to follow                             (Follow)
    news of peers ───┘                     └── what to tell                               (Report)

Its parts: `Registration` (the record and its lease, fencing), `Board` (what the store says, parsed once), `Election`
(who leads), and while this node leads a `Leader` with its `Roster`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable
from typing import Any

from launcher.events import EventName
from launcher.node.board import EVERYTHING, JOB, LEASE_ENDED, NODES, Board, Departure, News
from launcher.node.effects import Delete, Effect, Follow, Lane, Report, Ring, WatchPeers
from launcher.node.election import Election
from launcher.node.events import (
    Announced,
    Answered,
    Changed,
    Decided,
    Draining,
    Event,
    Granted,
    HeldBack,
    Joining,
    LeasesSeen,
    Leaving,
    Listed,
    PeerAlive,
    PeerDead,
    PeersDoubted,
    PeerSilent,
    Started,
    Tick,
    Unanswered,
    Unheard,
)
from launcher.node.leader import Leader
from launcher.node.local_view import LocalView
from launcher.node.registration import IDLE, Registration
from launcher.node.roster import Roster
from launcher.node.round_events import tell
from launcher.rounds.membership import Rules
from launcher.rounds.partitions import watched_by
from launcher.rounds.records import LEFT, LEFT_AT_ONCE, Node, Participant, Status, identity_of

log = logging.getLogger(__name__)

_ASK_AGAIN_S = 2.0


class NodeEngine:
    """A node in the job of one run. All times are those of one monotonic clock."""

    def __init__(self, node: Node, rules: Rules, *, lease_ttl_s: float, lineage: str) -> None:
        """`lineage` names what this node may found as a leader; no other node, and no other start of it, has it."""
        self.rules = rules
        self.board = Board()
        self.own = Registration(node, lease_ttl_s=lease_ttl_s)
        self.leader: Leader | None = None
        """While this node leads."""
        self._former: Leader | None = None  # of the last term: what it has written is told, whenever that is heard
        self.why = ""
        """What is waited for, in words."""
        self.has_left = False
        self.view = LocalView(node.node_id, self.board, self.own)
        """What the agent may ask."""
        self.node_id = node.node_id
        self._election = Election(node.node_id, self.board)
        self._lineage = lineage
        self._num_terms = itertools.count(1)
        self._following = 0  # the number of the last `Follow`
        self._followed = JOB  # and its prefix
        self._is_listed = False  # whether it has brought its listing
        self._grace_s = 0.0  # of the present term
        self._joined = 0  # the last generation of which this node may have started workers
        self._has_started = self._is_leaving = False
        self._evicted_as = ""  # by itself as the leader, since it last registered
        self._unanswered = ""  # why the store cannot be followed now
        self._ask_again_s = -math.inf
        self._effects: list[Effect] = []

    @property
    def visible(self) -> tuple[object, ...]:
        """Equal as long as nothing has changed that the agent may see, but for what time alone changes."""
        board = self.board
        seen = board.round_revision, board.round is None, tuple(board.drain_orders)
        return (*seen, self.own.record, self.own.is_fenced, self.why, self.has_left)

    @property
    def due_s(self) -> float:
        """When `step` has something to do though nothing was heard."""
        if not self._has_started or self.has_left:
            return math.inf
        times = [self.own.due_s]
        if self._wants_election:
            times.append(self._election.due_s)
        if self.leader is not None:
            times.append(self.leader.due_s)
        if self._has_doubts:
            times.append(self._ask_again_s)
        return min(times)

    # --- the step

    def step(self, event: Event, now_s: float) -> tuple[Effect, ...]:
        """Take an event in; what is to be done because of it, in this order."""
        self._effects = []
        self._take(event, now_s)
        if self._has_started and not self.has_left:
            self._proceed(now_s)
        return tuple(self._effects)

    def recover(self) -> tuple[Effect, ...]:
        """After a step that failed: what it had found to be done, and to list anew."""
        self._follow(self._followed)
        return tuple(self._effects)

    def _take(self, event: Event, now_s: float) -> None:
        match event:
            case Granted():
                self._effects += self.own.granted(event, now_s)
            case Answered():
                self._answered(event, now_s)
            case Unanswered():
                self.own.unanswered(event, now_s)
                self._election.unanswered(event, now_s)
                if self.leader is not None:
                    self.leader.unanswered(event, now_s)
                if isinstance(event.task, Delete):
                    log.warning("[%s] not deleted: %s: %s", self.node_id, event.task.key, event.why)
            case LeasesSeen(leases):
                for seen in leases:
                    self._effects += self.own.see(seen, now_s)
            case Listed(number, entries) if number == self._following:
                self._is_listed = True
                self._heard(self.board.replace(entries), now_s, listed=True)
            case Changed(number, changes) if number == self._following:
                self._heard(self.board.apply(changes), now_s)
            case Unheard(why):
                if not self._unanswered:
                    log.warning("[%s] %s", self.node_id, why)
                self._unanswered = why
            case Decided():
                self._decided(event, now_s)
            case PeerDead(node_id, reason):
                self._dead(node_id, reason)
            case PeerSilent(node_id):
                self._silent(node_id)
            case PeerAlive(node_id):
                self._reached(lambda peer: peer != node_id)
            case Listed() | Changed() | Tick():  # of what is no longer followed
                pass
            case _:
                self._wish(event, now_s)

    def _wish(self, event: Event, now_s: float) -> None:
        record = self.own.record
        match event:
            case Started(unfit):
                self._has_started = True
                self.own.hold_back(unfit)
            case Announced(status, reason, failure, yielded):
                kept: dict[str, Any] = {"reason": reason or record.reason, "failure": failure or record.failure}
                self.own.announce(status, yielded=yielded or record.yielded, **kept)
                if self.view.is_known(self.own.record):
                    self.own.linger(now_s)
                if status in (Status.STOPPING, Status.READY):
                    self._effects.append(WatchPeers(()))
            case Joining(generation, worker_store):
                fresh: dict[str, Any] = {"reason": "", "failure": None, "yielded": False, "cannot_reach": ()}
                self.own.announce(Status.RUNNING, generation=generation, worker_store=worker_store, **fresh)
            case HeldBack(unfit):
                self.own.hold_back(unfit)
            case Draining(reason):
                self.own.change(draining=True, reason=reason)
            case PeersDoubted():
                self._effects.append(Ring(self._peers()))
            case Leaving():
                self._is_leaving = True
                self.has_left = not self._has_started

    # --- what was heard

    def _heard(self, news: Iterable[News], now_s: float, *, listed: bool = False) -> None:
        self._unanswered = ""
        self._election.hear()
        if self.leader is not None and self._followed == EVERYTHING and self._is_listed:
            self._depart(self.leader.hear(news, now_s, listed=listed))
            if listed and (awaited := tuple(p for p in self._peers() if p.node_id in self.leader.awaited)):
                self._effects.append(Ring(awaited))

    def _answered(self, event: Answered, now_s: float) -> None:
        was_fenced = self.own.fenced(now_s)
        self._effects += self.own.answered(event, now_s)
        if was_fenced and not self.own.fenced(now_s):  # registered
            self._evicted_as = ""
            self._follow(JOB)
        self._election.answered(event, now_s)
        for leader in filter(None, (self.leader, self._former)):
            if written := leader.answered(event, now_s):
                tell(self._report, *written)

    def _decided(self, event: Decided, now_s: float) -> None:
        if self.leader is not None and not self.own.fenced(now_s):
            # Deciding may have taken long: a frozen node's view is of before.
            self._effects += self.leader.decided(event, now_s)

    def _depart(self, departures: Iterable[Departure]) -> None:
        """Tell who has gone. This node may be among them: somebody deleted its record."""
        generation = self._generation
        for gone in departures:
            if gone.node_id == self.node_id:
                self._evicted_as = gone.how
                self._fence(gone.how)
            elif gone.how in (LEFT, LEFT_AT_ONCE):
                self._report(EventName.NODE_LEFT, generation=generation, node_left=gone.node_id)
            else:
                silent = {"silent_s": gone.silent_s or self._grace_s} if gone.how == LEASE_ENDED else {}
                self._report(
                    EventName.NODE_LOST, generation=generation, node_lost=gone.node_id, reason=gone.how, **silent
                )

    def _fence(self, reason: str) -> None:
        if not self.own.is_fenced:
            self.own.fence()
            self._report(EventName.NODE_FENCED, generation=self._generation, reason=reason)

    # --- peers

    def _peers(self) -> tuple[Participant, ...]:
        current = self.board.round
        return tuple(p for p in current.participants if p.node_id != self.node_id) if current else ()

    def _dead(self, node_id: str, reason: str) -> None:
        """Delete a dead node's record ahead of its lease, and its claim to lead."""
        self._reached(lambda peer: peer != node_id)
        if self.leader is not None and node_id in self.leader.awaited:
            self._depart(self.leader.give_up(node_id, reason))
            return
        log.warning("[%s] node %s is lost: %s", self.node_id, node_id, reason)
        self._report(EventName.PEER_LOST, generation=self.own.record.generation, peer=node_id, reason=reason)
        if self.leader is not None:
            self._effects += self.leader.evict(node_id, reason)
        else:
            self._effects += [Delete(Lane.LEAD, f"{NODES}{node_id}"), *self._election.depose(node_id)]

    def _silent(self, node_id: str) -> None:
        """Tell the leader that a participant of the round does not answer this node."""
        record, current = self.own.record, self.board.round
        if node_id in record.cannot_reach or current is None or current.place_of(node_id) is None:
            return
        self.own.change(cannot_reach=(*record.cannot_reach, node_id))
        self._report(EventName.PEER_UNREACHABLE, generation=current.generation, peer=node_id)

    @property
    def _has_doubts(self) -> bool:
        reports = bool(self.own.record.cannot_reach) and self.own.record.status is Status.READY
        return reports or (self.leader is not None and self.leader.awaits_stop)

    def _doubted_peers(self) -> tuple[Participant, ...]:
        """Those to be asked again: before this node runs workers beside them, and while it waits for theirs to stop.

        Nobody else does the latter: who stops its own workers watches nobody any more.
        """
        record, leader = self.own.record, self.leader
        doubted = record.cannot_reach if record.status is Status.READY else ()
        awaited = leader.may_run_workers if leader is not None and leader.awaits_stop else lambda _: False
        return tuple(p for p in self._peers() if p.node_id in doubted or awaited(p.node_id))

    def _reached(self, still: Any) -> None:
        """Take back what was told of participants that answer by now, and of nodes that are none any more."""
        record = self.own.record
        if record.status is Status.READY and (kept := tuple(filter(still, record.cannot_reach))) != record.cannot_reach:
            self.own.change(cannot_reach=kept)

    # --- what follows

    def _proceed(self, now_s: float) -> None:
        if self.leader is not None:
            self._depart(self.leader.pass_time(now_s))
        self._heed(now_s)
        self._stand_or_lead(now_s)
        self._ask_again(now_s)
        self._effects += self.own.next(now_s)
        self.has_left = self.own.is_gone
        self._note_why()

    def _heed(self, now_s: float) -> None:
        """Act on what the board says of this node itself."""
        current, record = self.board.round, self.own.record
        # That one who leaves is gone is no news; what was learnt before a listing may be of another store.
        if self._is_leaving or self.own.fenced(now_s) or not self._is_listed:
            return
        works = current if current and current.complete and current.broken is None else None
        if works and record.status is Status.RUNNING and record.generation == works.generation != self._joined:
            self._joined = works.generation
            self._effects.append(WatchPeers(watched_by(works, self.node_id)))
        if self.board.counts_as_lost(self.node_id, self.own.registered_revision) or self._is_superseded():
            self._fence("taken for lost")
        else:
            self.own.stand(current.history.excluded(identity_of(self.node_id)) if current else None)

    def _is_superseded(self) -> bool:
        """Whether there is a newer round while this node may still run workers.

        The leader waits for all nodes that it knows to stop theirs: it knows this one no more.
        """
        record, current = self.own.record, self.board.round
        return (
            current is not None and record.generation == self._joined < current.generation and record.status not in IDLE
        )

    @property
    def _wants_election(self) -> bool:
        if self._is_leaving:
            return self.own.lease is not None and not self._election.has_left and not self.own.store_host.lost
        if self.own.is_fenced:
            return self._election.is_won
        return self._is_listed and not self.board.leader

    def _stand_or_lead(self, now_s: float) -> None:
        """Lead where nobody does, and stop where another node does, or where this one must not."""
        lease = self.own.lease
        if self._is_leaving:
            self._former, self.leader = self.leader or self._former, None
            if lease is not None and self._wants_election:
                how = LEFT if self.own.record.yielded else LEFT_AT_ONCE
                self._effects += self._election.proclaim(how, lease.lease_id, now_s)
            if not self._wants_election and not self.own.is_leaving:
                self.own.leave()
            return
        if self.own.fenced(now_s) or lease is None:
            self._end_term(now_s)
            self._effects += self._election.resign(self._evicted_as, lease.lease_id if lease else None, now_s)
            return
        if self._is_listed:
            self._effects += self._election.campaign(lease.lease_id, now_s)
        if not self._election.is_won:
            self._end_term(now_s)
        elif self.leader is None:
            self._begin_term(now_s)
        if self.leader is not None:
            self._lead(self.leader, now_s)

    def _begin_term(self, now_s: float) -> None:
        gone = self.board.predecessor
        departed = {gone.node_id: gone.how} if gone else {}
        lineage = f"{self._lineage}-{next(self._num_terms)}"
        self._grace_s = self.own.lease_ttl_s  # participants that are not there at first may come back for that long
        roster = Roster(lineage, now_s, board=self.board, grace_s=self._grace_s, departed=departed)
        self.leader = Leader(self.node_id, self.rules, self.board, roster)
        self._follow(EVERYTHING)

    def _end_term(self, now_s: float) -> None:
        if self.leader is None:
            return
        self._former, self.leader = self.leader, None
        self.board.nodes.clear()
        self._follow(JOB)

    def _lead(self, leader: Leader, now_s: float) -> None:
        self._effects += leader.next(now_s)
        if leader.is_stale and self._is_listed:
            self._follow(EVERYTHING)

    def _follow(self, prefix: str) -> None:
        self._following += 1
        self._followed, self._is_listed = prefix, False
        self._effects.append(Follow(self._following, prefix))

    def _ask_again(self, now_s: float) -> None:
        participants = {p.node_id for p in self._peers()}
        self._reached(participants.__contains__)
        if self._has_doubts and now_s >= self._ask_again_s:
            self._ask_again_s = now_s + _ASK_AGAIN_S
            if doubted := self._doubted_peers():
                self._effects.append(Ring(doubted))

    def _note_why(self) -> None:
        led = f"node {self.board.leader} leads" if self.board.leader else "a leader is being chosen"
        others = self.own.why or (self.leader.why if self.leader else led)
        self.why = self.own.store_host.lost or ("the store does not answer" if self._unanswered else others)

    @property
    def _generation(self) -> int:
        return self.board.round.generation if self.board.round else 0

    def _report(self, event: EventName, /, *, generation: int = 0, **fields: Any) -> None:
        self._effects.append(Report(event, generation, fields))
