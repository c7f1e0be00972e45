"""Copies that take longer than it takes to stage the next state."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from storage.held.rate import RateLimit
from tests.cluster import until
from tests.storage.held_cases import Seen, Staged, check, meet, nodes, restore, store_with

WAIT_S = 60.0


def test_a_state_whose_copies_take_long_outlives_a_node_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of states that are staged faster than they are copied; here copies go on as long as they may."""
    may_go_on = threading.Event()

    def wait(self: RateLimit, num_bytes: int, stop: threading.Event) -> bool:
        while not may_go_on.wait(0.01) and not stop.is_set():
            pass
        return not stop.is_set()

    monkeypatch.setattr(RateLimit, "wait", wait)
    copied = []
    with nodes(["a", "b"]) as (a, b):
        meet([a, b])
        for step in range(10, 90, 10):
            staged, copies = Staged(step), a.copied(0.0) and b.copied(0.0)  # as ranks agree on
            copied += [step] if copies else []
            for rank, node in enumerate((a, b)):
                node.add(replace(staged.part(rank), is_copied=copies))
            if step in (10, 40):
                may_go_on.set()
                assert a.copied(WAIT_S) and b.copied(WAIT_S)
                may_go_on.clear()
        a.close()
        check(20, restore(store_with(5), Seen([b]), []))
    assert copied == [10, 20, 50]


def test_who_waits_for_the_end_of_a_copy_hears_of_it_once() -> None:
    heard: list[int] = []
    with nodes(["a", "b"]) as (a, b):
        a.add(Staged(10).part(0), lambda: heard.append(10))
        assert heard == [10], "there is nobody to copy to"
        meet([a, b])
        assert a.copied(WAIT_S)
        a.make_way(WAIT_S)
        for step in (20, 30):
            a.add(Staged(step).part(0), lambda step=step: heard.append(step))
        a.add(replace(Staged(40).part(0), is_copied=False), lambda: heard.append(40))
        assert heard == [10, 40]
        a.way_free()
        until("the end of the others", lambda: sorted(heard) == [10, 20, 30, 40])
        a.make_way(WAIT_S)
        a.add(Staged(50).part(0), lambda: heard.append(50))
        a.meet([a.card()])  # the other one is gone
        assert 50 in heard


def test_without_another_node_no_state_stays_for_its_copies() -> None:
    with nodes(["a"]) as (a,):
        for step, copies in ((10, True), (20, False), (30, False)):
            a.add(replace(Staged(step).part(0), is_copied=copies))
        assert [label.step for label in a.inventory.labels()] == [30, 20]
