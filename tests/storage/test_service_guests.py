"""Copies for other nodes and live states, which outlive a crash of the service with its keeper."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.held.buddies import PeerCard
from storage.held.inventory import HeldPart
from storage.held.node_memory import NodeIdentity, NodeMemory
from storage.service import guests
from storage.service.memory import HeldStates
from tests.storage.held_cases import Seen, Staged, check, in_shared_memory, nodes, restore, store_with
from tests.storage.test_held_peers import WAIT_S
from tests.storage.test_service_keeper import Pair

US = NodeIdentity("b", "host-b")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path / "kept")
    yield made
    made.close()


def crash(pair: Pair, held: HeldStates) -> HeldStates:
    """The next service, which gets what the keeper has; of the one before nothing is told any more."""
    pair.heed_all()
    kept = {name: (kept.stage, [os.dup(fd) for fd in kept.fds]) for name, kept in pair.state.kept.items()}
    assert all(map(guests.is_guest, kept))
    again = HeldStates(keeper=pair.safe)
    again.take_up([], pair.state.remembered, kept)
    held._keeper.released = lambda name: None  # type: ignore[method-assign]
    held.close()
    del pair.safe.released  # type: ignore[attr-defined]
    return again


def cards(*found: NodeMemory) -> list[PeerCard]:
    return [node.card() for node in found]


def test_copies_for_other_nodes_outlive_a_crash(pair: Pair) -> None:
    with nodes(["a"]) as (a,):
        held = HeldStates(keeper=pair.safe)
        held.node.start(US)
        a.meet(cards(a, held.node))
        staged = Staged(20)
        for rank in (0, 1):
            a.add(staged.part(rank))
            assert a.copied(WAIT_S)
        num_fds = len(os.listdir("/proc/self/fd"))
        again = crash(pair, held)
        assert [(label.rank, label.step) for label in again.node.inventory.labels()] == [(1, 20), (0, 20)]
        assert again.node.inventory.own_labels() == []
        again.node.start(US)
        a.meet(cards(a, again.node))
        assert a.copied(WAIT_S), "what is there is not copied again"
        a.close()
        check(20, restore(store_with(10), Seen([again.node]), []))
        again.close()
    pair.heed_all()
    assert pair.state.kept == {}
    assert len(os.listdir("/proc/self/fd")) < num_fds


def test_a_live_state_outlives_a_crash_and_its_memory_goes_with_it(pair: Pair) -> None:
    held = HeldStates(keeper=pair.safe)
    held.add_live(in_shared_memory(Staged(20, world_size=1, is_all=True).part(0)))
    again = crash(pair, held)
    (label,) = again.node.inventory.own_labels()
    assert (label.step, label.is_all) == (20, True)
    again.node.start(US)
    check(20, restore(store_with(10, world_size=1), Seen([again.node]), [], 1), 1)
    again.node.drop(None, "it is not wanted any more")
    pair.heed_all()
    assert pair.state.kept == {}
    again.close()


def test_what_was_kept_by_a_service_that_crashed_in_the_middle_goes_all_the_same(pair: Pair) -> None:
    """Before it said that there is nothing to be done about it."""
    held = HeldStates(keeper=pair.safe)
    held.add_live(in_shared_memory(Staged(20, world_size=1, is_all=True).part(0)))
    pair.heed()
    (kept,) = pair.state.kept.values()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair, "heed_all", lambda: pair.link.recv(4096))
        again = crash(pair, held)
    assert not kept.is_done
    again.close()
    pair.heed_all()
    assert pair.state.kept == {}


@pytest.mark.parametrize("what", ["the text", "the papers", "the place", "the memory", "all descriptors"])
def test_what_is_not_what_it_was_is_lost_alone(what: str, pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    held = HeldStates(keeper=pair.safe)
    for step in (20, 30):
        held.add_live(in_shared_memory(Staged(step, world_size=1, is_all=True).part(0)))
    pair.heed_all()
    first = next(iter(pair.state.kept.values()))
    if what == "the text":
        os.pwrite(first.paper, b"x", 0)
    elif what == "the papers":
        at = first.stage.index("step")
        os.pwrite(first.paper, b"S", at)
    elif what == "the place":
        os.pwrite(first.fds[0], b"\xff", 40)
    elif what == "the memory":
        first.fds.append(os.dup(0))
    else:  # as where the keeper could open no more
        while first.fds:
            os.close(first.fds.pop())
    num_fds = len(os.listdir("/proc/self/fd"))
    again = crash(pair, held)
    assert [label.step for label in again.node.inventory.labels()] == [30]
    assert sum("checkpoint_memory_away" in line and "lost" in line for line in caplog.messages) == 1
    again.close()
    pair.heed_all()
    assert pair.state.kept == {}
    assert len(os.listdir("/proc/self/fd")) < num_fds


def test_where_there_is_no_memory_that_others_can_have_it_goes_with_the_service(pair: Pair) -> None:
    part = Staged(20).part(0)
    kept = guests.keep(pair.safe, HeldPart(part.papers, part.objects, "", (_Anonymous(),)))
    assert kept.label == part.label
    pair.heed_all()
    assert pair.state.kept == {}


class _Anonymous:
    fd, memory = -1, memoryview(bytearray(8))

    def close(self) -> None:
        pass
