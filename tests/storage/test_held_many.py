"""Many who read at once from the memory of nodes, and nodes that hold the same."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from storage.held.nearest import NearestStore, Places, Reach
from storage.held.peer_client import Peer
from storage.parallel import run_concurrently
from storage.stores.memory import MemoryStore
from tests.storage.held_cases import Staged, add, nodes


class Reads(Peer):
    """A node of which it is counted how often it is read."""

    num = 0

    def read_into(self, *args: Any) -> None:
        self.num += 1
        super().read_into(*args)


def test_many_ranks_that_come_at_once_are_all_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a node that joins come so; whoever was turned away would read all of it from the store."""
    monkeypatch.setattr("storage.held.peer_server._NUM_STRANGERS_MAX", 2)
    with nodes(["a"]) as (a,), contextlib.ExitStack() as stack:
        staged = Staged(20)
        add(a, staged, 0)
        peers = [stack.enter_context(contextlib.closing(Peer(a.card()))) for _ in range(24)]
        found = run_concurrently([peer.labels for peer in peers])
    assert [[label.step for label in labels] for labels in found] == [[20]] * 24


def test_nodes_that_hold_the_same_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.held.nearest._TURN_BYTES", 1000)
    with nodes(["a", "b", "c"]) as found:
        staged = Staged(20, is_all=True)
        for node in found:
            add(node, staged, 0)
        sources = [Reads(node.card()) for node in found]
        part = staged.part(0)
        name = next(iter(part.objects))
        holders = {part.key: sources}
        near = NearestStore(MemoryStore("none"), "s/", holders, Places(), lambda *_: None, Reach(is_stored=False))
        for number in range(6):
            near.read_into(f"s/{name}", number * 1000, [memoryview(bytearray(10))])
        assert [source.num for source in sources] == [2, 2, 2]
        for source in sources:
            source.close()
