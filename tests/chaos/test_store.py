"""etcd dies, freezes, or loses its leader, while no node is lost."""

from __future__ import annotations

import os
import signal
import time

import pytest

from launcher.reports.goodput import Cause
from tests import sample
from tests.chaos.conftest import Starter
from tests.chaos.job import BUSY_S, Job
from tests.cluster import Node, until

pytestmark = pytest.mark.slow

ALL = "last_call=60,join_cooldown=1"
CONF = f"{ALL},lease_ttl=15"
"""Leases that ride out an election, and an etcd that starts on a busy machine."""
AWAY_S = float(os.environ.get("CHAOS_AWAY_S", "10"))
"""For how long a whole etcd is away: longer than a lease of 6 s stands without a renewal, wherever in it that began."""


def three(job: Job, conf: str = CONF) -> tuple[Node, Node, Node]:
    """Nodes a, b and c that work together."""
    a, b, c = job.nodes("a", "b", "c", nnodes="3:3", conf=conf)
    assert job.steps(3) == 1
    return a, b, c


def members_known(*nodes: Node) -> None:
    """Each has asked who etcd's members are, which it does as it connects."""
    for node in nodes:
        until(f"{node.name} knows etcd's members", lambda node=node: "members are known" in node.output)


def more(job: Job, num: int = 20) -> None:
    """The three go on for so many steps, in whatever generation."""
    last = job.history().done()[-1]
    try:
        until(f"step {last + num}", lambda: job.history().done()[-1] >= last + num)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{job.told()}") from None


# tests/launcher/test_etcd.py has a killed one, and below all members are killed
@pytest.mark.parametrize("fault", [sample.rest("killed"), "frozen"])
def test_the_leader_of_the_etcd_cluster_is_lost(start_job: Starter, fault: str) -> None:
    """The other two members elect one of themselves. A dead leader ends no lease: training goes on. Of a silent one
    nobody can tell: workers may yield, at a step boundary, and go on; no step is done twice.
    """
    job = start_job(3)
    nodes = three(job)
    members_known(*nodes)
    leader = job.store.members[job.store.leader()]
    leader.kill() if fault == "killed" else leader.signal(signal.SIGSTOP)
    more(job, 150)
    leader.start() if fault == "killed" else leader.signal(signal.SIGCONT)
    more(job, 20)
    job.finish(*nodes, redone=0)
    if fault == "killed":
        assert job.history().generations() == [1], job.told()
    only_the_store(job)


@pytest.mark.parametrize("fault", [sample.rest("killed"), "frozen"])
def test_all_of_etcd_is_away_for_a_second(job: Job, fault: str) -> None:
    """The leases stand: training does not stop."""
    nodes = three(job)
    away(job, fault, 1)
    more(job)
    job.finish(*nodes, redone=0)
    assert job.history().generations() == [1], job.told()
    assert not job.account().interruptions, job.told()


def test_all_of_etcd_is_away_for_longer_than_a_lease(start_job: Starter) -> None:
    """Killed and started again in one job, frozen in another. Dead members end no lease, and nodes see that they are
    dead: training goes on. Of frozen ones nobody can tell: it resumes by itself, with no step lost.
    """
    jobs = {fault: start_job(folder=fault) for fault in ("killed", "frozen")}
    nodes = {fault: three(job, f"{ALL},lease_ttl=6") for fault, job in jobs.items()}  # renewed, and missed, soon
    members_known(*nodes["killed"])
    since_s = time.monotonic()
    for fault, job in jobs.items():
        leave(job, fault)
    time.sleep(AWAY_S)
    away_s = {}
    for fault, job in jobs.items():
        come_back(job, fault)
        away_s[fault] = time.monotonic() - since_s
    for fault, job in jobs.items():
        more(job)
        job.finish(*nodes[fault])
        told = job.account()
        (outage,) = told.outages
        assert outage.ended_ts is not None
        assert outage.ended_ts - outage.began_ts == pytest.approx(away_s[fault], rel=0.1, abs=3.0), job.told(outage)
        assert {node[0] for node in outage.nodes} == set("abc")
    assert jobs["killed"].history().generations() == [1], jobs["killed"].told()
    assert not jobs["killed"].account().interruptions
    assert all(e["leases_stand"] for e in jobs["killed"].events("store_unreachable"))
    assert jobs["frozen"].events("workers_yielded"), jobs["frozen"].told()
    only_the_store(jobs["frozen"])
    ended_s, began_s = jobs["frozen"].history().pause(1)
    assert jobs["frozen"].account().seconds[Cause.STORE] == pytest.approx(began_s - ended_s, rel=0.1, abs=BUSY_S)


def only_the_store(job: Job) -> None:
    """Nothing that happened is said to be anything else, and what is said to have taken time did."""
    for told in job.account().interruptions:
        assert (told.cause, told.nodes) == (Cause.STORE, ()), job.told(told)
        assert "drain" not in told.root
        job.told_as(Cause.STORE, generation=told.generation)


def away(job: Job, fault: str, seconds: float) -> None:
    """All members are gone or stand still for so long."""
    leave(job, fault)
    time.sleep(seconds)
    come_back(job, fault)


def leave(job: Job, fault: str) -> None:
    job.store.stop() if fault == "killed" else job.store.signal(signal.SIGSTOP)


def come_back(job: Job, fault: str) -> None:
    job.store.start() if fault == "killed" else job.store.signal(signal.SIGCONT)
