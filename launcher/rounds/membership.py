"""Who is in the job: a pure state machine over node records and the current round.

Every node keeps a `Node` record under a lease. One node leads: it follows all records and decides. The others follow
the current `Round` only, so that what a node hears does not grow with the job. The round is one record, replaced by
compare-and-swap, so two nodes that both believe to lead cannot both succeed. A round's life::

    proposed ──► complete ──► broken ──────────────────────────► the next round is proposed
                    │           ▲
                    │           ├── a participant is gone (lease ended, left, evicted), or
                    │           └── one stopped its workers (failure, or they yielded at a step boundary)
                    ├── `stop` set: the leader wants another round; workers yield at a step boundary
                    └── `outcome` set: the job is over

Workers start once the round is complete: every participant has joined. So the leader never takes a node for one that
waits while its workers run: a node that has joined says when they have stopped.

A record's `generation` is the last one it joined. That makes the states of a participant unambiguous: an older
generation means that it has not yet seen the round, the round's own with status READY means that it has left it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.rounds.exclusion import admit, needed, weigh
from launcher.rounds.formation import Formation, Planner, form
from launcher.rounds.mesh import MeshPlan
from launcher.rounds.partitions import LISTEN_S, left_out
from launcher.rounds.policy import GenerationEnd, Limits, brief, explain, judge, order_causes, readmit
from launcher.rounds.records import (
    HANG,
    LEFT,
    SUCCEEDED,
    Breakage,
    FailedWorker,
    Node,
    Round,
    Status,
    Verdict,
    describe,
    identity_of,
)
from launcher.text import name_some

BUSY = (Status.RUNNING, Status.STOPPING, Status.DONE)
"""What a node says whose workers may run."""


@dataclass(frozen=True)
class Rules:
    """What the user asked for. Times are in seconds."""

    min_nodes: int = 1
    max_nodes: int = 1
    last_call_s: float = 2.0
    join_cooldown_s: float = 5.0
    join_settle_s: float = 0.5
    drain_settle_s: float = 0.5
    max_restarts: int | None = None
    limits: Limits = field(default_factory=Limits)
    quorum_timeout_s: float = 600.0
    stop_timeout_s: float = 60.0


@dataclass(frozen=True)
class View:
    """What the leader knows. Times are its own monotonic clock's.

    `nodes_changed_s`: when the set of records last changed; `broken_s`: when the round was first seen broken (or
    this node began to wait for the first one); `formed_s`: when the round was first seen; `departed`: node -> how it
    went (LEFT, LEFT_AT_ONCE, "lost: ..."); `awaited`: participants that were not there when this node began to lead,
    and that may still come back until `awaited_until_s` (after an outage of the store, say); `leader`: who leads, "" if
    nobody; `drained_s`: when a node was last seen to begin to drain, or the leader before this one to leave; `fell`:
    node -> the store's revision at which it was first seen to tell of a failure; `reported_s`: when a node last
    reported another that it cannot reach.
    """

    nodes: tuple[Node, ...]
    round: Round | None
    nodes_changed_s: float
    formed_s: float
    broken_s: float
    lineage: str
    departed: Mapping[str, str] = field(default_factory=dict)
    awaited: frozenset[str] = frozenset()
    awaited_until_s: float = 0.0
    leader: str = ""
    drained_s: float = -math.inf
    fell: Mapping[str, int] = field(default_factory=dict)
    reported_s: float = -math.inf

    @functools.cached_property
    def _by_id(self) -> dict[str, Node]:
        return {n.node_id: n for n in self.nodes}

    def node(self, node_id: str) -> Node | None:
        """Return the live record of a node, None where it has none."""
        return self._by_id.get(node_id)


@dataclass(frozen=True)
class Wait:
    """Nothing to do before `until_s` (None: before something changes)."""

    why: str
    until_s: float | None = None


@dataclass(frozen=True)
class Propose:
    """Replace the current round by this one if it is still the one that was seen."""

    round: Round


@dataclass(frozen=True)
class Evict:
    """Delete a live node's record: it holds everybody up."""

    node_id: str
    reason: str


Action = Wait | Propose | Evict


def breakage(view: View) -> Breakage | None:
    """Say why the current round cannot go on, or None while it can. What was told once stays: nothing mends a round."""
    current = view.round
    if current is None:
        return None
    gone = [(p.node_id, how) for p in current.participants if (how := _how_gone(view, current, p.node_id))]
    if not gone:
        return current.broken
    told = current.broken
    members = [n for p in current.participants if (n := view.node(p.node_id))]
    failed = any(n.failure and n.generation == current.generation for n in members)
    lost = {node_id for node_id, _ in gone if view.node(node_id) is None} | set(told.lost if told else ())
    return Breakage(
        reason=name_some([f"node {node_id} {how}" for node_id, how in gone], "; "),
        graceful=not failed and all(_has_yielded(view, node_id) for node_id, _ in gone),
        lost=tuple(p.node_id for p in current.participants if p.node_id in lost),
        all_stopped=not any(n.status in (Status.RUNNING, Status.DONE) for n in members),
        hung=bool(told and told.hung)
        or any(n.generation == current.generation and n.reason.startswith(HANG) for n in members),
    )


def _has_yielded(view: View, node_id: str) -> bool:
    """Tell whether a node that is out of the round stopped at a step boundary: then all ranks stop there."""
    node = view.node(node_id)
    return view.departed.get(node_id) == LEFT if node is None else node.yielded


def _how_gone(view: View, current: Round, node_id: str) -> str | None:
    """Say how a participant left the round, or why it could not join; None while it takes part."""
    node = view.node(node_id)
    if node is None:
        return None if node_id in view.awaited else view.departed.get(node_id, "lost")
    if node.generation == current.generation and node.status not in (Status.RUNNING, Status.DONE):
        unreached = f"cannot reach {name_some(node.cannot_reach)}" if node.cannot_reach else ""
        return node.reason or unreached or node.status.value
    if node.generation < current.generation and (node.draining or node.status is Status.EXCLUDED):
        return f"does not join: {node.reason or 'draining'}"
    return None


def decide(view: View, rules: Rules, planner: Planner, now_s: float) -> Action:
    """Decide what the leader does now."""
    current = view.round
    if current is None:
        return _first_round(view, rules, planner, now_s)
    if current.outcome:
        return Wait(f"the job is over: {current.outcome}")
    if (history := readmit(current.history, now_s - view.formed_s)) is not None:
        return Propose(dataclasses.replace(current, history=history))
    broken = breakage(view)
    if broken and _is_news(broken, current.broken) and _busy(view, current):
        return Propose(dataclasses.replace(current, broken=broken))
    if view.awaited:
        return Wait(f"no word yet from {', '.join(sorted(view.awaited))}", view.awaited_until_s)
    cut_off = _cut_off(view, current)
    if cut_off and now_s < view.reported_s + LISTEN_S:
        return Wait("nodes do not reach one another: who else?", view.reported_s + LISTEN_S)
    if cut_off and broken is None:
        reason = f"cut off from its peers: {name_some(cut_off)}"
        return Propose(dataclasses.replace(current, broken=Breakage(reason, graceful=False)))
    if broken is None:
        return _running_round(view, current, rules, planner, now_s)
    return _next_round(view, current, broken, rules, planner, now_s)


def _is_news(broken: Breakage, told: Breakage | None) -> bool:
    """Tell whether nodes whose workers run have to hear more than they were told."""
    if told is None:
        return True
    ends_yielding = told.graceful and not broken.graceful
    all_yielded = broken.graceful and broken.all_stopped and not told.all_stopped
    return ends_yielding or all_yielded or not set(broken.lost) <= set(told.lost)


def _busy(view: View, current: Round) -> list[Node]:
    """Return the participants that have not yet said that their workers are stopped."""
    present = (view.node(p.node_id) for p in current.participants)
    return [n for n in present if n and n.status in BUSY]


def _await_stop(busy: Sequence[Node], since_s: float, rules: Rules, now_s: float) -> Action:
    until_s = since_s + rules.stop_timeout_s
    if now_s >= until_s:
        return Evict(busy[0].node_id, f"did not stop its workers within {rules.stop_timeout_s:g} s")
    return Wait(f"waiting for {', '.join(n.node_id for n in busy)} to stop", until_s)


def _cut_off(view: View, current: Round) -> tuple[str, ...]:
    """Name the participants that must not be in one round with the others, as far as was reported."""
    members = [n for p in current.participants if (n := view.node(p.node_id)) and n.generation == current.generation]
    return left_out(_order_of(current), {n.node_id: n.cannot_reach for n in members})


def _candidates(view: View) -> list[Node]:
    """Return the nodes that a round may be formed of."""
    return [n for n in view.nodes if n.status is Status.READY and not n.draining]


def _first_round(view: View, rules: Rules, planner: Planner, now_s: float) -> Action:
    if busy := [n for n in view.nodes if n.status in BUSY]:  # of a round whose record was deleted
        return _await_stop(busy, view.broken_s, rules, now_s)
    ready = _candidates(view)
    if len(ready) < rules.min_nodes:
        return _short(view, rules, len(ready), now_s)
    quiet_until_s = view.nodes_changed_s + rules.last_call_s
    if len(ready) < rules.max_nodes and now_s < quiet_until_s:
        return Wait("last call", quiet_until_s)
    formed = _form(ready, (), None, rules, planner)
    if formed is None:
        return Wait(f"no mesh for {len(ready)} nodes")
    return Propose(
        Round(
            generation=_next_generation(view),
            lineage=view.lineage,
            participants=formed.participants,
            mesh=formed.mesh,
            spares=formed.spares,
            reason="first round",
        )
    )


def _running_round(view: View, current: Round, rules: Rules, planner: Planner, now_s: float) -> Action:
    members = [n for p in current.participants if (n := view.node(p.node_id))]
    if all(n.status is Status.DONE and n.generation == current.generation for n in members):
        return Propose(dataclasses.replace(current, outcome=SUCCEEDED, verdict=Verdict.SUCCEEDED, causes=()))
    if current.stop:
        return Wait(f"workers stop at a step boundary: {current.stop}")
    if late := [n.node_id for n in members if n.generation < current.generation]:
        until_s = view.formed_s + rules.stop_timeout_s
        if now_s >= until_s:
            return Evict(late[0], f"did not join generation {current.generation} within {rules.stop_timeout_s:g} s")
        return Wait(f"{', '.join(late)} still joins", until_s)
    if not current.complete:
        return Propose(dataclasses.replace(current, complete=True, worker_store=members[0].worker_store))
    if any(n.status is Status.DONE for n in members):
        return Wait("the job is about to finish")
    if leaving := [n for n in members if n.draining]:
        return Propose(dataclasses.replace(current, stop=f"drain: {name_some([n.node_id for n in leaving])}"))
    return _perhaps_grow(view, current, members, rules, planner, now_s)


def _perhaps_grow(
    view: View, current: Round, members: list[Node], rules: Rules, planner: Planner, now_s: float
) -> Action:
    order = _order_of(current)
    standing = [n for n in _candidates(view) if current.history.excluded(identity_of(n.node_id)) is None]
    joiners = [n for n in standing if n.node_id not in order and not set(n.cannot_reach) & set(order)]
    if not joiners:
        return Wait("the round is complete")
    formed = _form([*members, *joiners], order, current.mesh, rules, planner)
    if formed is None or formed.world_size <= current.world_size:
        return Wait(f"{len(joiners)} spare: a round with them would not be larger")
    not_before_s = max(view.formed_s + rules.join_cooldown_s, view.nodes_changed_s + rules.join_settle_s)
    if now_s < not_before_s:
        return Wait("joiners wait for the cool-down", not_before_s)
    return Propose(dataclasses.replace(current, stop=f"join: {name_some([n.node_id for n in joiners])}"))


def _next_round(view: View, current: Round, broken: Breakage, rules: Rules, planner: Planner, now_s: float) -> Action:
    causes = _causes(view, current)
    final = [cause for cause in causes if not cause.failure.restartable]
    if final:  # who says so (stock torchrun) stays until the job is closed
        causes = (*final, *(cause for cause in causes if cause not in final))
        outcome = f"failed: {describe(causes[0].failure)}"
        ended = dataclasses.replace(current, outcome=outcome, verdict=Verdict.BUDGET_USED, causes=causes)
        return Propose(ended)
    # Nothing else is decided before all have stopped: the root cause may be the last to be told.
    if busy := _busy(view, current):
        return _await_stop(busy, view.broken_s, rules, now_s)
    if now_s < view.drained_s + rules.drain_settle_s:  # told to drain one after the other, they leave nobody behind
        return Wait("more nodes may drain", view.drained_s + rules.drain_settle_s)
    elapsed_s = now_s - view.formed_s
    end = GenerationEnd(
        # A hang is found after minutes: a generation that hung from its start has not lived.
        lived_s=0.0 if broken.hung else view.broken_s - view.formed_s,
        restarts=current.restarts,
        max_restarts=rules.max_restarts,
        lost=bool(broken.lost),
        stopping=bool(current.stop),
    )
    judged = judge(current.history.aged(elapsed_s), causes, rules.limits, end)
    if judged.verdict is not None:
        outcome = explain(causes, judged)
        return Propose(dataclasses.replace(current, outcome=outcome, verdict=judged.verdict, causes=causes))
    if broken.lost:
        reason = name_some([f"node {n} {view.departed.get(n, 'lost')}" for n in broken.lost], "; ")
    else:
        told = current.stop or (current.broken or broken).reason  # what came first: others stopped because of it
        reason = describe(causes[0].failure) if causes else told
    if now_s < view.broken_s + judged.delay_s:
        return Wait(f"restarts {judged.delay_s:g} s after: {reason}", view.broken_s + judged.delay_s)
    cut_off = _cut_off(view, current)
    # Who is cut off may not know it, and would be taken in and left out again without end.
    drained = [p.node_id for p in current.participants if (n := view.node(p.node_id)) and n.draining]  # not gone yet
    absent = tuple(dict.fromkeys((*broken.lost, *cut_off, *drained)))
    how = {**dict.fromkeys(drained, LEFT), **dict.fromkeys(cut_off, "cut off from its peers"), **view.departed}
    history, suspects = weigh(judged, causes, absent, how, rules.limits)
    ready = [n for n in _candidates(view) if n.node_id not in cut_off]
    formed, history = admit(
        ready,
        history,
        suspects,
        rules.limits,
        lambda nodes: _form(nodes, _order_of(current), current.mesh, rules, planner),
    )
    if formed is None:
        called_back = readmit(current.history, elapsed_s, needed(view.nodes, current.history))
        if called_back is not None:
            return Propose(dataclasses.replace(current, history=called_back))
        if len(ready) < rules.min_nodes:
            return _short(view, rules, len(ready), now_s)
        return Wait(f"no mesh for {len(ready)} nodes")
    return Propose(
        Round(
            generation=_next_generation(view),
            lineage=current.lineage,
            participants=formed.participants,
            mesh=formed.mesh,
            spares=formed.spares,
            reason=reason,
            restarts=current.restarts + judged.charged,
            causes=brief(causes),
            history=history,
        )
    )


def _causes(view: View, current: Round) -> tuple[FailedWorker, ...]:
    """Return the workers that failed in this round, the root cause first."""
    members = [n for p in current.participants if (n := view.node(p.node_id))]
    return order_causes(
        (view.fell.get(n.node_id, 0), FailedWorker(n.node_id, n.host, n.failure))
        for n in members
        if n.failure and n.generation == current.generation
    )


def _next_generation(view: View) -> int:
    """Return one above every generation that anybody joined: a store that was hosted anew knows none of them."""
    return 1 + max([n.generation for n in view.nodes] + ([view.round.generation] if view.round else []))


def _short(view: View, rules: Rules, num_ready: int, now_s: float) -> Action:
    until_s = view.broken_s + rules.quorum_timeout_s
    if now_s < until_s:
        return Wait(f"{num_ready} of at least {rules.min_nodes} nodes", until_s)
    outcome = f"failed: {num_ready} of at least {rules.min_nodes} nodes after {rules.quorum_timeout_s:g} s"
    if view.round is None:
        ended = Round(0, view.lineage, (), None, (), "no quorum", outcome=outcome, verdict=Verdict.NO_QUORUM)
        return Propose(ended)
    return Propose(dataclasses.replace(view.round, outcome=outcome, verdict=Verdict.NO_QUORUM, causes=()))


def _order_of(current: Round) -> list[str]:
    return [p.node_id for p in current.participants]


def _form(
    ready: Sequence[Node], previous: Sequence[str], mesh: MeshPlan | None, rules: Rules, planner: Planner
) -> Formation | None:
    return form(ready, previous, mesh, planner, min_nodes=rules.min_nodes, max_nodes=rules.max_nodes)
