"""Every generation's workers meet at a store of their own, and a node that cannot reach or host it stays out."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from launcher.elastic.rendezvous import MemberRendezvous, stay_out_s
from launcher.health.liveness import connect
from launcher.rounds.records import Status
from tests.cluster import until
from tests.launcher.members import WAIT_S, Job


def test_every_generation_has_a_worker_store_of_its_own(job: Job) -> None:
    handlers = two(job)
    first = meet(handlers)
    assert {info.rank for info in first.values()} == {0, 1}
    first["a"].store.set("who", "first generation")
    assert first["b"].store.get("who") == b"first generation"
    assert handlers["a"].num_nodes_waiting() == 0

    job.members["a"].announce(Status.READY, reason="stopped")
    until("b hears of it", lambda: handlers["b"].num_nodes_waiting() == 1, WAIT_S)
    second = meet(handlers)
    assert not second["b"].store.check(["who"])
    assert second["a"].bootstrap_store_info != first["a"].bootstrap_store_info
    assert second["a"].bootstrap_store_info == second["b"].bootstrap_store_info


def two(job: Job) -> dict[str, MemberRendezvous]:
    """The handlers of two nodes, which are in the job already."""
    job.start_led("a", "b")
    return {
        name: MemberRendezvous(member, backend="memory", run_id="test", address="127.0.0.1", timeout_s=WAIT_S)
        for name, member in job.members.items()
    }


def meet(handlers: dict[str, MemberRendezvous]) -> dict[str, Any]:
    """Every handler's next rendezvous, each in a thread as on a node of its own."""
    found: dict[str, Any] = {}

    def one(name: str) -> None:
        found[name] = handlers[name].next_rendezvous()

    threads = [threading.Thread(target=one, args=(name,)) for name in handlers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert set(found) == set(handlers)
    return found


def test_a_node_that_cannot_reach_the_worker_store_stays_out_and_says_why(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = two(job)
    stays_out_s: list[float] = []

    def stay_out(num_failures: int) -> float:
        stays_out_s.append(stay_out_s(num_failures))
        return 0.3

    def unreachable(address: str, port: int, timeout_s: float) -> Any:
        if len(stays_out_s) < 2:
            raise TimeoutError("timed out")
        return connect(address, port, timeout_s)

    monkeypatch.setattr("launcher.elastic.rendezvous.stay_out_s", stay_out)
    monkeypatch.setattr("launcher.elastic.rendezvous.connect", unreachable)
    done = threading.Event()
    other = threading.Thread(target=live, args=(handlers["a"], done), daemon=True)
    other.start()
    handlers["b"].next_rendezvous()
    done.set()
    other.join(WAIT_S)
    assert stays_out_s == [5.0, 10.0]
    excluded = [fields for name, fields in job.told.events if name == "workers_store_unreachable"]
    assert len(excluded) == 2
    assert "cannot reach the workers' store at 127.0.0.1:" in excluded[0]["reason"]
    reasons = [fields["reason"] for name, fields in job.told.events if name == "round_formed"]
    assert any("cannot reach the workers' store" in reason for reason in reasons)


def test_a_node_that_cannot_host_the_worker_store_stays_out_and_says_why(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = job.start("a")
    handler = MemberRendezvous(member, backend="memory", run_id="test", address="192.0.2.1", timeout_s=WAIT_S)
    stays_out_s: list[float] = []

    def stay_out(num_failures: int) -> float:
        stays_out_s.append(stay_out_s(num_failures))
        if num_failures == 2:
            handler._address = "127.0.0.1"
        return 0.1

    monkeypatch.setattr("launcher.elastic.rendezvous.stay_out_s", stay_out)
    meets = threading.Thread(target=handler.next_rendezvous, daemon=True)
    meets.start()
    try:
        until("it stays out twice", lambda: stays_out_s[1:], WAIT_S)
    finally:
        handler._address = "127.0.0.1"
        meets.join(WAIT_S)
    assert not meets.is_alive()
    assert stays_out_s == [5.0, 10.0]
    told = [fields["reason"] for name, fields in job.told.events if name == "workers_store_unreachable"]
    assert told[0].startswith("cannot host the workers' store at 192.0.2.1: ")


def live(handler: MemberRendezvous, done: threading.Event) -> None:
    """As an agent: round after round."""
    while not done.is_set():
        handler.next_rendezvous()
        while not handler.num_nodes_waiting() and not done.is_set():
            handler._member.wait(0.05)


def test_a_node_stays_out_longer_each_time() -> None:
    assert [stay_out_s(n) for n in (1, 2, 3, 7, 500)] == [5.0, 10.0, 20.0, 300.0, 300.0]
