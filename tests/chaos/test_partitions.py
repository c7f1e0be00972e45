"""Nodes that cannot reach etcd, their peers, or either, in both directions or in one; packets are dropped silently.

A node that is cut off from etcd must have ended its workers before anybody can see its lease end, and the history
shows it: no worker of an older generation is alive once a newer one works.
"""

from __future__ import annotations

import pytest

from launcher.reports.goodput import Cause
from tests import sample
from tests.chaos.job import ENDS_SOON, Job
from tests.chaos.network import Network
from tests.cluster import Node

pytestmark = [pytest.mark.slow, pytest.mark.cuts]

ALL = f"last_call=60,join_cooldown=1,{ENDS_SOON}"


def three(job: Job, conf: str = ALL) -> tuple[Node, Node, Node]:
    """Nodes a, b and c that work together; a is the oldest, leads, and has rank 0."""
    a, b, c = job.nodes("a", "b", "c", nnodes="2:3", conf=conf)
    assert job.steps(3) == 1
    return a, b, c


def healed(job: Job, nodes: tuple[Node, ...]) -> int:
    """All went on without the cut node, and with it once the network is whole; the generation without it."""
    alone = job.steps(2, after=1)
    network_of(job).heal()
    job.steps(3, after=alone)
    job.finish(*nodes)
    return alone


def network_of(job: Job) -> Network:
    assert isinstance(job.network, Network)
    return job.network


@pytest.mark.on_secure
def test_a_node_cut_from_etcd(job: Job) -> None:
    """It stops its workers, the others go on without it; healed, it joins again."""
    nodes = three(job)
    network_of(job).cut(job.hosts["b"], *job.store.hosts)
    alone = healed(job, nodes)
    job.told_as(Cause.NODE_LOSS, "b")
    job.told_as(Cause.JOIN, "b", generation=alone)


def test_the_leaders_node_cut_from_etcd(job: Job) -> None:
    """The same for the node that leads and has rank 0: another one leads."""
    nodes = three(job)
    network_of(job).cut(job.hosts["a"], *job.store.hosts)
    alone = job.steps(2, after=1)
    (formed,) = job.events("round_formed", generation=alone)
    assert formed["node"][0] != "a"
    network_of(job).heal()
    job.steps(3, after=alone)
    job.finish(*nodes)
    job.told_as(Cause.NODE_LOSS, "a")


@pytest.mark.whole  # the next test has the same cut, the first one its end
def test_a_node_cut_from_etcd_and_its_peers(job: Job) -> None:
    """As a node whose network is gone: the same."""
    nodes = three(job)
    network_of(job).cut(job.hosts["b"], *job.store.hosts, job.hosts["a"], job.hosts["c"])
    healed(job, nodes)
    job.told_as(Cause.NODE_LOSS, "b")


def test_a_host_that_vanishes(job: Job) -> None:
    """Its power goes: no connection is closed, only the lease tells."""
    a, b, c = three(job)
    network_of(job).cut(job.hosts["b"], *job.store.hosts, job.hosts["a"], job.hosts["c"])
    b.kill()
    job.steps(2, after=1)
    job.finish(a, c)
    job.told_as(Cause.NODE_LOSS, "b")


# what etcd sees of a node that it does not hear is what it sees of one that is cut off both ways
@pytest.mark.parametrize("way", [sample.rest("to etcd"), "from etcd"])
def test_a_node_cut_from_etcd_one_way(job: Job, way: str) -> None:
    """What it sends does not arrive, or it is not answered: either way it cannot know that its lease stands."""
    nodes = three(job)
    node, etcd = job.hosts["b"], job.store.hosts[0]
    sender, receiver = (node, etcd) if way == "to etcd" else (etcd, node)
    network_of(job).cut_way(sender, receiver)
    healed(job, nodes)
    job.told_as(Cause.NODE_LOSS, "b")


@pytest.mark.parametrize("one_way", [sample.rest(False, id="both ways"), pytest.param(True, id="one way")])
def test_a_node_cut_from_its_peers(job: Job, one_way: bool) -> None:
    """etcd hears of all three, and their collective stands still: the two that reach one another go on undisturbed."""
    nodes = three(job, f"{ALL},lease_ttl=5")
    cut = network_of(job).cut_way if one_way else network_of(job).cut
    cut(job.hosts["b"], job.hosts["a"], job.hosts["c"])
    alone = job.steps(2, num=40, after=1)
    assert len(job.events("round_formed")) <= 3, job.told()
    network_of(job).heal()
    job.steps(3, after=alone)
    job.finish(*nodes)
    job.told_as(Cause.NODE_LOSS, "b")
