"""Who is left out where nodes reach the store and not one another, and when the leader decides it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from launcher.rounds.history import History, Mark, MarkKind
from launcher.rounds.membership import Propose, Rules, View, Wait, decide
from launcher.rounds.partitions import LISTEN_S, left_out
from launcher.rounds.records import Breakage, Node, Participant, Round, Status

RULES = Rules(min_nodes=1, max_nodes=8, join_cooldown_s=0, join_settle_s=0)


@pytest.mark.parametrize(
    ("order", "unreachable", "out"),
    [
        ("abc", {}, ""),
        ("abc", {"a": "b", "c": "b", "b": "ac"}, "b"),
        ("abc", {"a": "b", "c": "b"}, "b"),
        ("abc", {"b": "ac"}, "b"),
        ("abc", {"b": "a", "c": "a"}, "a"),
        ("abc", {"a": "b"}, "b"),
        ("ab", {"a": "b", "b": "a"}, "b"),
        ("abcd", {"a": "c", "b": "cd", "c": "a", "d": "ab"}, "cd"),
        ("abcd", {"a": "b", "c": "d"}, "bd"),
        ("abc", {"a": "xa", "x": "b"}, ""),
    ],
    ids=[
        "none",
        "all told",
        "its peers",
        "itself",
        "rank 0",
        "one told",
        "two nodes",
        "halves",
        "two cuts",
        "strangers",
    ],
)
def test_no_cut_is_left_between_those_that_stay(order: str, unreachable: dict[str, str], out: str) -> None:
    assert "".join(left_out(order, unreachable)) == out


def node(name: str, **fields: Any) -> Node:
    record = Node(name, "host", "10.0.0.1", 1, 1, status=Status.RUNNING, generation=1, seniority=ord(name))
    return dataclasses.replace(record, **fields)


def seen(*nodes: Node, reported_s: float = 50.0, **fields: Any) -> View:
    current = Round(1, "L", tuple(Participant(n, 1) for n in "abc"), None, (), "", complete=True)
    times: dict[str, Any] = {"nodes_changed_s": 0.0, "formed_s": 0.0, "broken_s": 90.0}
    return View(nodes, dataclasses.replace(current, **fields), lineage="L", reported_s=reported_s, **times)


def act(view: View, now_s: float = 100.0) -> object:
    return decide(view, RULES, lambda slots, mesh: None, now_s)


def test_the_leader_listens_before_it_breaks_the_round() -> None:
    told = seen(node("a"), node("b", cannot_reach=("a",)), node("c"))
    assert isinstance(act(told, 50.0), Wait)
    proposed = act(told, 50.0 + LISTEN_S)
    assert isinstance(proposed, Propose) and proposed.round.broken
    assert proposed.round.broken.reason == "cut off from its peers: b"
    assert not proposed.round.broken.graceful


def test_all_stop_before_the_next_round_is_formed_without_it() -> None:
    """Its record stands until it has stopped its workers or its lease ended: nobody is taken for lost by hearsay."""
    told = act(seen(node("a"), node("b", cannot_reach=("a",)), node("c")))
    assert isinstance(told, Propose)
    ready = {"status": Status.READY}
    slow = seen(node("a", **ready), node("b", cannot_reach=("a",)), node("c", **ready), broken=told.round.broken)
    assert isinstance(act(slow), Wait)
    stopped = seen(*(node(n, **ready) for n in "ac"), node("b", cannot_reach=("a",), **ready), broken=told.round.broken)
    formed = act(stopped)
    assert isinstance(formed, Propose)
    assert [p.node_id for p in formed.round.participants] == ["a", "c"]
    assert formed.round.generation == 2


def test_it_is_taken_in_once_it_takes_its_report_back() -> None:
    def spare(*cannot_reach: str) -> View:
        running = (node(n, generation=2) for n in "ac")
        view = seen(*running, node("b", status=Status.READY, cannot_reach=cannot_reach))
        assert view.round
        two = tuple(Participant(n, 1) for n in "ac")
        return dataclasses.replace(view, round=dataclasses.replace(view.round, generation=2, participants=two))

    assert isinstance(act(spare("a")), Wait)
    asked = act(spare())
    assert isinstance(asked, Propose) and asked.round.stop == "join: b"
    assert isinstance(act(spare("x")), Propose), "a node that takes no part any more is no obstacle"


def test_a_node_that_is_cut_off_again_and_again_is_excluded() -> None:
    """The other end of the cut has told of it: this node knows nothing, and is ready to be taken in."""
    marks = tuple(Mark("c", MarkKind.DEPARTURE, "cut off from its peers") for _ in range(RULES.limits.strikes - 1))
    nodes = (node("a", cannot_reach=("c",), status=Status.READY), *(node(n, status=Status.READY) for n in "bc"))
    formed = act(seen(*nodes, broken=Breakage("cut", graceful=False), history=History(marks=marks)))
    assert isinstance(formed, Propose)
    assert [p.node_id for p in formed.round.participants] == ["a", "b"]
    assert formed.round.history.excluded("c")
    first = act(seen(*nodes, broken=Breakage("cut", graceful=False)))
    assert isinstance(first, Propose)
    assert [m.node for m in first.round.history.marks] == ["c"]
    assert not first.round.history.excluded("c")
