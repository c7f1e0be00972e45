"""A job as one state machine, which reads the events of all nodes and books each second to a cause. Pure.

The events, in the order of their time stamps, drive it::

    FORMING ──round_formed──► STARTING ──first step──► TRAINING ──loss, failure, yield──► STOPPING ──┐
                                 ▲   └──loss, failure──► STOPPING                                    │
                                 └───────────────────────round_formed────────────────────────────────┘
    any ──finished, or no node left──► CLOSED ──node_joined──► FORMING

What is learnt later reaches back: an interruption begins where the last step was done, not where it was noticed.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from launcher.events import EventName, EventRecord
from launcher.reports.causes import EXPLAINS, Cause, Interruption, StoreKind
from launcher.reports.outages import Silence
from launcher.reports.reasons import UNSPECIFIC, Reason, reason_from, reason_in
from launcher.reports.round_steps import RoundSteps
from launcher.reports.sentences import sentence
from launcher.rounds.records import identity_of


class Phase(StrEnum):
    """What the job does at one time."""

    FORMING = "forming"
    STARTING = "starting"
    TRAINING = "training"
    STOPPING = "stopping"
    CLOSED = "closed"


@dataclass
class Stretch:
    """A time in which the job trained without an interruption."""

    steps: RoundSteps
    began_ts: float
    ended_ts: float
    yielded: bool = False
    """Whether the workers stopped at a step boundary and had saved their state."""
    ended_by: int | None = None
    """Index, in `Ledger.ended`, of the interruption that ended it."""


@dataclass
class _Open:
    """An interruption that has not ended yet."""

    cause: Cause
    root: str
    nodes: tuple[str, ...]
    steps: RoundSteps
    began_ts: float
    formed_ts: float | None = None
    booked_s: float = 0.0
    """Seconds that are booked to it so far; those in which the job was closed are not among them."""
    failures: list[EventRecord] = field(default_factory=list)
    refused: bool = False
    """Whether a peer's agent has refused a connection, or the store its host: it is gone, and not merely silent."""
    root_rank: int | None = None
    """The rank whose failure it began with; None until the leader has told."""

    def explain(self, why: Reason) -> None:
        """Replace the cause by `why`, if that explains what was known so far."""
        deeper = why.cause is self.cause and why.is_deeper and set(self.nodes) <= set(why.nodes)
        if deeper or EXPLAINS.index(why.cause) > EXPLAINS.index(self.cause):
            self.cause, self.root, self.nodes = why.cause, why.root, why.nodes
        elif why.cause is self.cause is Cause.NODE_LOSS and not set(why.nodes) <= set(self.nodes):
            self.root, self.nodes = f"{self.root}; {why.root}", (*self.nodes, *why.nodes)
        elif why.cause is self.cause and not self.nodes:
            self.root, self.nodes = why.root, why.nodes

    def name_all(self, before: frozenset[str], after: frozenset[str]) -> None:
        """Name all nodes that join or drain: a reason names the first few, the next round has every one."""
        changed = {Cause.JOIN: after - before, Cause.DRAIN: before - after}.get(self.cause)
        self.nodes = tuple(sorted(changed)) if changed else self.nodes

    def end(self, ended_ts: float, *, resumed: bool, followed_by: str = "") -> Interruption:
        return Interruption(
            cause=self.cause,
            root=self.root,
            nodes=self.nodes,
            victims=tuple(
                told
                for failure in self.failures
                if (told := sentence(failure)) != self.root and failure.get("rank") != self.root_rank
            ),
            generation=self.steps.generation,
            began_ts=self.began_ts,
            formed_ts=self.formed_ts,
            resumed_ts=ended_ts if resumed else None,
            ended_ts=ended_ts,
            followed_by=followed_by,
            steps_redone=None,
        )


class Ledger:
    """The account while it is written: `hear` every event in order, then `close`.

    `seconds` has what was not spent on training; `stretches` says when the job trained.
    """

    def __init__(self, ordered: Sequence[EventRecord], rounds: Sequence[RoundSteps], silent: Sequence[Silence]) -> None:
        self._began_ts = self._since_ts = float(ordered[0]["ts"])
        self._rounds: Iterator[RoundSteps] = iter(rounds)
        self._tells_steps = any(steps.first for steps in rounds)
        self._silent = deque(silence for silence in silent if silence.store is StoreKind.JOB)  # as they began
        self._last_word: Mapping[str, float] = {str(e.get("node", "")): float(e["ts"]) for e in ordered}
        self._live: set[str] = set()
        self._refused: set[str] = set()  # whose agents refuse connections, and have not been heard of since
        self._endings: dict[str, str] = {}
        self._phase = Phase.FORMING
        self._steps = RoundSteps(0, frozenset(), self._since_ts)
        self._started: set[str] = set()
        self._done: set[str] = set()  # the nodes whose workers have reached their end: they leave, and break nothing
        self._why_asked: Reason | None = None
        self._open: _Open | None = None
        self.seconds = dict.fromkeys(Cause, 0.0)
        self.stretches: list[Stretch] = []
        self.ended: list[Interruption] = []
        self.outcome = ""

    def hear(self, event: EventRecord) -> None:
        """Book one event; events that the account has no use for change nothing."""
        ts, node = float(event["ts"]), str(event.get("node", ""))
        self._refused.discard(node)
        match event["event"]:
            case EventName.PEER_LOST | EventName.STORE_HOST_LOST:
                self._refused.add(str(event.get("peer") or event.get("node_lost", "")))
            case EventName.NODE_JOINED:
                self._joined(node, ts)
            case EventName.ROUND_FORMED:
                self._round_formed(event)
            case EventName.WORKERS_STARTED if self._is_of_round(event):
                self._workers_started(node, ts)
            case EventName.FIRST_STEP if event is self._steps.first:
                self._train(max(self._steps.first_began_ts or ts, self._since_ts))
            case EventName.STOP_REQUESTED if event.get("generation") == self._steps.generation:
                self._why_asked = reason_from(str(event.get("reason", "")))
            case EventName.DRAIN_STARTED if node in self._steps.participants and self._why_asked is None:
                self._why_asked = Reason(Cause.DRAIN, sentence(event), (node,))
            case EventName.ROOT_CAUSE if self._is_open_for(event):
                self._root_cause(event)
            case EventName.WORKERS_DONE if self._is_of_round(event):
                self._done.add(node)
            case EventName.WORKERS_YIELDED if self.stretches and self._is_of_round(event):
                self.stretches[-1].yielded = True
            case EventName.FINISHED:
                self.outcome = str(event.get("outcome", ""))
                self._close(ts)
        if why := self._ending(event):
            self._interrupt(event, why)
        self._departed(event, ts)

    # --- who is there

    def _joined(self, node: str, ts: float) -> None:
        same = {n for n in self._live if n != node and identity_of(n) == identity_of(node)}
        if dead := {n for n in same if self._last_word.get(n, ts) < ts}:
            self._gone_unheard(dead, ts)
        if self._phase is Phase.CLOSED:
            self._pass_to(Phase.FORMING, ts)
            self.outcome, self._endings = "", {}
        self._live.add(node)

    def _gone_unheard(self, dead: set[str], ts: float) -> None:
        """Take nodes for ended that are started again, though the last word of them was that they worked."""
        self._live -= dead
        if self._live or self._phase is Phase.CLOSED:
            return
        words = [self._last_word[node] for node in self._steps.participants | dead if node in self._last_word]
        last_ts = max([self._since_ts, *(word for word in words if word < ts)])
        nodes = tuple(sorted(dead))
        if self._phase in (Phase.TRAINING, Phase.STARTING):
            why = Reason(Cause.NODE_LOSS, f"node {', '.join(nodes)} ended without a word", nodes)
            self._interrupt({"event": "", "ts": last_ts}, why)
        self._pass_to(Phase.CLOSED, max(last_ts, self._since_ts))

    def _departed(self, event: EventRecord, ts: float) -> None:
        match event["event"]:
            case EventName.NODE_ENDED | EventName.DRAIN_OVERRAN:
                node = str(event.get("node", ""))
                self._endings[node] = f"{node}: {event.get('reason') or event.get('detail')}"
            case EventName.NODE_LOST | EventName.NODE_LEFT as name:
                node = str(event.get(name, ""))
            case _:
                return
        self._live.discard(node)
        if not self._there and self._phase is not Phase.CLOSED and self._steps.participants:
            self._close(ts)

    @property
    def end(self) -> str:
        """How the nodes of the last round ended; "" while one may still be there, and where an outcome is told."""
        return "" if self._there or self.outcome else "; ".join(self._endings.values())

    @property
    def _there(self) -> set[str]:
        return self._live - self._refused

    # --- the machine

    def _is_of_round(self, event: EventRecord) -> bool:
        return event.get("generation") == self._steps.generation and event.get("node") in self._steps.participants

    def _is_open_for(self, event: EventRecord) -> bool:
        return event.get("generation") == self._steps.generation and self._open is not None

    def _round_formed(self, event: EventRecord) -> None:
        ts = float(event["ts"])
        if self._phase is Phase.TRAINING:  # what ended it was not told
            self._interrupt(event, reason_from(str(event.get("reason", ""))))
        before, self._steps = self._steps, next(self._rounds)
        self._live |= self._steps.participants
        self._started, self._done = set(), set()
        self._why_asked = None
        self._pass_to(Phase.STARTING, ts)
        if self._open is not None:
            self._open.formed_ts = self._since_ts
            self._open.name_all(before.participants, self._steps.participants)

    def _workers_started(self, node: str, ts: float) -> None:
        """Count a script that never tells its steps as training once its last worker has started."""
        self._started.add(node)
        if not self._tells_steps and not self._steps.failed_at_start and self._started >= self._steps.participants:
            self._train(ts)

    def _train(self, ts: float) -> None:
        if self._phase is not Phase.STARTING:
            return
        self._pass_to(Phase.TRAINING, ts)
        ts = self._since_ts
        if self._open is not None:
            self._end(self._open, ts, resumed=True)
            self._open = None
        self.stretches.append(Stretch(self._steps, ts, ts))

    def _root_cause(self, event: EventRecord) -> None:
        assert self._open is not None
        why = reason_in(event, self._steps.participants)
        if why is None:
            return
        self._open.root_rank = event.get("rank")
        if EXPLAINS.index(why.cause) >= EXPLAINS.index(self._open.cause):
            self._open.cause, self._open.root, self._open.nodes = why.cause, why.root, why.nodes

    def _close(self, ts: float) -> None:
        self._pass_to(Phase.CLOSED, ts)
        if self._open is not None:
            self._end(self._open, self._since_ts)
            self._open = None

    def _ending(self, event: EventRecord) -> Reason | None:
        """Why this event ends the current round's work; None if it does not."""
        if event["event"] in (EventName.ROUND_FORMED, EventName.NODE_JOINED, EventName.ROOT_CAUSE):
            return None
        why = reason_in(event, self._steps.participants)
        of_other_round = event["event"] in _OF_ROUND and not self._is_of_round(event)
        if why is None or of_other_round or event.get(EventName.NODE_LEFT) in self._done:
            return None
        if event["event"] in (EventName.WORKERS_YIELDED, EventName.WORKERS_STOPPED) and self._why_asked is not None:
            return self._why_asked
        if why.root in UNSPECIFIC and (silence := self._silence_at(float(event["ts"]))):
            return Reason(Cause.STORE, f"the store did not answer: {silence.reason}", ())
        return why

    def _silence_at(self, ts: float) -> Silence | None:
        """A silence of the store at that time, to a node of this round."""
        heard_of = (s for s in self._begun_by(ts) if s.node in self._steps.participants)
        return next((s for s in heard_of if s.ended_ts is None or ts <= s.ended_ts), None)

    def _begun_by(self, ts: float) -> Iterator[Silence]:
        return itertools.takewhile(lambda silence: silence.began_ts <= ts, self._silent)

    def _interrupt(self, event: EventRecord, why: Reason) -> None:
        ts = float(event["ts"])
        if self._phase in (Phase.TRAINING, Phase.STARTING):
            was_training = self._phase is Phase.TRAINING
            stood_ts = max(self._since_ts, ts - _LONGER_SILENT * why.silent_s)
            began_ts = self._began_to_stand(event, why) if was_training else stood_ts
            self._pass_to(Phase.STOPPING, began_ts)
            began_ts = self._since_ts
            if self._open is not None:  # it broke before it trained
                self._end(self._open, began_ts, followed_by=why.root)
            self._open = _Open(why.cause, why.root, why.nodes, self._steps, began_ts)
            if was_training:
                self.stretches[-1].ended_by = len(self.ended)
        elif self._phase is not Phase.STOPPING or self._open is None:
            return
        elif self._may_have_begun_earlier(why):
            began_ts = min(self._began_to_stand(event, why), self._open.began_ts)
            self._open.began_ts = self._since_ts = self.stretches[-1].ended_ts = began_ts
        self._open.explain(why)
        self._open.refused |= event["event"] in (EventName.PEER_LOST, EventName.STORE_HOST_LOST)
        if event["event"] == EventName.WORKER_FAILED:
            self._open.failures.append(event)

    def _may_have_begun_earlier(self, why: Reason) -> bool:
        """Whether `why` may tell that training had stopped before anybody noticed.

        It cannot if it blames only nodes that are blamed already.
        """
        assert self._open is not None
        ended_training = bool(self.stretches) and self.stretches[-1].ended_by == len(self.ended)
        return ended_training and not (why.nodes and set(why.nodes) <= set(self._open.nodes))

    def _began_to_stand(self, event: EventRecord, why: Reason) -> float:
        """When the training had stopped of which this event says that it has.

        The last step's time tells, or else how long there had been silence. A step that was under way then took at
        most as long as others do; the time after it is lost as well.
        """
        ts, stretch = float(event["ts"]), self.stretches[-1]
        silent_ts = ts - why.silent_s
        done_ts = self._steps.last_done_ts()
        if done_ts is None or done_ts > ts:
            orderly = why.cause in (Cause.DRAIN, Cause.JOIN, Cause.OTHER)  # workers may train on until they are ended
            return max(stretch.began_ts, silent_ts, (orderly and self._steps.first_gone_ts) or silent_ts)
        if stretch.yielded:
            done_ts = ts if self._is_saved_since(done_ts) else done_ts
            return max(stretch.began_ts, done_ts)
        return max(stretch.began_ts, done_ts, min(silent_ts, done_ts + self._steps.beat_s))

    def _is_saved_since(self, done_ts: float) -> bool:
        """Whether the state at the boundary was saved before the workers ended; that time is a stall of its own."""
        return self._steps.saved_ts is not None and self._steps.saved_ts >= done_ts

    def _end(self, over: _Open, ts: float, *, resumed: bool = False, followed_by: str = "") -> None:
        """Close an interruption. If all nodes had lost the store, that is the cause for which nodes counted as lost."""
        while self._silent and (ended_ts := self._silent[0].ended_ts) is not None and ended_ts < over.began_ts:
            self._silent.popleft()  # no later interruption begins before this one
        unheard = [s for s in self._begun_by(ts) if s.ended_ts is None or s.ended_ts >= over.began_ts]
        if over.steps.participants <= {silence.node for silence in unheard} and not over.refused:
            root = f"the store did not answer: {unheard[0].reason}"
            over.explain(Reason(Cause.STORE, root))
            if over.cause is Cause.NODE_LOSS:
                over.cause, over.root, over.nodes = Cause.STORE, root, ()
        self.seconds[over.cause] += over.booked_s
        self.ended.append(over.end(ts, resumed=resumed, followed_by=followed_by))

    def _pass_to(self, phase: Phase, ts: float) -> None:
        """Book the time since the last change of phase, and go on in `phase`."""
        ts = max(ts, self._since_ts)
        span_s = ts - self._since_ts
        match self._phase:
            case Phase.TRAINING:
                self.stretches[-1].ended_ts = ts
            case Phase.CLOSED:
                self.seconds[Cause.IDLE] += span_s
            case Phase.FORMING if self._open is None:
                self.seconds[Cause.WAITING] += span_s
            case _ if self._open is None:
                self.seconds[Cause.START] += span_s
            case _:
                assert self._open is not None
                self._open.booked_s += span_s
        self._phase, self._since_ts = phase, ts

    def close(self, ended_ts: float) -> None:
        """Book the rest, up to the last event."""
        self._pass_to(Phase.CLOSED, ended_ts)
        if self._open is not None:
            self._end(self._open, ended_ts)


# Found so many leases after the last renewal, at most: it is renewed four times in its length; on a bucket three times,
# and looked at as often. A round waits for a node that is silent from its beginning on.
_LONGER_SILENT = 1.7
_OF_ROUND = {
    EventName.ROUND_BROKEN,
    EventName.HANG_DETECTED,
    EventName.WORKER_FAILED,
    EventName.WORKERS_YIELDED,
    EventName.WORKERS_STOPPED,
}
