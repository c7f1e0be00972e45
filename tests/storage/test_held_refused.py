"""Connections on which a copy was refused."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from storage.format.sealed import Document
from storage.held.wire import PeerRefusal, Wire
from tests.storage.held_cases import Staged, add, damaged, meet, nodes

WAIT_S = 60.0


def test_a_connection_on_which_a_copy_was_refused_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    refused, go_on = threading.Event(), threading.Event()

    def last_words(wire: Wire, message: Document, *behind: Any) -> None:
        send(wire, message, *behind)
        if isinstance(message, PeerRefusal) and not refused.is_set():
            refused.set()
            go_on.wait(WAIT_S)  # and only then is the connection closed

    send = Wire.send
    monkeypatch.setattr(Wire, "send", last_words)
    with nodes(["a", "b"]) as (a, b):
        meet([a, b])
        add(a, Staged(20), 0, change=damaged)
        assert refused.wait(WAIT_S) and a.copied(WAIT_S)
        add(a, Staged(30), 0)
        threading.Timer(0.2, go_on.set).start()
        assert a.copied(WAIT_S)
        assert [label.step for label in b.inventory.labels()] == [30]
