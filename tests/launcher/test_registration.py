"""A node's own record in a store that may carry out a write late, or without a word."""

from __future__ import annotations

import pytest

from launcher.node.effects import Get, Grant, Put, Task
from launcher.node.events import Announced, Draining, Joining, LeaseSeen, LeasesSeen, Started
from launcher.node.registration import CHECK_PERIOD_S, FENCE_FRACTION, YIELD_FRACTION
from launcher.rounds.records import Breakage, Node, Status
from tests.launcher.engines import TTL_S, Driven
from tests.launcher.situations import FAILURE, round_of

RUNNING, STOPPING, READY = map(Announced, (Status.RUNNING, Status.STOPPING, Status.READY))


@pytest.fixture
def node() -> Driven:
    return Driven().started()


def test_a_node_registers_with_two_requests(node: Driven) -> None:
    assert node.status() is Status.READY
    assert node.store.revision == 1
    assert node.reports() == ["node_joined"]


def test_a_write_that_comes_late_does_not_replace_a_newer_one(node: Driven) -> None:
    node.feed(RUNNING)
    late = node.give_up(Put)
    node.feed(STOPPING)
    node.pass_time(1.0)
    node.settle()
    assert node.status() is Status.STOPPING
    node.apply(late)
    assert node.status() is Status.STOPPING


def test_a_registration_that_comes_late_does_not_replace_a_newer_one() -> None:
    node = Driven()
    node.feed(Started())
    node.carry_out(Grant)
    late = node.give_up(Put)
    node.pass_time(1.0)
    node.settle()
    node.feed(RUNNING)
    node.settle()
    node.apply(late)
    assert node.status() is Status.RUNNING


def test_a_registration_that_was_not_heard_of_is_this_nodes_own() -> None:
    node = Driven()
    node.feed(Started())
    node.carry_out(Grant)
    node.apply(node.give_up(Put))
    assert node.engine.view.fenced(node.now_s)
    node.pass_time(1.0)
    node.settle()
    assert not node.engine.view.fenced(node.now_s)


def test_a_write_that_was_not_heard_of_is_found_and_the_next_one_follows(node: Driven) -> None:
    node.feed(RUNNING)
    node.apply(node.give_up(Put))
    node.feed(STOPPING)
    node.pass_time(1.0)
    node.carry_out(Get)  # the record is not as it was
    node.carry_out(Put)
    assert node.status() is Status.STOPPING


def in_a_round(node: Driven, **broken: object) -> None:
    """It takes part in generation 1, which the leader has told to be broken."""
    node.feed(Joining(1))
    node.settle()
    told = Breakage("node b lost", **{"graceful": False, **broken})  # type: ignore[arg-type]
    node.store.put("job/leader", b"b", None, None)
    node.store.put("job/round", round_of("a", "b", broken=told).to_json(), None, None)
    node.listen()
    node.settle()


def test_one_whose_workers_soon_have_stopped_as_all_were_told_to_writes_once(node: Driven) -> None:
    in_a_round(node)
    node.feed(STOPPING)
    assert not node.tasks
    node.feed(READY)
    node.carry_out(Put)
    assert node.status() is Status.READY
    assert not node.tasks


def test_one_whose_workers_do_not_stop_soon_says_that_they_are_being_stopped(node: Driven) -> None:
    in_a_round(node)
    node.feed(STOPPING)
    assert node.engine.due_s == pytest.approx(node.now_s + 0.25)
    node.pass_time(0.3)
    node.settle()
    assert node.status() is Status.STOPPING


@pytest.mark.parametrize("is_news", ["a failure", "graceful", "draining"])
def test_what_is_news_is_written_at_once(node: Driven, is_news: str) -> None:
    in_a_round(node, graceful=is_news == "graceful")
    node.feed(Announced(Status.STOPPING, failure=FAILURE) if is_news == "a failure" else STOPPING)
    if is_news == "draining":
        node.feed(Draining("drain"))
    node.settle()
    assert node.status() is Status.STOPPING


def test_a_record_that_another_node_deleted_is_not_brought_back(node: Driven) -> None:
    node.store.delete("nodes/a")
    node.feed(RUNNING)
    node.settle()
    assert node.engine.view.fenced(node.now_s)
    assert node.status() is None
    node.feed(Announced(Status.READY))
    node.settle()
    assert node.status() is Status.READY, "it comes back without workers"


def test_a_record_that_is_not_the_one_written_is_written_again(node: Driven) -> None:
    node.store.put("nodes/a", b"of before", None, None)
    node.pass_time(CHECK_PERIOD_S)
    node.carry_out(Get)
    node.carry_out(Put)
    assert node.status() is Status.READY


def test_no_two_nodes_share_an_id(node: Driven) -> None:
    other = Driven(node.store, host="another")
    other.feed(Started())
    other.settle()
    other.pass_time(1.0)
    other.settle()
    assert other.engine.view.fenced(0.0)
    assert other.engine.own.why == "node id a is taken"
    assert node.record() == Node(node_id="a", host="a", address="127.0.0.1", port=1, slots=1, lease_ttl_s=TTL_S)


def test_nothing_is_written_while_an_answer_is_awaited(node: Driven) -> None:
    node.feed(RUNNING)
    node.next(Put)
    node.feed(STOPPING)
    node.pass_time(CHECK_PERIOD_S)
    assert not [task for task in node.tasks if task.lane.name == "RECORD"]


def test_a_node_is_fenced_by_the_clock_alone(node: Driven) -> None:
    """Whatever thread hangs: what is asked is the time."""
    fence_s = (1.0 - FENCE_FRACTION) * TTL_S
    assert not node.engine.view.fenced(fence_s - 1.0)
    assert node.engine.own.store_silent(YIELD_FRACTION * TTL_S + 1.0)
    assert node.engine.view.fenced(fence_s)


def test_leases_are_judged_once_all_are_known(node: Driven) -> None:
    """Of two of a node's leases one may be seen first, when the other's last renewal is long past."""
    node.now_s = TTL_S - 1.0
    node.feed(LeasesSeen((LeaseSeen(99, node.now_s), LeaseSeen(1, node.now_s + TTL_S))))
    assert not node.engine.view.fenced(node.now_s)


def test_a_silence_is_told_once_and_its_end_too(node: Driven) -> None:
    silent = LeaseSeen(1, TTL_S, silent_since_s=1.0, silence="cut off")
    for _ in range(2):
        node.feed(LeasesSeen((silent,)))
    node.pass_time(2.0)
    assert node.reports() == ["node_joined", "store_unreachable", "store_back"]


def test_a_silence_ends_with_the_lease_that_is_granted_after_it(node: Driven) -> None:
    (lease_id,) = node.seen
    node.feed(LeasesSeen((LeaseSeen(lease_id, node.now_s + TTL_S, silent_since_s=0.0, silence="no answer"),)))
    node.now_s += 2 * TTL_S
    node.feed(LeasesSeen((LeaseSeen(lease_id, TTL_S, lost=True, silent_since_s=0.0, silence="no answer"),)))
    node.feed(Announced(Status.READY))
    node.settle()
    assert node.reports() == ["node_joined", "store_unreachable", "store_back", "node_joined"]


def test_a_lease_that_was_lost_is_replaced_once_the_workers_are_stopped(node: Driven) -> None:
    node.feed(RUNNING)
    node.settle()
    node.feed(LeasesSeen((LeaseSeen(1, TTL_S, lost=True),)))
    node.settle()
    assert not node.tasks
    node.feed(Announced(Status.READY))
    kinds = []
    while node.tasks:
        kinds.append(type(node.tasks[0]).__name__)
        node.carry_out(Task)
    assert kinds == ["Grant", "Get", "Put", "Revoke"]
    assert not node.engine.view.fenced(node.now_s)
