"""Many who read at once from the memory of nodes, and nodes that hold the same."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

import pytest

from storage.errors import Transient
from storage.held.nearest import NearestStore, Places, Reach
from storage.held.peer_client import Peer
from storage.held.peer_server import PeerServer
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
    for name in ("_GREETING_S", "_GREETING_S_MIN"):  # nobody has to be quick on a busy machine
        monkeypatch.setattr(f"storage.held.peer_server.{name}", 60.0)
    with nodes(["a"]) as (a,), contextlib.ExitStack() as stack:
        staged = Staged(20)
        add(a, staged, 0)
        peers = [stack.enter_context(contextlib.closing(Peer(a.card(), stall_s=60.0))) for _ in range(24)]
        found = run_concurrently([peer.labels for peer in peers])
    assert [[label.step for label in labels] for labels in found] == [[20]] * 24


def test_where_no_thread_is_to_be_had_the_next_who_comes_is_heard(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, refused = threading.Thread.start, list[threading.Thread]()

    def start_others(thread: threading.Thread) -> None:
        if thread.name == "storage-peer" and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_others)
    with nodes(["a"]) as (a,), contextlib.closing(Peer(a.card(), stall_s=60.0)) as peer:
        with pytest.raises(Transient, match=r"closed the connection|nothing any more"):
            peer.labels()
        assert peer.labels() == ()
    assert "cannot be served: can't start new thread" in caplog.text


@pytest.mark.parametrize("moment", ["it comes", "it goes"])
def test_closing_waits_for_a_connection_of_just_then(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is taken in, and has no thread yet, and one whose thread is about to end by itself."""
    met, go_on, never = threading.Event(), threading.Event(), threading.Event()
    take_in, run = PeerServer._take_in, threading.Thread.run

    def take_in_slowly(self: PeerServer, *args: Any) -> bool:
        found = take_in(self, *args)
        if moment == "it comes":
            met.set()
            assert go_on.wait(60.0)
        return found

    def end_slowly(thread: threading.Thread) -> None:
        run(thread)
        if thread.name == "storage-peer":
            met.set()
            never.wait(0.3)

    monkeypatch.setattr(PeerServer, "_take_in", take_in_slowly)
    monkeypatch.setattr(threading.Thread, "run", end_slowly)
    before = set(threading.enumerate())
    with nodes(["a"]) as (a,), socket.create_connection((a.card().address, a.card().port)) as stranger:
        if moment == "it goes":
            stranger.shutdown(socket.SHUT_WR)
        assert met.wait(60.0)
        opening = threading.Timer(0.1, go_on.set)
        opening.start()
        a.close()
        opening.join()
    assert not set(threading.enumerate()) - before


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
