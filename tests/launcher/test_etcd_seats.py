"""What a machine does to be a member of an etcd cluster, decided from what it is told."""

from __future__ import annotations

import pytest

from launcher.errors import UsageError
from launcher.kv.etcd.seats import (
    Add,
    ClusterView,
    Remove,
    Seat,
    SeatedMember,
    SetAside,
    StandBy,
    Start,
    Step,
    lost,
    next_step,
    parse_members,
)

A, B, C, D = SEATS = parse_members("a,b,c,d")


def member(number: int, seat: Seat, *, served: bool = True) -> SeatedMember:
    urls = (f"http://{seat.endpoint}",) if served else ()
    return SeatedMember(number, seat.name if served else "", (seat.peer_url("http"),), urls)


FULL = (member(1, A), member(2, B), member(3, C))


@pytest.mark.parametrize(
    ("text", "seats"),
    [
        ("node-1,node-2", (Seat("node-1", 2379), Seat("node-2", 2379))),
        ("127.0.0.1:2379,127.0.0.1:2381", (Seat("127.0.0.1", 2379), Seat("127.0.0.1", 2381))),
        ("[::1]:5000", (Seat("::1", 5000),)),
    ],
)
def test_members(text: str, seats: tuple[Seat, ...]) -> None:
    assert parse_members(text) == seats
    assert all("=" not in seat.name and ":" not in seat.name for seat in seats)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,a", "--members a:2379: twice"),
        ("a:2379,a:2380", "--members a:2380: twice, or next to another"),
        ("a,,b", "--members '': the host is missing"),
        ("http://a", "leave http:// out"),
        ("a:0", "is no port"),
    ],
)
def test_members_that_cannot_be(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_members(text)


NEW = "a=http://a:2380,b=http://b:2380,c=http://c:2380"


@pytest.mark.parametrize(
    ("own", "listed", "has_data", "step"),
    [
        # nobody is there
        (A, None, False, Start(NEW, is_new=True)),
        (A, None, True, Start(NEW, is_new=True)),
        (D, None, False, StandBy("there is no cluster yet")),
        # a living cluster
        (B, FULL, True, Start(NEW, is_new=False)),
        (B, FULL, False, Remove(FULL[1], "its data are gone")),
        (B, (FULL[0], FULL[2]), False, Add("http://b:2380")),
        (B, (FULL[0], FULL[2], member(4, D)), True, SetAside()),
        (B, (FULL[0], FULL[2], member(4, D)), False, StandBy("all seats are taken")),
        (C, (*FULL[:2], member(5, C, served=False)), False, Start(NEW, is_new=False)),
        (D, FULL, False, StandBy("all seats are taken")),
    ],
)
def test_what_is_next(own: Seat, listed: tuple[SeatedMember, ...] | None, has_data: bool, step: Step) -> None:
    assert next_step(own, ClusterView(SEATS, 3, "http", listed), has_data=has_data) == step


def test_the_seat_of_a_lost_member_is_taken_in_two_steps() -> None:
    view = ClusterView(SEATS, 3, "http", FULL, gone={2})
    assert next_step(D, view, has_data=False) == Remove(FULL[1], "it does not answer any more")
    left = (FULL[0], FULL[2])
    assert next_step(D, ClusterView(SEATS, 3, "http", left, gone={2}), has_data=False) == Add("http://d:2380")
    joined = (*left, member(4, D, served=False))
    (start,) = [next_step(D, ClusterView(SEATS, 3, "http", joined), has_data=False)]
    assert start == Start("a=http://a:2380,c=http://c:2380,d=http://d:2380", is_new=False)


def test_a_member_with_tls_is_the_one_that_had_none() -> None:
    view = ClusterView(SEATS, 3, "https", FULL)
    assert isinstance(next_step(B, view, has_data=True), Start)


def test_when_a_member_counts_as_lost() -> None:
    """One in the list has `replace_after`; one whose machine is in the list no more was replaced by hand."""
    seats = (A, C, D)
    view = ClusterView(seats, 3, "http", FULL)
    answered_s = {1: 100.0, 2: 100.0, 3: 40.0}
    assert lost(view, answered_s, 100.0, 60.0) == set()
    assert lost(view, answered_s, 100.5, 60.0) == {3}
    assert lost(view, answered_s, 105.5, 80.0) == {2}
    assert lost(view, answered_s, 100.5, 0.2) == {1, 2, 3}
    assert lost(view, {}, 100.5, 80.0) == set(), "who was not asked yet is not lost"
