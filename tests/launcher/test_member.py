"""Members of one store in one process: rounds form, break and form again; a fenced node stops and comes back."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from launcher.coordination.member import Member
from launcher.elastic.rendezvous import MemberRendezvous
from launcher.errors import JobClosed, KVUnavailable
from launcher.health.liveness import LivenessListener
from launcher.kv.embedded.client import EmbeddedKV
from launcher.kv.embedded.server import EmbeddedServer
from launcher.node.board import NODES, run_prefix
from launcher.node.registration import FENCE_FRACTION
from launcher.rounds import membership
from launcher.rounds.failures import FailureClass
from launcher.rounds.membership import Rules
from launcher.rounds.policy import Limits, readmit
from launcher.rounds.records import SUCCEEDED, Failure, Node, Round, Status
from tests.cluster import free_port, until
from tests.launcher.members import LEASE_TTL_S, WAIT_S, Job, Told, broken


def test_nodes_that_come_together_form_one_round(job: Job) -> None:
    job.start_led("a", "b", "c")
    formed = job.join("a", "b", "c")
    assert formed.generation == 1
    assert [p.node_id for p in formed.participants] == ["a", "b", "c"]


def test_a_node_joins_no_round_while_the_store_is_silent_to_it(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers would be asked to yield as soon as they run."""
    member = job.start("a")
    until("a round", member.round, WAIT_S)
    monkeypatch.setattr(member._engine.own, "store_silent", lambda now_s: True)
    with pytest.raises(TimeoutError):
        member.wait_round(0.3)
    monkeypatch.undo()
    assert member.wait_round(WAIT_S).generation == 1


def test_a_silent_node_is_lost_with_its_lease(job: Job) -> None:
    job.start_led("a", "b", "c")
    job.join("a", "b", "c")
    lease = job.members["b"].lease()
    assert lease is not None
    lease.stop()
    job.hub.revoke(lease.lease_id)  # as the store does once nobody has renewed it
    assert broken(job.members["a"], 1) == "node b lost: its lease ended"
    assert broken(job.members["c"], 1)
    job.stop_workers("a", "c")
    assert [p.node_id for p in job.join("a", "c").participants] == ["a", "c"]


def test_the_loss_of_the_leader_is_no_special_case(job: Job) -> None:
    job.start_led("a", "b", "c")
    job.join("a", "b", "c")
    job.members["a"].leave()
    assert broken(job.members["b"], 1) == "node a left at once"
    assert broken(job.members["c"], 1) == "node a left at once"
    job.stop_workers("b", "c")
    assert job.join("b", "c").generation == 2


def test_an_evicted_node_must_stop_and_comes_back_as_the_youngest(job: Job) -> None:
    job.start_led("a", "b")
    job.join("a", "b")
    job.members["b"].evict("a", "connection refused")
    until("a knows", job.members["a"].fenced, WAIT_S)
    assert broken(job.members["a"], 1)
    job.stop_workers("a", "b")
    seniority = until("a is back", lambda: seniorities(job), WAIT_S)
    assert seniority["a"] > seniority["b"]


def seniorities(job: Job) -> dict[str, int]:
    found = {node.node_id: node.seniority for node in job.nodes().values()}
    return found if {"a", "b"} <= set(found) and not job.members["a"].fenced() else {}


def test_a_node_cut_off_from_the_store_fences_itself_before_its_lease_can_end(job: Job) -> None:
    member = job.start("a")
    job.join("a")
    lease = member.lease()
    assert lease is not None
    lease._renew = cut_off
    job.clients["a"].cut = True
    assert not member.fenced()
    lease._deadline_s = time.monotonic() + FENCE_FRACTION * LEASE_TTL_S - 0.5  # as if it were cut off for long
    until("fenced", member.fenced, WAIT_S)
    assert not lease.lost.is_set(), "the lease still stood when the node knew"
    assert broken(member, 1) == "this node's lease ended"
    job.clients["a"].cut = False
    job.stop_workers("a")
    assert job.join("a").generation == 2


def cut_off() -> bool:
    raise KVUnavailable("cut off")


def test_a_short_cut_is_ridden_out(job: Job) -> None:
    member = job.start("a")
    job.join("a")
    job.clients["a"].cut = True
    member.announce(Status.RUNNING, reason="while the store is away")
    job.clients["a"].cut = False
    until("the record is written later", lambda: job.nodes()["a"].reason == "while the store is away", WAIT_S)
    assert member.broken(1) is None


def test_joiners_are_taken_in_together(job: Job) -> None:
    job.rules = dataclasses.replace(job.rules, join_settle_s=600.0)
    job.start("a")
    job.join("a")
    job.start("b")
    job.start("c")
    until("a knows of both", lambda: {"b", "c"} <= set(job.members["a"]._engine.board.nodes), WAIT_S)
    job.from_now_on(join_settle_s=0.0)
    reason = until("asked to stop", lambda: job.members["a"].stop_requested(1), WAIT_S)
    assert reason == "join: b, c"
    job.stop_workers("a")
    assert job.join("a", "b", "c").reason == "join: b, c"


def test_a_finished_job_closes_for_all(job: Job) -> None:
    job.start_led("a", "b")
    job.join("a", "b")
    for name in "ab":
        job.members[name].announce(Status.DONE)
    until("success", lambda: job.members["b"].outcome() == SUCCEEDED, WAIT_S)
    late = job.start("c")
    with pytest.raises(JobClosed, match="succeeded"):
        late.wait_round(WAIT_S)


def test_a_failure_beyond_the_budget_closes_for_all(job: Job) -> None:
    job.start_led("a", "b")
    job.join("a", "b")
    failure = Failure(rank=0, exit_code=1, message="ValueError: no", ts=1.0)
    job.members["a"].announce(Status.READY, reason="worker failed", failure=failure)
    assert broken(job.members["b"], 1) == "node a worker failed"
    job.stop_workers("b")
    for name in "ab":
        with pytest.raises(JobClosed, match="exit code 1: ValueError: no; restarts used: 0 of 0"):
            job.members[name].wait_round(WAIT_S)
    job.has_told("finished")


@pytest.mark.parametrize("leader", ["a", "b"])
def test_a_node_that_does_not_stop_its_workers_is_left_out(job: Job, leader: str) -> None:
    job.start_led(*sorted("ab", key=lambda name: name != leader))
    job.join("a", "b")
    job.from_now_on(stop_timeout_s=0.5)
    job.stop_workers("a")  # b goes on as if it had heard nothing
    formed = job.members["a"].wait_round(WAIT_S)
    assert [p.node_id for p in formed.participants] == ["a"]
    assert "did not stop its workers within 0.5 s" in formed.reason


def test_a_node_that_is_evicted_when_all_others_have_stopped_must_stop_at_once(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next round is formed at once, and nobody is left to be told who was lost."""
    monkeypatch.setattr("launcher.node.registration.CHECK_PERIOD_S", 1000.0)
    job.start_led("a", "b")
    job.join("a", "b")
    job.from_now_on(stop_timeout_s=0.5)
    job.stop_workers("a")
    job.members["a"].wait_round(WAIT_S)
    until("b must kill its workers", job.members["b"].fenced, WAIT_S)
    job.stop_workers("b")
    until("b is back", lambda: "b" in job.nodes(), WAIT_S)


def test_a_leader_that_does_not_stop_its_workers_gives_up_the_lead(job: Job) -> None:
    job.start_led("a", "b")
    job.join("a", "b")
    job.from_now_on(stop_timeout_s=0.5)
    lease = job.members["a"].lease()
    assert lease is not None
    job.stop_workers("b")  # a leads; its workers cannot be killed, and its lease is renewed for as long as it lives
    assert [p.node_id for p in job.members["b"].wait_round(WAIT_S).participants] == ["b"]
    assert not lease.lost.is_set()


def test_a_node_that_stays_out_stays_out_though_its_lease_ends(job: Job) -> None:
    job.start_led("a", "b")
    job.join("a", "b")
    until("a leads", lambda: job.members["a"]._engine.leader, WAIT_S)
    waits = threading.Thread(target=job.members["b"].stay_out, args=("cannot reach the store", WAIT_S), daemon=True)
    waits.start()
    until("b says so", lambda: job.nodes()["b"].status is Status.EXCLUDED, WAIT_S)
    before = job.nodes()["b"].seniority
    job.members["a"].evict("b", "connection refused")
    until("b is back", lambda: "b" in job.nodes() and job.nodes()["b"].seniority > before, WAIT_S)
    assert job.nodes()["b"].status is Status.EXCLUDED
    job.members["b"].drain("enough")
    waits.join(WAIT_S)
    assert not waits.is_alive()


def test_a_spare_waits_beyond_the_time_a_node_waits_for_a_round(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.rules = dataclasses.replace(job.rules, max_nodes=1)
    job.start("a")
    job.join("a")
    spare = job.start("b")
    handler = MemberRendezvous(spare, backend="memory", run_id="test", address="127.0.0.1", timeout_s=0.1)
    until("b knows that it is a spare", spare.is_spare, WAIT_S)
    found, asked_s, wait_round = list[Any](), list[float](), spare.wait_round

    def asked(timeout_s: float) -> Round:
        asked_s.append(timeout_s)
        return wait_round(timeout_s)

    monkeypatch.setattr(spare, "wait_round", asked)
    thread = threading.Thread(target=lambda: found.append(handler.next_rendezvous()))
    thread.start()
    until("five times the time-out", lambda: len(asked_s) > 5, WAIT_S)
    handler._timeout_s = WAIT_S  # of the round in its place, which is to come
    until("it waits for that", lambda: asked_s[-1] == WAIT_S, WAIT_S)
    assert thread.is_alive()
    job.members["a"].leave()
    thread.join(WAIT_S)
    assert found


def test_an_unexpected_answer_of_the_store_does_not_end_a_members_threads(job: Job) -> None:
    member = job.start("a")
    job.join("a")
    client = job.clients["a"]
    client.broken = True
    member.announce(Status.RUNNING, reason="while the store talks nonsense")
    until("the nonsense was heard", lambda: client.num_refused > 3, WAIT_S)
    client.broken = False
    until("written", lambda: job.nodes()["a"].reason == "while the store talks nonsense", WAIT_S)
    job.start("b")
    assert until("heard of b", lambda: member.stop_requested(1), WAIT_S) == "join: b"


def test_a_store_that_is_lost_and_hosted_anew_is_joined_anew(renewed_often: None) -> None:
    port = free_port()
    server = EmbeddedServer("127.0.0.1", port, token="t", node_id="host-1")
    server.start()
    bell, told = LivenessListener("127.0.0.1"), Told()
    bell.start()
    node = Node(node_id="a", host="a", address="127.0.0.1", port=bell.port, slots=1)
    kv = EmbeddedKV("127.0.0.1", port, token="t")
    rules, planner = Rules(last_call_s=0.1), lambda slots, previous: None
    member = Member(kv, "test", node, rules, planner, told, lease_ttl_s=LEASE_TTL_S)
    try:
        member.start()
        member.join(member.wait_round(WAIT_S).generation, WAIT_S)
        lease = member.lease()
        assert lease is not None
        server.close()
        until("it is known to refuse", lambda: lease.silence and lease.silence.refused, WAIT_S)
        lease._deadline_s = time.monotonic() + FENCE_FRACTION * LEASE_TTL_S - 0.5  # as if it were away for long
        until("fenced", member.fenced, WAIT_S)
        until("told", lambda: "store_host_lost" in told.names(), WAIT_S)
        member.announce(Status.READY, reason="stopped")
        with pytest.raises(
            TimeoutError, match=r"node host-1, which hosted the store, is gone .*: the job goes on once"
        ):
            member.wait_round(0.05)
        server = EmbeddedServer("127.0.0.1", port, token="t")
        server.start()
        assert member.wait_round(WAIT_S).generation == 2, "counts on, though the new store knows nothing"
        assert not member.fenced()
        assert "node host-1" not in member._engine.why
        ((_, fields),) = [event for event in told.events if event[0] == "store_host_lost"]
        assert (fields["node_lost"], fields["refused"]) == ("host-1", True)
    finally:
        member.leave()
        kv.close()
        server.close()
        bell.close()


def test_a_node_that_is_left_out_says_so_until_it_is_called_back(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is out for as long as somebody here needs to look at it, and then as if that time had been over."""
    is_over = threading.Event()
    monkeypatch.setattr(membership, "readmit", lambda told, s, *n: readmit(told, 1e6 if is_over.is_set() else s, *n))
    limits = Limits(strikes=1, exclusion_s=600.0)
    job.rules = dataclasses.replace(job.rules, max_restarts=None, limits=limits, join_cooldown_s=0.0)
    job.start_led("a", "b")
    job.join("a", "b")
    broken = Failure(rank=1, exit_code=1, message="ECC", ts=1.0, kind=FailureClass.DEVICE)
    job.members["b"].announce(Status.READY, reason="worker failed", failure=broken)
    until("a hears of it", lambda: job.members["a"].broken(1), WAIT_S)
    job.stop_workers("a")
    with ThreadPoolExecutor(2) as pool:
        waits = pool.submit(job.members["b"].wait_round, WAIT_S)
        assert [p.node_id for p in job._join("a").participants] == ["a"]
        until("b says so", lambda: job.nodes()["b"].status is Status.EXCLUDED, WAIT_S)
        assert job.nodes()["b"].reason == "excluded: 1 times within 600 s: device: ECC"
        is_over.set()
        until("it is ready again", lambda: job.nodes()["b"].status is Status.READY, WAIT_S)
        until("it is wanted", lambda: job.members["a"].stop_requested(2), WAIT_S)
        job.stop_workers("a")
        assert waits.result().generation == 3
    job.has_told("node_excluded", "node_readmitted")


def test_a_record_deleted_by_hand_is_missed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.node.registration.CHECK_PERIOD_S", 0.2)
    member = job.start("a")
    job.join("a")
    job.start("b")
    job.hub.delete(f"{run_prefix('test')}{NODES}b", None)
    until("b is back", lambda: "b" in job.nodes(), WAIT_S)
    assert member.broken(1) is None


def test_a_step_that_fails_does_not_end_a_members_threads(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    member = job.start("a")
    job.join("a")
    monkeypatch.setattr(member._engine.board, "apply", lambda changes: 1 // 0)
    job.start("b")
    until("it has failed", lambda: member._engine._following > 2, WAIT_S)
    monkeypatch.undo()
    assert until("heard of b", lambda: member.stop_requested(1), WAIT_S) == "join: b"


def test_an_event_that_cannot_be_told_does_not_end_a_members_threads(job: Job) -> None:
    told = job.told

    def refuse(event: str, /, **fields: object) -> None:
        told(event, **fields)
        raise ValueError("not JSON")

    job.told = refuse  # type: ignore[assignment]
    job.start("a")
    job.members["a"].drain("maintenance")
    until("its record is written", lambda: job.nodes()["a"].draining, WAIT_S)
    assert "node_joined" in told.names()


def test_events_are_told_in_the_order_in_which_they_were_found(job: Job) -> None:
    """Whichever threads tell them, and however long one takes: a report reads them by their times."""
    told: list[str] = []
    found_another = threading.Event()

    def slow(event: str, /, **fields: object) -> None:
        if event == "node_joined":
            assert found_another.wait(WAIT_S)
        told.append(str(event))

    job.told = slow  # type: ignore[assignment]
    job.start("a")
    job.members["a"].evict("b", "its agent is gone")
    found_another.set()
    job.members.pop("a").leave()
    assert told[:2] == ["node_joined", "peer_lost"]
