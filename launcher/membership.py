"""Who is in the job: a pure state machine over node records and the current round.

Every node keeps a `Node` record under a lease. The oldest live node leads; only the leader's `decide` answers with
anything but `Wait`. The current `Round` is one record, replaced by compare-and-swap, so two nodes that both believe
to lead cannot both succeed. A round's life::

    proposed ──► running ──► broken ──────────────────────────► the next round is proposed
                    │           ▲
                    │           ├── a participant is gone (lease ended, left, evicted), or
                    │           └── one stopped its workers (failure, or they yielded at a step boundary)
                    ├── `stop` set: the leader wants another round; workers yield at a step boundary
                    └── `outcome` set: the job is over

A record's `generation` is the last one it joined. That makes the states of a participant unambiguous: an older
generation means that it has not yet seen the round, the round's own with status READY means that it has left it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.forming import Formation, Planner, form
from launcher.mesh import MeshPlan
from launcher.records import SUCCEEDED, Node, Round, Status, describe


@dataclass(frozen=True)
class Rules:
    """What the user asked for. Times in seconds."""

    min_nodes: int = 1
    max_nodes: int = 1
    last_call_s: float = 2.0
    join_cooldown_s: float = 5.0
    join_settle_s: float = 0.5
    max_restarts: int = 0
    quorum_timeout_s: float = 600.0
    stop_timeout_s: float = 60.0


@dataclass(frozen=True)
class View:
    """What one node knows. Times are its own monotonic clock's.

    `nodes_changed_s`: when the set of records last changed; `broken_s`: when the round was first seen broken (or
    this node began to wait for the first one); `formed_s`: when the round was first seen; `departed`: node -> how it
    went ("lost: ...", "left: ...").
    """

    me: str
    nodes: tuple[Node, ...]
    round: Round | None
    nodes_changed_s: float
    formed_s: float
    broken_s: float
    lineage: str
    departed: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def _by_id(self) -> dict[str, Node]:
        return {n.node_id: n for n in self.nodes}

    def node(self, node_id: str) -> Node | None:
        """The live record of a node."""
        return self._by_id.get(node_id)

    @property
    def leader(self) -> Node | None:
        """The oldest live node."""
        return min(self.nodes, key=lambda n: n.seniority, default=None)


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


@dataclass(frozen=True)
class Breakage:
    """Why a round cannot go on. `graceful`: every node that stopped did so at the step boundary it was asked to."""

    reason: str
    graceful: bool


def breakage(view: View) -> Breakage | None:
    """Why the current round cannot go on, or None while it can."""
    if view.round is None:
        return None
    gone = [(p.node_id, how) for p in view.round.participants if (how := _how_gone(view, view.round, p.node_id))]
    if not gone:
        return None
    members = [n for p in view.round.participants if (n := view.node(p.node_id))]
    failed = any(n.failure and n.generation == view.round.generation for n in members)
    lost = any(how.startswith("lost") for _, how in gone)
    reason = "; ".join(f"node {node_id} {how}" for node_id, how in gone)
    return Breakage(reason, graceful=bool(view.round.stop) and not failed and not lost)


def _how_gone(view: View, current: Round, node_id: str) -> str | None:
    """How a participant left the round, or could not join it; None while it takes part."""
    node = view.node(node_id)
    if node is None:
        return view.departed.get(node_id, "lost")
    if node.generation == current.generation and node.status not in (Status.RUNNING, Status.DONE):
        return node.reason or node.status.value
    if node.generation < current.generation and (node.draining or node.status is Status.EXCLUDED):
        return f"does not join: {node.reason or 'draining'}"
    return None


def decide(view: View, rules: Rules, planner: Planner, now_s: float) -> Action:
    """What this node should do now."""
    leader = view.leader
    if leader is None or leader.node_id != view.me:
        return Wait("another node leads")
    if view.round is None:
        return _first_round(view, rules, planner, now_s)
    if view.round.outcome:
        return Wait(f"the job is over: {view.round.outcome}")
    if breakage(view):
        return _next_round(view, view.round, rules, planner, now_s)
    return _running_round(view, view.round, rules, planner, now_s)


def _candidates(view: View) -> list[Node]:
    return [n for n in view.nodes if n.status is Status.READY and not n.draining]


def _first_round(view: View, rules: Rules, planner: Planner, now_s: float) -> Action:
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
            generation=_next_generation(ready, None),
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
        return Propose(dataclasses.replace(current, outcome=SUCCEEDED))
    if current.stop:
        return Wait(f"workers stop at a step boundary: {current.stop}")
    if late := [n.node_id for n in members if n.generation < current.generation]:
        until_s = view.formed_s + rules.stop_timeout_s
        if now_s >= until_s:
            return Evict(late[0], f"did not join generation {current.generation} within {rules.stop_timeout_s:g} s")
        return Wait(f"{', '.join(late)} still joins", until_s)
    if any(n.status is Status.DONE for n in members):
        return Wait("the job is about to finish")
    if leaving := [n for n in members if n.draining]:
        return Propose(dataclasses.replace(current, stop=f"drain: {', '.join(n.node_id for n in leaving)}"))
    return _perhaps_grow(view, current, members, rules, planner, now_s)


def _perhaps_grow(
    view: View, current: Round, members: list[Node], rules: Rules, planner: Planner, now_s: float
) -> Action:
    joiners = [n for n in _candidates(view) if current.place_of(n.node_id) is None]
    if not joiners:
        return Wait("the round is complete")
    formed = _form([*members, *joiners], _order_of(current), current.mesh, rules, planner)
    if formed is None or formed.world_size <= current.world_size:
        return Wait(f"{len(joiners)} spare: a round with them would not be larger")
    not_before_s = max(view.formed_s + rules.join_cooldown_s, view.nodes_changed_s + rules.join_settle_s)
    if now_s < not_before_s:
        return Wait("joiners wait for the cool-down", not_before_s)
    named = ", ".join(n.node_id for n in joiners)
    return Propose(dataclasses.replace(current, stop=f"join: {named}"))


def _next_round(view: View, current: Round, rules: Rules, planner: Planner, now_s: float) -> Action:
    present = [n for p in current.participants if (n := view.node(p.node_id))]
    failures = [n.failure for n in present if n.failure and n.generation == current.generation]
    gone = [p.node_id for p in current.participants if view.node(p.node_id) is None]
    if failures and not all(f.restartable for f in failures):
        final = min((f for f in failures if not f.restartable), key=lambda f: f.ts)
        return Propose(dataclasses.replace(current, outcome=f"failed: {describe(final)}"))
    busy = [n for n in present if n.status in (Status.RUNNING, Status.STOPPING, Status.DONE)]
    if busy:
        until_s = view.broken_s + rules.stop_timeout_s
        if now_s >= until_s:
            reason = f"did not stop its workers within {rules.stop_timeout_s:g} s"
            return Evict(busy[0].node_id, reason)
        return Wait(f"waiting for {', '.join(n.node_id for n in busy)} to stop", until_s)
    restarts = current.restarts
    if failures and not gone:  # a worker that failed because its peer died is not charged
        first = min(failures, key=lambda f: f.ts)
        if restarts >= rules.max_restarts:
            budget = f"restarts used: {restarts} of {rules.max_restarts}"
            return Propose(dataclasses.replace(current, outcome=f"failed: {describe(first)}; {budget}"))
        restarts += 1
        reason = describe(first)
    elif gone:
        reason = "; ".join(f"node {n} {view.departed.get(n, 'lost')}" for n in gone)
    else:
        broken = breakage(view)
        reason = current.stop or (broken.reason if broken else "a new round")
    ready = _candidates(view)
    if len(ready) < rules.min_nodes:
        return _short(view, rules, len(ready), now_s)
    formed = _form(ready, _order_of(current), current.mesh, rules, planner)
    if formed is None:
        return Wait(f"no mesh for {len(ready)} nodes")
    return Propose(
        Round(
            generation=_next_generation(ready, current),
            lineage=current.lineage,
            participants=formed.participants,
            mesh=formed.mesh,
            spares=formed.spares,
            reason=reason,
            restarts=restarts,
        )
    )


def _next_generation(ready: Sequence[Node], current: Round | None) -> int:
    """Above every generation that anybody joined: a store that was lost and hosted anew knows none of them."""
    return 1 + max([n.generation for n in ready] + ([current.generation] if current else []))


def _short(view: View, rules: Rules, num_ready: int, now_s: float) -> Action:
    until_s = view.broken_s + rules.quorum_timeout_s
    if now_s < until_s:
        return Wait(f"{num_ready} of at least {rules.min_nodes} nodes", until_s)
    outcome = f"failed: {num_ready} of at least {rules.min_nodes} nodes after {rules.quorum_timeout_s:g} s"
    if view.round is None:
        return Propose(Round(0, view.lineage, (), None, (), "no quorum", outcome=outcome))
    return Propose(dataclasses.replace(view.round, outcome=outcome))


def _order_of(current: Round) -> list[str]:
    return [p.node_id for p in current.participants]


def _form(
    ready: Sequence[Node], previous: Sequence[str], mesh: MeshPlan | None, rules: Rules, planner: Planner
) -> Formation | None:
    return form(ready, previous, mesh, planner, min_nodes=rules.min_nodes, max_nodes=rules.max_nodes)
