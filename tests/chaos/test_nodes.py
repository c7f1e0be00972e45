"""Nodes and workers die, freeze, leave and come, at bad moments too.

Of every job the history must show: no step skipped, at most one done again after a loss, and no worker of an older
generation alive once a newer one works (`history.violations`). And `report` must tell what happened (`Job.told_as`):
the cause, the node, and the seconds without a step. What else must hold is said by each test.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from launcher.reports.goodput import Cause
from tests import sample
from tests.chaos.job import BUSY_S, ENDS_SOON, Job, freeze, thaw
from tests.cluster import Node, alive, until

pytestmark = pytest.mark.slow

ALL = "last_call=60,join_cooldown=1"
"""The first round waits for max nodes, so that all are in generation 1; a node that returns is soon taken in."""

START_S = 5.0
"""A stock script tells no steps: to `report` it trains once the last of its workers has started, on a busy machine so
long before its first step at most. Nor does anybody know when in a lease its node froze.
"""


FROZEN = f"{ALL},{ENDS_SOON}"
NUM_JOINERS = 8 if sample.IS_WHOLE else 5


def three(job: Job, conf: str = ALL, **options: tuple[str, ...]) -> tuple[Node, Node, Node]:
    """Nodes a, b and c that work together; a is the oldest, leads, and has rank 0."""
    a, b, c = job.nodes("a", "b", "c", nnodes="2:3", conf=conf, **options)
    assert job.steps(3) == 1
    return a, b, c


@pytest.mark.by_service
def test_a_killed_worker(job: Job) -> None:
    """All restart at full size; the failure is charged to the budget once."""
    nodes = three(job, options=("--max-restarts", "2"))
    os.kill(next(step.pid for step in job.history().steps if step.rank == 1), signal.SIGKILL)
    job.steps(3, after=1)
    (failed,) = job.events("worker_failed", exit_code=-signal.SIGKILL)
    assert failed["rank"] == 1
    assert [r["restarts"] for r in job.events("round_formed")] == [0, 1]
    job.finish(*nodes)
    assert job.told_as(Cause.FAILURE, "b").root.startswith(f"rank 1 on {failed['node']} was killed by SIGKILL")


@pytest.mark.on_folder
@pytest.mark.on_secure
def test_a_killed_node_that_comes_back(job: Job) -> None:
    """The survivors go on; the node is taken in again at a step boundary, with no step done twice for it."""
    a, b, c = three(job)
    b.kill()
    alone = job.steps(2, after=1)
    (back,) = job.nodes("b", nnodes="2:3", conf=ALL)
    together = job.steps(3, after=alone)
    before = together - 1  # `alone`, unless the machine was so busy that a lease has ended since
    assert job.history().done(together)[0] == job.history().done(before)[-1] + 1
    job.finish(a, back, c)
    assert {r["restarts"] for r in job.events("round_formed")} == {0}, "a loss is not charged"
    job.told_as(Cause.NODE_LOSS, "b")
    job.told_as(Cause.JOIN, "b", generation=before)


@pytest.mark.whole  # tests/launcher/test_agent.py has its workers die with it; others go on as after a killed node
def test_a_killed_agent(job: Job) -> None:
    """Its workers die with it, at once; the others go on."""
    a, b, c = three(job)
    tree = b.tree()
    b.kill_agent()
    until("nothing of the node left", lambda: not any(alive(p) for p in tree))
    job.steps(2, after=1)
    job.finish(a, c)
    job.told_as(Cause.NODE_LOSS, "b")


@pytest.mark.on_folder
def test_a_frozen_node_that_thaws(job: Job) -> None:
    """It is lost after its lease; once it thaws its workers stop before they begin a step, and it joins again."""
    a, b, c = three(job, FROZEN)
    freeze(b)
    alone = job.steps(2, after=1)
    thaw(b)
    job.steps(3, after=alone)
    job.finish(a, b, c, thawed=("b",))
    job.told_as(Cause.NODE_LOSS, "b")
    job.told_as(Cause.JOIN, "b", generation=alone)


def test_a_frozen_node_of_a_stock_script(job: Job) -> None:
    """The same for a script that knows nothing of us; thawed, the node joins again, and ends with the others."""
    a, b, c = three(job, FROZEN, script=("--stock",))
    freeze(b)
    job.steps(2, after=1)
    thaw(b)
    until("b has joined again", lambda: len([e for e in job.events("node_joined") if e["node"][0] == "b"]) == 2)
    job.finish(a, b, c, thawed=("b",))
    job.told_as(Cause.NODE_LOSS, "b", within_s=START_S)


def test_two_nodes_lost_at_once(job: Job) -> None:
    """The two that are left go on, in one round."""
    a, b, c, d = job.nodes("a", "b", "c", "d", nnodes="2:4", conf=ALL)
    assert job.steps(4) == 1
    for node in (b, c):
        node.kill()
    job.steps(2, after=1)
    job.finish(a, d)
    rounds = job.events("round_formed")
    assert len(rounds) <= 3, "at most one round for each of the two"
    if len(rounds) == 2:
        job.told_as(Cause.NODE_LOSS, "b", "c")
    told = job.account()
    assert {i.cause for i in told.interruptions} == {Cause.NODE_LOSS}
    ended_s, began_s = job.history().pause(1)
    assert told.seconds[Cause.NODE_LOSS] == pytest.approx(began_s - ended_s, rel=0.1, abs=BUSY_S)


@pytest.mark.parametrize("victim", ["rank 0", sample.rest("leader")])
def test_the_node_that_matters(job: Job, victim: str) -> None:
    """The node of rank 0 (which hosts the workers' store) and the one that leads may be lost, together or alone."""
    nodes = {node.name: node for node in job.nodes("a", "b", "c", nnodes="1:3", conf=ALL)}
    assert job.steps(3) == 1
    nodes.pop("a").kill()  # the first: it has rank 0 and leads
    second = job.steps(2, after=1)
    (formed,) = job.events("round_formed", generation=second)
    rank_0, leader = formed["participants"][0]["node_id"], formed["node"]
    assert rank_0[0] == "b", "survivors keep their order"
    nodes.pop((rank_0 if victim == "rank 0" else leader)[0]).kill()
    job.steps(1, after=second)
    job.finish(*nodes.values())
    job.told_as(Cause.NODE_LOSS, "a")
    job.told_as(Cause.NODE_LOSS, (rank_0 if victim == "rank 0" else leader)[0], generation=second)


@pytest.mark.parametrize(("name", "fault"), [("a", Node.kill), ("c", freeze)], ids=["rank 0 killed", "rank 2 frozen"])
def test_a_node_lost_while_a_round_forms(job: Job, name: str, fault: object) -> None:
    """The round of three was proposed and is not joined by all: b stands still meanwhile. The other two form the next
    one.
    """
    assert callable(fault)
    a, b = job.nodes("a", "b", nnodes="2:3", conf=FROZEN)
    nodes = {"a": a, "b": b, "c": job.node("c", nnodes="2:3", conf=FROZEN, options=job.gate("c"))}
    job.open_gate("c", meanwhile=lambda: freeze(b))
    job.wait_event("round_formed")
    victim = nodes.pop(name)
    fault(victim)
    struck_s = time.monotonic()
    thaw(b)
    job.steps(2)
    first_s = min(step.begin_s for step in job.history().steps)
    if fault is freeze:
        thaw(victim)
        job.steps(3)
        nodes[name] = victim
    job.finish(*nodes.values(), thawed=("c",))
    lost = job.account().interruptions[0]
    assert (lost.cause, [n[0] for n in lost.nodes]) == (Cause.NODE_LOSS, [name]), job.told(lost)
    assert lost.seconds == pytest.approx(first_s - struck_s, rel=0.1, abs=BUSY_S), job.told(lost)


def test_a_node_that_flaps(job: Job) -> None:
    """It goes and comes again and again, in one way or the other: each time the others go on, and it is taken in; after
    the second time only when it has been out for a while, which interrupts nobody.
    """
    conf = f"{ALL},strikes=2,exclusion=3"
    a, b, c = job.nodes("a", "b", "c", nnodes="2:3", conf=conf)
    job.steps(3)
    last, told = 1, []
    for leave, cause in ((Node.kill, Cause.NODE_LOSS), (Node.terminate, Cause.DRAIN)):
        leave(b)
        alone = job.steps(2, after=last)
        (b,) = job.nodes("b", nnodes="2:3", conf=conf)
        told += [(cause, last), (Cause.JOIN, alone)]
        last = job.steps(3, after=alone)
    job.finish(a, b, c)
    for cause, generation in told:
        job.told_as(cause, "b", generation=generation)
    assert [e["node_excluded"] for e in job.events("node_excluded")] == ["b"]
    assert [e["node_readmitted"] for e in job.events("node_readmitted")] == ["b"]


def test_many_nodes_join_together(job: Job) -> None:
    """A job of one node takes many more in, in few rounds and without a step done twice."""
    nnodes, conf, names = f"1:{1 + NUM_JOINERS}", "last_call=0,join_cooldown=1", [f"n{i}" for i in range(NUM_JOINERS)]
    (a,) = job.nodes("a", nnodes=nnodes, conf=conf)
    job.steps(1)
    more = [job.node(name, nnodes=nnodes, conf=conf, options=job.gate(name)) for name in names]
    job.open_gate(*names)
    job.steps(1 + NUM_JOINERS)
    job.finish(a, *more, redone=0)
    assert len(job.events("round_formed")) <= 3
    joined = [i for i in job.account().interruptions if i.cause is Cause.JOIN]
    assert {node.rpartition("-")[0] for i in joined for node in i.nodes} == {node.name for node in more}
    ended_s, began_s = job.history().pause(1)
    assert joined[0].seconds == pytest.approx(began_s - ended_s, rel=0.1, abs=BUSY_S)


@pytest.mark.parametrize("stock", [sample.rest((), id="cooperative"), pytest.param(("--stock",), id="stock")])
def test_a_worker_that_ignores_sigterm(job: Job, stock: tuple[str, ...]) -> None:
    """A drain and a loss both end such workers within the grace that was asked for."""
    options = ("--shutdown-timeout", "1")
    a, b, c = job.nodes("a", "b", "c", nnodes="1:3", conf=ALL, script=("--deaf", *stock), options=options)
    assert job.steps(3) == 1
    b.signal(signal.SIGTERM)
    assert b.wait() == 128 + signal.SIGTERM, b.output
    drained = job.steps(2, after=1)
    c.kill()
    job.steps(1, after=drained)
    job.finish(a)
    assert not job.events("workers_linger")
    job.told_as(Cause.DRAIN, "b", within_s=START_S if stock else BUSY_S)
    job.told_as(Cause.NODE_LOSS, "c", generation=drained, within_s=START_S if stock else BUSY_S)
