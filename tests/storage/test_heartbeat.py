"""What an owner writes as long as it lives."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from storage import open_store
from storage.errors import NotFound, Transient
from storage.format.sealed import seal
from storage.run import heartbeat, owner
from storage.run.heartbeat import Heartbeat
from storage.run.owner import Owner
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectStore
from tests.cluster import until
from tests.storage.heartbeat_cases import QUIET, owner_of


def beat_of(store: ObjectStore, mine: Owner) -> bytes | None:
    try:
        return store.read(f"beat-{mine.token}")
    except NotFound:
        return None


def test_a_heart_beats_until_it_is_closed(memory_url: str) -> None:
    store = open_store(memory_url)
    mine, _ = owner.claim(store, owner_of("a", "a"))
    beats = Heartbeat(store, mine, None, QUIET, interval_s=0.01).start()
    seen = set[bytes | None]()

    def beats_seen() -> int:
        seen.add(beat_of(store, mine))
        return len(seen)

    until("it has beaten three times", lambda: beats_seen() > 3)
    beats.close()
    assert beat_of(store, mine) is None


def test_a_heart_that_is_superseded_stops(memory_url: str, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(memory_url)
    mine, _ = owner.claim(store, owner_of("a", "a", 1))
    beats = Heartbeat(store, mine, None, QUIET, interval_s=0.01).start()
    until("it beats", lambda: beat_of(store, mine) is not None)
    late = Owner(lineage="a", generation=0, epoch=9, token="l" * 32)
    store.put("owner.json", [seal("owner", late)])  # a stalled claim of an older generation changes nothing
    before = beat_of(store, mine)
    until("it beats on", lambda: beat_of(store, mine) not in (None, before))
    owner.claim(store, owner_of("b", "b"))
    until("it stops", lambda: "checkpoint_fenced" in caplog.text and beat_of(store, mine) is None)
    assert beats.fenced is not None
    assert "now belongs to another job (generation 0, on node-1)" in beats.fenced
    beats.close()


class Outage(MemoryStore):
    """Cannot be written while `away`, and keeps whoever tries until `back`."""

    away = False

    def __init__(self) -> None:
        super().__init__("outage")
        self.back = threading.Event()

    def put(self, key: str, buffers: Any, *, if_absent: bool = False) -> Any:
        if self.away and key.startswith("beat-"):
            raise Transient("away")
        return super().put(key, buffers, if_absent=if_absent)

    def delete(self, key: str) -> None:
        if self.away:
            self.back.wait(60)
        super().delete(key)


def test_an_outage_is_told_once_and_keeps_nobody_from_ending(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_CLOSE_S", 0.1)
    store = Outage()
    mine, _ = owner.claim(store, owner_of("a", "a", 1))
    beats = Heartbeat(store, mine, None, QUIET, interval_s=0.01).start()
    thread = beats._thread
    assert thread is not None
    until("it beats", lambda: beat_of(store, mine) is not None)
    store.away = True
    until("it is told", lambda: "cannot be told" in caplog.text)
    store.away = False
    before = beat_of(store, mine)
    until("it beats again", lambda: beat_of(store, mine) != before)
    assert caplog.text.count("cannot be told") == 1
    store.away = True
    try:
        beats.close()
        assert "another job will have to wait" in caplog.text
    finally:
        store.back.set()
    thread.join(60)
    assert not thread.is_alive()
