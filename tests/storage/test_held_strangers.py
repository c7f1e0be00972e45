"""Those who connect to a node's memory and do not say who they are: few, gone soon, and in nobody's way."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from storage.held.peer_client import Peer
from storage.held.strangers import Strangers
from tests.storage.held_cases import nodes

WAIT_S = 60.0


def test_strangers_who_say_nothing_are_few_and_gone_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.held.peer_server._GREETING_S", 0.2)
    with nodes(["a"]) as (a,), contextlib.ExitStack() as stack:
        port = a.card().port
        strangers = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(40)]
        deadline_s = time.monotonic() + WAIT_S
        for stranger in strangers:
            stranger.settimeout(max(0.1, deadline_s - time.monotonic()))
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass
        monkeypatch.undo()  # whoever greets may take its time
        with contextlib.closing(Peer(a.card())) as peer:
            assert peer.labels() == ()


def test_strangers_who_say_nothing_keep_nobody_waiting_who_has_something_to_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("storage.held.peer_server._GREETING_S", 10 * WAIT_S)
    monkeypatch.setattr("storage.held.peer_server._GREETING_S_MIN", 0.01)
    monkeypatch.setattr("storage.held.peer_server._NUM_STRANGERS_MAX", 4)
    with nodes(["a"]) as (a,), contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(("127.0.0.1", a.card().port))) for _ in range(12)]
        with contextlib.closing(Peer(a.card(), stall_s=WAIT_S)) as peer:
            assert peer.labels() == ()
            strangers[0].settimeout(WAIT_S)
            while strangers[0].recv(4096):
                pass  # the first to come is the first to go
            assert peer.labels() == ()  # who is known stays


def test_who_goes_for_another_is_the_oldest_of_those_who_are_most_and_has_had_its_time() -> None:
    strangers = Strangers[str](limit=3, grace_s=1.0)
    for number, host in enumerate(("one", "many", "many")):
        assert strangers.wait_s(number) == 0.0
        assert strangers.take_in(f"{host}-{number}", host, number) is None
    assert strangers.wait_s(1.75) == 0.25
    assert strangers.wait_s(2.5) == 0.0
    assert strangers.take_in("late", "late", 2.5) == "many-1"
    strangers.leave("one-0")  # it has told who it is
    assert strangers.wait_s(2.5) == 0.0
    assert strangers.take_in("later", "late", 2.5) is None
    assert strangers.take_in("latest", "late", 9.0) == "late"
