"""The contract of a rendezvous store, run over every back end."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from launcher.errors import Compacted, KVUnavailable, UsageError
from launcher.kv import Entry, Lease, WatchEvent
from launcher.kv.aside import tell, told
from launcher.kv.embedded import wire
from launcher.kv.embedded.client import EmbeddedKV
from launcher.kv.embedded.server import IDLE_TIMEOUT_S, EmbeddedServer, _Handler
from launcher.kv.state import State
from tests.cluster import until
from tests.etcd import gather
from tests.launcher.stores import Connect


def test_a_missing_key_is_none(connect: Connect) -> None:
    assert connect().get("a") is None


def test_put_then_get_from_another_client(connect: Connect) -> None:
    first = connect().put("a", b"\x00one")
    assert first is not None
    again = connect().put("a", b"two")
    assert again is not None
    assert again.revision > first.revision
    found = connect().get("a")
    assert found == again
    assert found is not None and found.create_revision == first.revision


def test_put_if_revision_is_compare_and_swap(connect: Connect) -> None:
    kv = connect()
    created = kv.put("a", b"1", if_revision=0)
    assert created is not None
    assert kv.put("a", b"2", if_revision=0) is None
    assert kv.put("a", b"2", if_revision=created.revision) is not None
    assert kv.put("a", b"3", if_revision=created.revision) is None
    entry = kv.get("a")
    assert entry is not None and entry.value == b"2"


def test_one_of_many_racers_wins(connect: Connect) -> None:
    wins: list[int] = []
    clients = [connect() for _ in range(8)]
    barrier = threading.Barrier(len(clients))

    def race(index: int) -> None:
        barrier.wait()
        if clients[index].put("race", str(index).encode(), if_revision=0):
            wins.append(index)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    entry = clients[0].get("race")
    assert entry is not None and entry.value == str(wins[0]).encode()


def test_list_is_by_prefix_and_key_order(connect: Connect) -> None:
    kv = connect()
    for key in ("b/2", "a/2", "a/1", "a0"):
        kv.put(key, key.encode())
    listing = kv.list("a/")
    assert [entry.key for entry in listing.entries] == ["a/1", "a/2"]
    last = kv.get("a0")
    assert last is not None and listing.revision == last.revision


def test_delete(connect: Connect) -> None:
    kv = connect()
    entry = kv.put("a", b"1")
    assert entry is not None
    assert not kv.delete("a", if_revision=entry.revision + 1)
    assert kv.delete("a", if_revision=entry.revision)
    assert not kv.delete("a")
    assert kv.get("a") is None


def test_a_key_made_again_has_a_new_create_revision(connect: Connect) -> None:
    kv = connect()
    first = kv.put("a", b"1")
    kv.delete("a")
    second = kv.put("a", b"1", if_revision=0)
    assert first is not None
    assert second is not None
    assert second.create_revision > first.create_revision


def test_watch_sees_the_past_and_the_future_once_each_in_order(connect: Connect) -> None:
    kv = connect()
    kv.put("w/a", b"1")
    listing = kv.list("w/")
    kv.put("w/a", b"2")
    kv.put("other", b"x")
    watch = connect().watch("w/", listing.revision + 1)
    assert [e.entry.value for e in gather(watch, 1) if e.entry] == [b"2"]
    kv.delete("w/a")
    kv.put("w/b", b"3")
    later = gather(watch, 2)
    assert [(e.key, e.entry.value if e.entry else None) for e in later] == [("w/a", None), ("w/b", b"3")]
    assert later[0].revision < later[1].revision
    assert watch.next(0.05) == ()


def test_cancelling_a_watch_ends_a_waiting_next(connect: Connect) -> None:
    watch = connect().watch("w/", 1)
    result: list[tuple[WatchEvent, ...]] = []
    thread = threading.Thread(target=lambda: result.append(watch.next(30)))
    thread.start()
    watch.cancel()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert result == [()]


def test_a_lease_renews_itself(connect: Connect) -> None:
    kv = connect()
    lease = kv.lease(4.0)
    kv.put("l", b"1", lease=lease)
    before_s = lease.deadline_s
    ends_s = time.monotonic() + 60
    while lease.deadline_s < before_s + 1.0:
        assert time.monotonic() < ends_s, "the lease was not renewed"
        assert kv.get("l") is not None
        lease.lost.wait(0.05)
    assert not lease.lost.is_set()
    lease.revoke()


def test_keys_go_when_their_lease_is_revoked(connect: Connect) -> None:
    kv = connect()
    lease = kv.lease(30)
    kv.put("l/1", b"1", lease=lease)
    kept = kv.put("l/2", b"2", lease=lease)
    assert kept is not None
    kv.put("l/2", b"free of the lease")
    watch = connect().watch("l/", kept.revision + 2)
    lease.revoke()
    assert [(e.key, e.entry) for e in gather(watch, 1)] == [("l/1", None)]
    assert kv.get("l/2") is not None


def test_keys_go_when_nobody_renews(connect: Connect) -> None:
    kv = connect()

    def put() -> tuple[Lease, Entry] | None:
        """Anew where a busy machine has let the lease end before that."""
        lease = kv.lease(1.0)
        entry = kv.put("l", b"1", lease=lease)
        return (lease, entry) if entry else None

    lease, entry = until("it is put in time", put)
    watch = connect().watch("l", entry.revision + 1)
    lease.stop()
    (event,) = gather(watch, 1)
    assert event.entry is None
    assert time.monotonic() >= lease.deadline_s, "a lease ended before its holder could know"


def test_a_put_under_an_ended_lease_is_refused(connect: Connect) -> None:
    kv = connect()
    lease = kv.lease(30)
    lease.revoke()
    assert kv.put("l", b"1", lease=lease) is None
    assert kv.get("l") is None


def test_a_lease_that_the_store_ended_is_lost(connect: Connect) -> None:
    kv = connect()
    lease = kv.lease(0.4)
    lease._revoke()  # `revoke` would stop its renewals first
    assert lease.lost.wait(60)


def test_what_is_told_aside_is_seen_as_long_as_its_lease_stands(connect: Connect) -> None:
    kv, other = connect(), connect()
    lease = kv.lease(4.0)
    kv.put("l", b"", lease=lease)
    for value in (b"\x00one", b"two"):
        tell(kv, "aside/a", value, lease)
        until("it is seen", lambda value=value: told(other, "aside/") == {"aside/a": value})  # type: ignore[misc]
    assert told(other, "elsewhere/") == {}
    lease.revoke()
    until("it has gone with its lease", lambda: told(other, "aside/") == {})


def test_forgotten_history_is_compacted() -> None:
    state = State(history_events=3)
    for number in range(5):
        state.put("k", str(number).encode(), None, None)
    assert [event.revision for event in state.events("k", 3)] == [3, 4, 5]
    with pytest.raises(Compacted, match="revision 2 is forgotten"):
        state.events("k", 2)


def test_a_stopped_store_does_not_end_leases() -> None:
    state = State()
    lease = state.grant(2.0, now_s=0.0)
    state.put("l", b"1", None, lease)
    state.extend_all(10.0)
    state.expire(now_s=11.0)
    assert state.get("l") is not None
    state.expire(now_s=12.0)
    assert state.get("l") is None


class TestEmbedded:
    """What only the embedded store can do wrong."""

    def test_a_wrong_token_is_refused_in_one_line(self) -> None:
        with EmbeddedServer("127.0.0.1", 0, token="right") as server, pytest.raises(UsageError, match="token"):
            EmbeddedKV("127.0.0.1", server.port, token="wrong").get("a")

    def test_an_address_nobody_listens_on(self) -> None:
        server = EmbeddedServer("127.0.0.1", 0, token="t")
        server.start()
        server.close()
        with pytest.raises(UsageError, match="cannot be reached"):
            EmbeddedKV("127.0.0.1", server.port, token="t").wait_ready(0.2)

    def test_a_watch_resumes_after_a_broken_connection(self) -> None:
        server = EmbeddedServer("127.0.0.1", 0, token="t")
        server.start()
        kv = EmbeddedKV("127.0.0.1", server.port, token="t")
        try:
            watch = kv.watch("", 1)
            kv.put("a", b"1")
            gather(watch, 1)
            watch._connection._drop()
            kv.put("a", b"2")
            assert [e.entry.value for e in gather(watch, 1) if e.entry] == [b"2"]
        finally:
            kv.close()
            server.close()

    def test_a_connection_that_was_idle_for_long_is_not_used_again(self) -> None:
        """The server closes such connections: what is asked on one just before that is not answered."""
        with EmbeddedServer("127.0.0.1", 0, token="t") as server:
            kv = EmbeddedKV("127.0.0.1", server.port, token="t")
            with contextlib.closing(kv):
                kv.put("a", b"1")
                kv._calls._used_s -= IDLE_TIMEOUT_S - 1.0
                assert server._server is not None
                for sock in list(server._server.connections):
                    sock.shutdown(socket.SHUT_RDWR)
                assert kv.get("a") is not None

    def test_a_server_that_is_closed_serves_nobody_who_came_just_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        came, go_on = threading.Event(), threading.Event()

        def held(handler: _Handler) -> None:
            came.set()
            assert go_on.wait(60)

        monkeypatch.setattr(_Handler, "setup", held)
        server = EmbeddedServer("127.0.0.1", 0, token="t")
        server.start()
        with socket.create_connection(("127.0.0.1", server.port), 60) as sock:
            assert came.wait(60)
            server.close()
            go_on.set()
            with pytest.raises((OSError, EOFError)):
                wire.greet_as_client(sock, "t", 60)

    def test_a_server_that_goes_is_unavailable_and_its_leases_are_lost(self) -> None:
        server = EmbeddedServer("127.0.0.1", 0, token="t")
        server.start()
        kv = EmbeddedKV("127.0.0.1", server.port, token="t")
        try:
            lease = kv.lease(0.5)
            server.close()
            with pytest.raises(KVUnavailable):
                kv.get("a")
            assert lease.lost.wait(60)
            assert time.monotonic() >= lease.deadline_s
        finally:
            kv.close()
