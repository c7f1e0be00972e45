"""A node's engine: what it does about the lead and about itself. (`tests/sim` takes it through whole lives.)"""

from __future__ import annotations

import pytest

from launcher.node.effects import Decide, Delete, Put, Report, Ring, Task, WatchPeers
from launcher.node.events import (
    Announced,
    Decided,
    Event,
    Joining,
    LeaseSeen,
    LeasesSeen,
    Leaving,
    PeerAlive,
    PeerDead,
    PeerSilent,
    Tick,
)
from launcher.rounds.membership import Evict, Wait, decide
from launcher.rounds.records import Breakage, Node, Participant, Round, Status
from tests.launcher.engines import TTL_S, Driven


@pytest.fixture
def node() -> Driven:
    return Driven().started()


def lead(node: Driven) -> None:
    node.listen()
    node.carry_out(Put)
    node.listen()


def decided(node: Driven) -> None:
    task = node.next(Decide)
    assert isinstance(task, Decide)
    node.feed(Decided(task, decide(task.view, task.rules, lambda slots, mesh: None, node.now_s)))


def put_round(node: Driven, names: str = "abc", **fields: object) -> Round:
    participants = tuple(Participant(name, 1, "127.0.0.1", 1) for name in names)
    current = Round(1, "L", participants, None, (), "", **fields)  # type: ignore[arg-type]
    node.store.put("job/round", current.to_json(), None, None)
    node.listen()
    return current


def test_a_node_that_leads_forms_a_round(node: Driven) -> None:
    lead(node)
    decided(node)
    node.carry_out(Put)
    assert node.reports()[-1] == "round_formed"
    assert node.engine.view.invitation(node.now_s) is not None


@pytest.mark.parametrize(
    ("names", "broken", "stopped"),
    [("a", None, True), ("ab", None, False), ("ab", Breakage("join", graceful=True, all_stopped=True), True)],
    ids=["the only one", "another works", "all have stopped"],
)
def test_whose_workers_need_no_others(names: str, broken: Breakage | None, stopped: bool, node: Driven) -> None:
    """Those of the only node never do: it waits for nobody's word before it ends them."""
    put_round(node, names, broken=broken)
    assert node.engine.view.all_stopped(1) is stopped
    assert node.engine.view.all_stopped(2), "of which it has not heard"


def test_a_claim_that_was_lost_to_another_is_made_again_as_soon_as_that_one_goes(node: Driven) -> None:
    node.listen()
    node.store.put("job/leader", b"b", None, None)
    node.carry_out(Put)
    node.listen()
    assert not node.tasks
    node.store.delete("job/leader")
    node.listen()
    node.carry_out(Put)
    assert node.engine.leader is not None


def test_a_claim_that_was_not_heard_of_is_this_nodes_own(node: Driven) -> None:
    node.listen()
    node.apply(node.give_up(Put))
    node.listen()
    assert node.engine.leader is not None


def test_a_leader_that_finds_its_own_record_gone_decides_nothing_more(node: Driven) -> None:
    """Found by the simulation: it awaited itself, and asked for a decision while it was fenced."""
    put_round(node)
    node.store.delete("nodes/a")
    lead(node)
    decided(node)
    node.pass_time(TTL_S)
    assert not [task for task in node.tasks if isinstance(task, Decide)]
    assert "node_fenced" in node.reports()


def test_a_leader_that_is_fenced_gives_up_the_lead_and_its_decision_is_void(node: Driven) -> None:
    lead(node)
    task = node.next(Decide)
    node.feed(Announced(Status.RUNNING))
    node.feed(LeasesSeen((LeaseSeen(1, TTL_S, lost=True),)))
    node.tasks.clear()
    node.feed(Decided(task, Evict("b", "late")))
    assert not node.tasks
    assert node.engine.leader is None


def test_an_eviction_is_not_carried_out_where_the_node_has_moved_meanwhile(node: Driven) -> None:
    other = Driven(node.store, "b").started()
    lead(node)
    task = node.next(Decide)
    other.feed(Announced(Status.STOPPING))
    other.settle()
    node.listen()
    node.feed(Decided(task, Evict("b", "does not join")))
    assert isinstance(node.tasks[-1], Decide), "it is asked again"
    assert not [task for task in node.tasks if isinstance(task, Delete)]


def test_a_long_decision_is_followed_by_a_rest(node: Driven) -> None:
    lead(node)
    task = node.next(Decide)
    node.feed(Decided(task, Wait("last call", 100.0), took_s=0.05))
    node.listen()
    assert not node.tasks
    assert node.engine.due_s == pytest.approx(0.15)
    node.now_s = 0.2
    node.feed(Tick())
    assert isinstance(node.tasks[-1], Decide)


def test_a_dead_peer_is_evicted_and_its_claim_to_lead_with_it(node: Driven) -> None:
    node.store.put("job/leader", b"b", None, None)
    node.listen()
    node.feed(PeerDead("b", "connection refused"))
    assert [(task.key, task.if_revision) for task in node.tasks if isinstance(task, Delete)] == [
        ("nodes/b", None),
        ("job/leader", 2),
    ]


def test_peers_are_watched_while_workers_run_beside_them(node: Driven) -> None:
    node.store.put("job/leader", b"b", None, None)
    put_round(node)
    node.feed(Joining(1))
    put_round(node, complete=True)
    watched = [effect.peers for effect in node.effects if isinstance(effect, WatchPeers)]
    assert [[peer.node_id for peer in peers] for peers in watched] == [["b", "c"]]
    node.feed(Announced(Status.STOPPING))
    assert WatchPeers(()) in node.effects


def test_whose_workers_are_waited_for_is_asked_whether_it_lives(node: Driven) -> None:
    """A second node that is lost when all have stopped watching one another: its lease may be long."""
    stopped, running = (Node(name, name, "127.0.0.1", 1, 1, status=status, generation=1) for name, status in STATES)
    for peer in (stopped, running):
        node.store.put(f"nodes/{peer.node_id}", peer.to_json(), None, None)
    lead(node)
    put_round(node, complete=True, broken=Breakage("node d lost", graceful=False))
    node.listen()
    node.pass_time(10.0)
    asked = [effect.peers for effect in node.effects if isinstance(effect, Ring)]
    assert {peer.node_id for peers in asked for peer in peers} == {"c"}
    node.feed(PeerDead("c", "connection refused"))
    assert "nodes/c" in [task.key for task in node.tasks if isinstance(task, Delete)]


@pytest.mark.parametrize(("ttl_s", "silent_s"), [(7.0, 7.0), (0.0, TTL_S)], ids=["its own", "of another version"])
def test_of_a_lost_node_is_told_how_long_its_own_lease_was(node: Driven, ttl_s: float, silent_s: float) -> None:
    record = Node("b", "b", "127.0.0.1", 1, 1, lease_ttl_s=ttl_s)
    node.store.put("nodes/b", record.to_json(), None, None)
    lead(node)
    node.store.delete("nodes/b")
    node.listen()
    told = next(effect for effect in node.effects if isinstance(effect, Report) and effect.event == "node_lost")
    assert (told.fields["node_lost"], told.fields["silent_s"]) == ("b", silent_s)
    mine = node.record()
    assert mine is not None
    assert mine.lease_ttl_s == TTL_S


STATES = (("b", Status.READY), ("c", Status.STOPPING))


def test_whom_a_node_cannot_reach_it_tells_until_they_answer(node: Driven) -> None:
    node.store.put("job/leader", b"b", None, None)
    put_round(node)
    node.feed(PeerSilent("b"))
    node.feed(PeerSilent("x"))
    assert node.engine.own.record.cannot_reach == ("b",), "x is no participant"
    node.feed(PeerAlive("b"))
    assert node.engine.own.record.cannot_reach == ()


def test_last_words_are_said_before_the_record_goes(node: Driven) -> None:
    lead(node)
    node.tasks.clear()
    node.feed(Leaving())
    written = []
    while node.tasks:
        task = node.tasks.popleft()
        written.append((type(task).__name__, getattr(task, "key", "")))
        node.feed(node.apply(task))
    assert written == [("Put", "job/leader"), ("Put", "nodes/a"), ("Revoke", "")]
    assert node.engine.has_left


@pytest.mark.parametrize("end", [Leaving(), LeasesSeen((LeaseSeen(1, TTL_S, lost=True),))], ids=["leaving", "fenced"])
def test_what_a_leader_has_written_is_told_though_it_leads_no_more(node: Driven, end: Event) -> None:
    """Its agent may hear by its watch that all is done, and go, before the store's answer has come to the engine."""
    lead(node)
    decided(node)
    node.feed(Announced(Status.RUNNING))
    put = next(task for task in node.tasks if isinstance(task, Put) and task.key == "job/round")
    answer = node.apply(put)
    node.feed(end)
    assert node.engine.leader is None
    node.feed(answer)
    assert node.reports().count("round_formed") == 1
    node.feed(answer)
    assert node.reports().count("round_formed") == 1


def test_a_lead_that_is_stuck_does_not_keep_the_record_from_going(node: Driven) -> None:
    """The last words wait for a planner that takes a minute, say: the others must not have to wait for the lease."""
    lead(node)
    node.tasks.clear()
    node.feed(Leaving())
    assert isinstance(node.next(Put), Put), "which is not carried out"
    assert not node.tasks
    node.pass_time(node.engine.due_s - node.now_s)
    assert node.now_s <= 5.0
    node.settle()
    assert node.record() is None
    assert node.engine.has_left


def test_a_store_that_hangs_keeps_a_leader_from_leaving_only_so_often(node: Driven) -> None:
    lead(node)
    node.tasks.clear()
    node.feed(Leaving())
    for _ in range(2):
        node.give_up(Put)
    assert isinstance(node.tasks[0], Put) and node.tasks[0].key == "nodes/a"
    while node.tasks:
        node.give_up(Task)
    assert node.engine.has_left
