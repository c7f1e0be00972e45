"""Following a prefix of a store: one snapshot, then every change once, whatever the store does meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from launcher.errors import Compacted, KVError, KVUnavailable
from launcher.kv import KV, Changes, Follower, Prefixed, Snapshot
from launcher.kv.memory import Hub, MemoryKV
from launcher.kv.state import State
from tests.cluster import until
from tests.launcher.stores import Connect

WAIT_S = 30.0


class Faulty(Prefixed):
    """A store whose next questions fail with what is in `faults`: by the name of the method."""

    def __init__(self, kv: KV) -> None:
        super().__init__(kv, "")
        self.faults: dict[str, Exception] = {}
        self.watches: list[Any] = []

    def fail(self, method: str) -> None:
        if error := self.faults.pop(method, None):
            raise error

    def list(self, prefix: str) -> Snapshot:
        self.fail("list")
        return super().list(prefix)

    def known(self, prefix: str) -> Snapshot:
        self.fail("list")
        return super().known(prefix)

    def watch(self, prefix: str, from_revision: int) -> Any:
        watch: Any = super().watch(prefix, from_revision)
        take, cancel = watch.next, watch.cancel

        def following(timeout_s: float) -> Any:
            self.fail("next")
            return take(timeout_s)

        def cancelling() -> None:
            self.watches.remove(watch)
            cancel()

        watch.next, watch.cancel = following, cancelling
        self.watches.append(watch)
        return watch


def snapshot(follower: Follower) -> dict[str, bytes]:
    found = follower.next(WAIT_S)
    assert isinstance(found, Snapshot), found
    return {entry.key: entry.value for entry in found.entries}


def changes(follower: Follower, num: int) -> list[tuple[str, bytes | None]]:
    got: list[tuple[str, bytes | None]] = []
    ends_s = time.monotonic() + WAIT_S
    while len(got) < num:
        assert time.monotonic() < ends_s, f"only {got} of {num} changes"
        found = follower.next(WAIT_S)
        assert isinstance(found, Changes), found
        got += [(event.key, event.entry.value if event.entry else None) for event in found.events]
    return got


@contextlib.contextmanager
def waiting(follower: Follower) -> Iterator[list[Snapshot | Changes]]:
    """A `next` that waits in a thread while the body runs; what it returned."""
    got: list[Snapshot | Changes] = []
    thread = threading.Thread(target=lambda: got.append(follower.next(60)))
    thread.start()
    yield got
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_a_snapshot_then_every_change_once(connect: Connect) -> None:
    kv = connect()
    kv.put("f/a", b"1")
    kv.put("other", b"x")
    with Follower(connect(), "f/") as follower:
        assert snapshot(follower) == {"f/a": b"1"}
        kv.put("f/b", b"2")
        kv.put("other", b"y")
        kv.delete("f/a")
        assert changes(follower, 2) == [("f/b", b"2"), ("f/a", None)]
        assert follower.next(0.01) == Changes(())
        kv.put("f/b", b"3")
        assert changes(follower, 1) == [("f/b", b"3")]


def test_a_change_between_the_snapshot_and_the_next_question_is_not_missed(connect: Connect) -> None:
    kv = connect()
    with Follower(kv) as follower:
        assert snapshot(follower) == {}
        kv.put("a", b"1")
        kv.delete("a")
        assert changes(follower, 2) == [("a", b"1"), ("a", None)]


def test_closing_ends_a_waiting_next(connect: Connect) -> None:
    follower = Follower(connect())
    snapshot(follower)
    with waiting(follower) as got:
        follower.close()
    assert got == [Changes(())]
    assert follower.next(60) == Changes(()), "at once"


def test_listing_anew_on_request(connect: Connect) -> None:
    kv = connect()
    with Follower(connect()) as follower:
        snapshot(follower)
        kv.put("a", b"1")
        with waiting(follower) as got:
            until("the change is seen", lambda: got, WAIT_S)
        with waiting(follower) as got:
            follower.relist()
        found = [*got, follower.next(WAIT_S)]
        assert isinstance(found[-1], Snapshot) or isinstance(found[0], Snapshot)
        kv.put("b", b"2")
        follower.relist()
        assert snapshot(follower) == {"a": b"1", "b": b"2"}
        kv.delete("a")
        assert changes(follower, 1) == [("a", None)], "what the snapshot shows is no change"


def test_what_is_forgotten_is_listed_anew(connect: Connect) -> None:
    kv = Faulty(connect())
    with Follower(kv) as follower:
        snapshot(follower)
        kv.put("a", b"1")
        kv.faults["next"] = Compacted("revision 1 is forgotten")
        assert snapshot(follower) == {"a": b"1"}
        kv.put("b", b"2")
        assert changes(follower, 1) == [("b", b"2")]
        assert len(kv.watches) == 1
    assert kv.watches == []


def test_a_store_that_really_forgets() -> None:
    hub = Hub(State(history_events=3))
    kv = MemoryKV(hub)
    try:
        with Follower(kv) as follower:
            snapshot(follower)
            for number in range(9):
                kv.put("a", str(number).encode())
            assert snapshot(follower) == {"a": b"8"}
    finally:
        hub.close()


def test_nothing_is_lost_while_the_store_does_not_answer(connect: Connect) -> None:
    kv = Faulty(connect())
    kv.faults["list"] = KVUnavailable("down")
    with Follower(kv) as follower:
        with pytest.raises(KVUnavailable):
            follower.next(WAIT_S)
        assert snapshot(follower) == {}
        kv.put("a", b"1")
        kv.faults["next"] = KVUnavailable("down again")
        with pytest.raises(KVUnavailable):
            follower.next(WAIT_S)
        assert changes(follower, 1) == [("a", b"1")]
    assert kv.watches == []


@pytest.mark.parametrize("error", [KVError("refused"), ValueError("a fault of ours")])
def test_a_broken_watch_is_followed_by_a_snapshot(error: Exception, connect: Connect) -> None:
    kv = Faulty(connect())
    with Follower(kv) as follower:
        snapshot(follower)
        kv.put("a", b"1")
        kv.faults["next"] = error
        with pytest.raises(type(error)):
            follower.next(WAIT_S)
        assert kv.watches == [], "the broken one is not left open"
        assert snapshot(follower) == {"a": b"1"}


def test_closing_while_it_lists_leaves_no_watch_open() -> None:
    kv = Faulty(MemoryKV())
    follower = Follower(kv)
    kv.list = lambda prefix: (follower.close(), Snapshot((), 0))[1]  # type: ignore[method-assign, func-returns-value]
    assert follower.next(WAIT_S) == Changes(())
    assert kv.watches == []
