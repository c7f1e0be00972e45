"""Nodes that read each other's memory and hold copies for each other, and whom they do not believe."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from storage.errors import Corrupt, Denied, NotFound, StorageError
from storage.held.buddies import PeerCard
from storage.held.copy_buffer import CopyMemory
from storage.held.inventory import HeldObject, HeldPart
from storage.held.nearest import Nearness
from storage.held.papers import dump_papers
from storage.held.peer_client import Peer
from storage.held.peer_server import CopyRules
from storage.held.rate import RateLimit
from storage.held.wire import PROTOCOL, HoldCopy, Ready
from tests.cluster import until
from tests.storage.held_cases import (
    Anonymous,
    Seen,
    Staged,
    Told,
    add,
    check,
    damaged,
    meet,
    nodes,
    of,
    restore,
    store_with,
)

WAIT_S = 60.0


def held(node: Any) -> list[tuple[int, int, str]]:
    return [(label.step, label.rank, label.attempt) for label in node.inventory.labels()]


def test_what_a_node_stages_is_copied_to_its_buddy_and_outlives_it() -> None:
    told: Told = []
    with nodes(["a", "b"], told) as (a, b):
        meet([a, b])
        staged = Staged(20)
        add(a, staged, 0)
        add(b, staged, 1)
        assert a.copied(WAIT_S) and b.copied(WAIT_S)
        a.close()
        check(20, restore(store_with(10), Seen([b]), []))
    copies = sorted((row["by"], row["of_rank"], row["to"], row["step"]) for row in of(told, "checkpoint_copied"))
    assert copies == [("a", 0, "b", 20), ("b", 1, "a", 20)]
    assert all(row["bytes"] > 0 for row in of(told, "checkpoint_copied"))


def test_with_both_nodes_gone_that_held_it_the_stores_is_taken() -> None:
    told: Told = []
    with nodes(["a", "b", "c"]) as (a, b, c):
        meet([a, b, c])
        staged = Staged(20, world_size=3)
        for rank, node in enumerate((a, b, c)):
            add(node, staged, rank)
        assert all(node.copied(WAIT_S) for node in (a, b, c))
        a.close()  # a's copy is with b
        b.close()
        assert restore(store_with(10), Seen([c]), told)[0] == 10
    assert of(told, "checkpoint_held_in_part")[0]["reason"] == "nobody holds what it is made of"


def test_a_new_buddy_is_given_what_is_held_by_then() -> None:
    with nodes(["a", "b", "c"]) as (a, b, c):
        add(a, Staged(20, world_size=1), 0)
        meet([a, b, c])
        assert a.copied(WAIT_S) and len(held(b)) == 1
        b.close()
        meet([a, c])
        assert a.copied(WAIT_S) and len(held(c)) == 1


def test_a_copy_that_is_damaged_on_its_way_or_where_it_comes_from_is_held_by_nobody() -> None:
    told: Told = []
    with nodes(["a", "b"], told) as (a, b):
        meet([a, b])
        add(a, Staged(20), 0, change=damaged)
        assert a.copied(WAIT_S)
        assert held(b) == []
        assert "does not match" in of(told, "checkpoint_copy_failed")[0]["reason"]
        add(a, Staged(30), 0)
        assert a.copied(WAIT_S)
        assert [step for step, _, _ in held(b)] == [30]


def no_memory(size_bytes: int) -> CopyMemory:
    raise MemoryError("none left")


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (None, "holds no copies"),
        (CopyRules(no_memory, 1 << 30), "none left"),
        (CopyRules(Anonymous, 1000), "more than 1000"),
    ],
)
def test_a_buddy_without_room_says_so(rules: CopyRules | None, reason: str) -> None:
    told: Told = []
    with nodes(["a", "b"], told, rules) as (a, b):
        meet([a, b])
        add(a, Staged(20), 0)
        assert a.copied(WAIT_S)
        (fields,) = of(told, "checkpoint_copy_failed")
        assert reason in fields["reason"]
        assert (fields["to"], held(a)[0][0], held(b)) == ("b", 20, [])


def test_no_more_than_two_copies_of_a_part_are_in_memory_at_once() -> None:
    sizes: list[int] = []
    live: list[int] = []

    class Counted(Anonymous):
        def __init__(self, size_bytes: int) -> None:
            super().__init__(size_bytes)
            sizes.append(size_bytes)
            live.append(len(sizes) - num_closed[0])

        def close(self) -> None:
            num_closed[0] += 1

    num_closed = [0]
    with nodes(["a", "b"], copies=CopyRules(Counted, 1 << 30)) as (a, b):
        meet([a, b])
        for step in (10, 20, 30, 40):
            add(a, Staged(step), 0)
            assert a.copied(WAIT_S)
        assert [step for step, _, _ in held(b)] == [40, 30]
    assert (len(sizes), max(live), num_closed[0]) == (4, 2, 4)


def test_a_copy_that_comes_slowly_keeps_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.held.peer_server.STALL_S", WAIT_S)
    told: Told = []
    with nodes(["a", "b"], told) as (a, b):
        meet([a, b])
        papers = dump_papers(Staged(10).part(0).papers)
        with contextlib.closing(Peer(b.card())._connect()) as slow:
            slow.send(HoldCopy(of_node="c", length=len(papers)), [memoryview(papers)])
            slow.receive(Ready)
            add(a, Staged(20), 0)
            assert a.copied(WAIT_S)
            assert (of(told, "checkpoint_copy_failed"), [step for step, _, _ in held(b)]) == ([], [20])


def test_reading_from_a_peer() -> None:
    with nodes(["a"]) as (a,):
        staged = Staged(20)
        part = staged.part(0)
        a.add(part)
        peer = Peer(a.card())
        with contextlib.closing(peer):
            assert peer.labels() == (part.label,)
            assert peer.papers(part.key) == part.papers
            name, held_object = max(part.objects.items(), key=lambda row: row[1].size_bytes)
            first, second = bytearray(100), bytearray(1000)
            peer.read_into(part.key, name, 50, [memoryview(first), memoryview(second)])
            assert bytes(first + second) == b"".join(held_object.views(50, 1100))
            with pytest.raises(NotFound, match="is not held here"):
                peer.papers(("deadbeef", 0))
            with pytest.raises(NotFound, match="is no object of that part"):
                peer.read_into(part.key, "attempt-deadbeef/__0_0.distcp", 0, [memoryview(first)])
            with pytest.raises(Corrupt, match="ends at"):
                peer.read_into(part.key, name, held_object.size_bytes, [memoryview(first)])
            assert len(peer._idle) == 1  # one connection has served all


def test_who_does_not_know_the_token_is_told_nothing() -> None:
    told: Told = []
    with nodes(["a"], told) as (a,):
        add(a, Staged(20), 0)
        with pytest.raises(Denied, match="a the token is not this node's"):
            Peer(a.card().model_copy(update={"token": "0" * 64})).labels()
        (fields,) = until("the event", lambda: of(told, "checkpoint_peer_refused"))
        assert fields["reason"] == "the token is not this node's"
        with contextlib.closing(Peer(a.card())) as peer:
            assert len(peer.labels()) == 1


@contextlib.contextmanager
def impostor(converse: Callable[[socket.socket], None]) -> Iterator[PeerCard]:
    """Something that listens where a node should, and talks as it likes, to one after the other."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                converse(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield PeerCard(node="b", host="host-b", address="127.0.0.1", port=listener.getsockname()[1], token="0" * 64)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def say(connection: socket.socket, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    connection.sendall(struct.pack(">I", len(body)) + body)


def of_another_version(connection: socket.socket) -> None:
    say(connection, {"kind": "hello", "version": PROTOCOL + 1, "nonce": "00" * 16})
    connection.recv(1)


def without_the_token(connection: socket.socket) -> None:
    say(connection, {"kind": "hello", "version": PROTOCOL, "nonce": "00" * 16})
    connection.recv(4096)
    say(connection, {"kind": "proved", "proof": "00" * 32})
    connection.recv(1)


def of_nonsense(connection: socket.socket) -> None:
    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    connection.recv(1)


def of_too_much(connection: socket.socket) -> None:
    connection.sendall(struct.pack(">I", 1 << 31) + b"x" * 100)
    connection.recv(1)


def silent(connection: socket.socket) -> None:
    connection.recv(1)


@pytest.mark.parametrize(
    ("converse", "reason"),
    [
        (of_another_version, f"speaks protocol {PROTOCOL + 1} and not {PROTOCOL}"),
        (without_the_token, "does not know its own token"),
        (of_nonsense, "more than 65536"),
        (of_too_much, "more than 65536"),
        (silent, "sends nothing any more"),
        (lambda connection: None, "has closed the connection"),
    ],
    ids=["another version", "no token", "nonsense", "too much", "silent", "closes"],
)
def test_a_peer_that_is_none_is_told_and_the_next_source_is_read(
    converse: Callable[[socket.socket], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: Told = []
    with impostor(converse) as card, nodes(["a", "b"]) as (a, b):

        def peer(of: PeerCard, near: Nearness) -> Peer:
            return Peer(of, near, stall_s=0.5 if of.port == card.port and converse is silent else WAIT_S)

        monkeypatch.setattr("storage.loading.memory_tier.Peer", peer)
        staged = Staged(20)
        add(a, staged, 0)
        add(b, staged, 1)
        c_card = b.card().model_copy(update={"node": "c"})
        real, b.card = b.card, lambda: card  # type: ignore[method-assign]

        class Third:  # the same memory by its true address, under another name
            card = staticmethod(lambda: c_card)
            labels, num_restores, restored = b.labels, b.num_restores, b.restored

        check(20, restore(store_with(10), Seen([a, b, Third()]), told))  # type: ignore[list-item]
        b.card = real  # type: ignore[method-assign]
    failed = of(told, "checkpoint_source_failed")
    assert failed and {row["node"] for row in failed} == {"b"}
    assert all(reason in row["reason"] for row in failed)


def lying(part: HeldPart) -> HeldPart:
    """The part with other bytes in every object, of the same length."""
    objects = {name: HeldObject([bytes(held.size_bytes)]) for name, held in part.objects.items()}
    return HeldPart(part.papers, objects, part.of_node)


def test_a_peer_that_lies_about_its_bytes_is_not_believed() -> None:
    told: Told = []
    with nodes(["a", "b", "c"]) as (a, b, c):
        staged = Staged(20)
        add(a, staged, 0)
        add(b, staged, 1, change=lying)
        add(c, staged, 1)
        check(20, restore(store_with(10), Seen([a, b, c]), told))
    assert {row["node"] for row in of(told, "checkpoint_source_failed")} == {"b"}


def test_a_peer_that_lies_about_what_it_holds_is_not_believed() -> None:
    told: Told = []
    with nodes(["a", "b"]) as (a, b):
        staged = Staged(20)
        add(a, staged, 0)
        part = staged.part(1)
        label = part.label.model_copy(update={"step": 21, "generation": 9})
        b.add(HeldPart(part.papers.model_copy(update={"label": label}), part.objects))
        seen = Seen([a, b])
        check(10, restore(store_with(10), seen, told))
    assert of(told, "checkpoint_held_in_part")


def test_closing_ends_all_threads_and_lets_all_memory_go() -> None:
    freed: list[str] = []
    before = set(threading.enumerate())
    with nodes(["a", "b"]) as (a, b):
        meet([a, b])
        a.add(Staged(20).part(0, lambda: freed.append("a")))
        assert a.copied(WAIT_S)
        peer = Peer(a.card())
        assert peer.labels()
    assert freed == ["a"]
    assert not set(threading.enumerate()) - before
    with pytest.raises(StorageError):
        peer.labels()
    peer.close()


def test_a_copy_goes_at_the_rate_that_is_allowed_and_ends_when_its_node_does() -> None:
    told: Told = []
    with nodes(["a", "b"], told) as (a, b):
        a._rate = RateLimit(1000.0)  # it would take minutes
        meet([a, b])
        add(a, Staged(20), 0)
        a.close()
        assert held(b) == []
    assert of(told, "checkpoint_copied") == of(told, "checkpoint_copy_failed") == []


def test_memory_that_is_freed_while_it_is_sent_is_not_overwritten_before() -> None:
    freed = threading.Event()
    with nodes(["a"]) as (a,):
        staged = Staged(20)
        part = staged.part(0, freed.set)
        a.add(part)
        with a.inventory.reading(*part.key):
            a.drop(None, "for the test")
            assert not freed.is_set()
            with contextlib.closing(Peer(a.card())) as peer, pytest.raises(NotFound):
                peer.papers(part.key)
        assert freed.wait(WAIT_S)
