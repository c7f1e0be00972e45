"""A node's own record: what the store should say of it, the lease that it lives under, and whether the node is fenced.

The record is written as soon as the store takes it, and again until it has. Only in the place of what was there: a
write that was given up, and that the store carries out late, must neither replace a newer one nor bring back a record
that another node deleted.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

from launcher.events import EventName
from launcher.kv.base import Entry
from launcher.node.asking import RETRY_S, Asking
from launcher.node.board import NODES
from launcher.node.effects import Abandon, Effect, Get, Grant, Lane, Put, Report, Revoke
from launcher.node.events import Answered, Granted, LeaseSeen, Unanswered
from launcher.node.store_host import StoreHost
from launcher.rounds.history import Exclusion
from launcher.rounds.records import LEFT, Node, Status

log = logging.getLogger(__name__)

FENCE_FRACTION = 0.15
YIELD_FRACTION = 0.6
CHECK_PERIOD_S = 10.0
_LINGER_S = 0.25
IDLE = (Status.READY, Status.EXCLUDED)
"""What a node says that has no workers: it may come back as a new, youngest node."""


@dataclasses.dataclass(frozen=True)
class HeldLease:
    """A lease of this node's as it was last seen."""

    ttl_s: float
    seen: LeaseSeen

    @property
    def lease_id(self) -> int:
        """The driver's name of it."""
        return self.seen.lease_id

    @property
    def fence_s(self) -> float:
        """From when on it is so near its end that it cannot be saved."""
        return -math.inf if self.seen.lost else self.seen.deadline_s - FENCE_FRACTION * self.ttl_s


class Registration:
    """One node's record in the store. It starts out as a fenced node does: nothing is there."""

    def __init__(self, node: Node, *, lease_ttl_s: float) -> None:
        self.record = node
        """What the store should say of this node."""
        self.lease: HeldLease | None = None
        self.registered_revision = 0
        """The store's revision at which the record was last written under a new lease."""
        self.why = ""
        """What is in the way of being registered."""
        self.is_gone = False
        """Whether this node has left, and said so as far as the store let it."""
        self._key = f"{NODES}{node.node_id}"
        self._lease_ttl_s = lease_ttl_s
        self._candidate: HeldLease | None = None  # granted, while the record is not yet under it
        self._stored: Node | None = None
        self._writing = node
        self._revision = 0  # at which the store last had the record, as far as this node heard
        self._in_doubt = False  # the store may have something else in its place: look before writing
        self._was_refused = False
        self._offered: set[bytes] = set()  # what this node has tried to register as
        self._fenced = True
        self._unfit = ""
        self._waits = True  # for a round: then its record says whether it may take part
        self._checked_s = self._lingers_until_s = -math.inf
        self._silent_since_s: float | None = None
        self.store_host = StoreHost()
        self._leaving: list[str] | None = None  # what is still to be done for that
        self._asking = Asking()

    # --- what is true

    def fenced(self, now_s: float) -> bool:
        """Whether this node must not run workers: its lease ended, or is so near its end that it cannot be saved.

        Workers are killed on this, before anybody else can see the lease end and start them elsewhere.
        """
        return self._fenced or self.lease is None or now_s >= self.lease.fence_s

    @property
    def is_fenced(self) -> bool:
        """The same as of the last step."""
        return self._fenced

    @property
    def is_leaving(self) -> bool:
        """Whether `leave` was called."""
        return self._leaving is not None

    def store_silent(self, now_s: float) -> bool:
        """Whether the store has been silent for so long that this node will be fenced soon if it goes on.

        Time to save what has been done: a refusal that proves that no lease ends is not silence.
        """
        lease = self.lease
        return lease is not None and now_s > lease.seen.deadline_s - (1.0 - YIELD_FRACTION) * lease.ttl_s

    @property
    def lease_ttl_s(self) -> float:
        """Of the lease as it was granted."""
        return self.lease.ttl_s if self.lease else self._lease_ttl_s

    @property
    def due_s(self) -> float:
        """When time alone changes something."""
        if self.is_gone:
            return math.inf
        times = [self._asking.due_s if self._has_work() else math.inf]
        if not (self._fenced or self._in_doubt) and self._leaving is None:
            times = [max(times[0], self._lingers_until_s)]
        if self.lease is not None:
            times.append(self.store_host.due_s(self.lease.seen))
        if not self._fenced and self.lease is not None:
            times += [self.lease.fence_s, max(self._asking.due_s, self._checked_s + CHECK_PERIOD_S)]
        return min(times)

    def _has_work(self) -> bool:
        if self._leaving is not None:
            return True
        if self._fenced:
            return self.record.status in IDLE
        return self._in_doubt or self._stored != self.record

    # --- what changes

    def change(self, **fields: Any) -> None:
        """Change fields of the record."""
        self._lingers_until_s = -math.inf
        self.record = dataclasses.replace(self.record, **fields)

    def announce(self, status: Status, **fields: Any) -> None:
        """Say what this node does now."""
        self._waits = status is Status.READY
        self.change(status=status, **fields)

    def linger(self, now_s: float) -> None:
        """What the record says by now tells nobody anything: it is about to change again, and need be written only if
        that takes long."""
        self._lingers_until_s = now_s + _LINGER_S

    def hold_back(self, unfit: str) -> None:
        """Say that this node finds itself unfit to take part, and why; "" once it is fit. `stand` does not end that."""
        self._unfit = unfit
        if unfit:
            self._waits = False
            self.change(status=Status.EXCLUDED, reason=unfit)

    def stand(self, excluded: Exclusion | None) -> None:
        """Say of a node that waits that it is excluded, or that it is ready again."""
        status = Status.EXCLUDED if excluded else Status.READY
        if self._waits and self.record.status is not status:
            reason = f"excluded: {excluded.reason}" if excluded else "readmitted"
            log.warning("[%s] %s", self.record.node_id, reason)
            self.change(status=status, reason=reason)

    def fence(self) -> None:
        """The record is gone from the store: somebody deleted it, or the lease ended."""
        if not self._fenced:
            self._fenced = True
            self._in_doubt = True

    def leave(self) -> None:
        """Say that this node goes of its own accord, and go."""
        self._leaving = ["say so", "go"] if self.lease else []

    def see(self, seen: LeaseSeen, now_s: float) -> list[Effect]:
        """Learn how a lease stands; the beginning and the end of a silence are told once."""
        if self._candidate and self._candidate.lease_id == seen.lease_id:
            self._candidate = dataclasses.replace(self._candidate, seen=seen)
        if self.lease is None or self.lease.lease_id != seen.lease_id:
            return []
        self.lease = dataclasses.replace(self.lease, seen=seen)
        if seen.silent_since_s is None:
            return self._back(now_s)
        if self._silent_since_s is not None:
            return []
        self._silent_since_s = seen.silent_since_s
        fields = {
            "seconds": round(now_s - seen.silent_since_s, 3),
            "reason": seen.silence,
            "leases_stand": seen.stands,
        }
        return [Report(EventName.STORE_UNREACHABLE, self.record.generation, fields)]

    def _back(self, now_s: float) -> list[Effect]:
        self.store_host.back()
        if self._silent_since_s is None:
            return []
        seconds = round(now_s - self._silent_since_s, 3)
        self._silent_since_s = None
        log.warning("[%s] the store answers again, after %.1f s", self.record.node_id, seconds)
        return [Report(EventName.STORE_BACK, self.record.generation, {"seconds": seconds})]

    # --- what is asked of the store

    def next(self, now_s: float) -> list[Effect]:
        """What to do now."""
        if self.fenced(now_s):
            self.fence()
        told: list[Effect] = []
        if self.lease is not None and not self.is_leaving:
            told += self.store_host.look(self.lease.seen, self.record.generation, now_s, is_over=self._fenced)
        return [*told, *self._ask(now_s)]

    def _ask(self, now_s: float) -> list[Effect]:
        if not self._asking.is_free(now_s) or self.is_gone:
            return []
        if self._leaving is not None:
            return self._go()
        if self._fenced:
            return self._register(now_s) if self.record.status in IDLE else []
        assert self.lease is not None
        is_to_be_written = self._stored != self.record and now_s >= self._lingers_until_s
        if self._in_doubt or (not is_to_be_written and now_s >= self._checked_s + CHECK_PERIOD_S):
            return [self._asking.ask(Get(Lane.RECORD, self._key))]
        return [self._write(self.lease)] if is_to_be_written else []

    def _write(self, lease: HeldLease) -> Put:
        self._writing = self.record
        put = Put(Lane.RECORD, self._key, self.record.to_json(), self._revision, lease.lease_id)
        return self._asking.ask(put)

    def _register(self, now_s: float) -> list[Effect]:
        done: list[Effect] = []
        if self._candidate is not None and now_s >= self._candidate.fence_s:
            done.append(self._give_up_candidate())
        if self._candidate is None:
            return [*done, self._asking.ask(Grant(Lane.RECORD, self._lease_ttl_s))]
        if self._in_doubt:
            return [self._asking.ask(Get(Lane.RECORD, self._key))]
        status = Status.EXCLUDED if self._unfit else self.record.status
        self.change(status=status, failure=None, lease_ttl_s=self._candidate.ttl_s)
        put = self._write(self._candidate)
        self._offered.add(put.value)
        return [put]

    def _give_up_candidate(self) -> Abandon:
        assert self._candidate is not None
        given_up, self._candidate = Abandon(self._candidate.lease_id), None
        return given_up

    def _go(self) -> list[Effect]:
        assert self._leaving is not None
        step = self._leaving.pop(0) if self._leaving else ""
        if step == "say so" and self.lease is not None:
            left = dataclasses.replace(self.record, status=Status.EXCLUDED, reason=LEFT)
            return [self._asking.ask(Put(Lane.RECORD, self._key, left.to_json(), None, self.lease.lease_id))]
        if step == "go" and self.lease is not None:
            return [self._asking.ask(Revoke(Lane.RECORD, self.lease.lease_id))]
        self.is_gone = True
        return [self._give_up_candidate()] if self._candidate else []

    # --- what the store answers

    def granted(self, event: Granted, now_s: float) -> list[Effect]:
        """A lease was granted."""
        self._candidate = HeldLease(event.ttl_s, event.seen)
        if not self._asking.is_open(event.task):
            return [self._give_up_candidate()]
        self._asking.close(now_s)
        return []

    def unanswered(self, event: Unanswered, now_s: float) -> None:
        """The store did not answer: try again, having looked what it did."""
        if self._asking.is_open(event.task):
            self._asking.close(now_s, pause_s=0.0 if self._leaving is not None else RETRY_S)
            self.why = event.why
            self._in_doubt = self._in_doubt or isinstance(event.task, Put)

    def answered(self, event: Answered, now_s: float) -> list[Effect]:
        """The store has answered."""
        if not self._asking.is_open(event.task):
            return []
        self._asking.close(now_s)
        self.why = ""
        match event.task:
            case Get():
                self._found(event.entry, now_s)
            case Put(lease_id=lease_id) if self._leaving is None:
                if event.entry is None:
                    self._in_doubt = self._was_refused = True
                    if self._candidate and lease_id == self._candidate.lease_id:  # which has ended, perhaps
                        self._asking.close(now_s, pause_s=RETRY_S)
                        return [self._give_up_candidate()]
                    return []
                self._stored, self._revision = self._writing, event.entry.revision
                if self._candidate and lease_id == self._candidate.lease_id:
                    return self._registered(event.entry, now_s)
            case Put():
                return self._back(now_s)  # the lease's next renewal would have shown it
        return []

    def _found(self, there: Entry | None, now_s: float) -> None:
        """Learn what the store has in the place of what was written last."""
        was_refused, self._was_refused = self._was_refused, False
        self._in_doubt = False
        self._checked_s = now_s
        if self._fenced:
            if self.registered_revision == 0 and there is not None and there.value not in self._offered:
                # No two nodes may share an id: each would overwrite the other's record.
                self.why = f"node id {self.record.node_id} is taken"
                self._in_doubt = True
                self._asking.close(now_s, pause_s=RETRY_S)
            else:
                self._revision = there.revision if there else 0
        elif there is None:
            log.error("[%s] this node's record was deleted", self.record.node_id)
            self.fence()
        elif there.revision != self._revision:
            self._revision, self._stored = there.revision, None
        elif was_refused:  # for another reason: the lease has ended, and that is about to be heard
            self._asking.close(now_s, pause_s=RETRY_S)

    def _registered(self, written: Entry, now_s: float) -> list[Effect]:
        before, self.lease, self._candidate = self.lease, self._candidate, None
        self.registered_revision = written.revision
        self._fenced = self._in_doubt = False
        self._checked_s = now_s
        self._offered.clear()
        done: list[Effect] = [Report(EventName.NODE_JOINED, self.record.generation, {"slots": self.record.slots})]
        if before is not None:
            log.warning("[%s] the lease had ended; joined anew", self.record.node_id)
            # With what else was under it, if it stands yet: a claim to lead, say.
            done.append(Revoke(Lane.RECORD, before.lease_id))
        return [*self._back(now_s), *done]
