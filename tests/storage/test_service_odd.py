"""Whatever somebody sends to a service, or to another node's memory: one line, that connection ends, it goes on."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.agent import AgentEnvironment
from storage.arena.slot import Slot
from storage.errors import Corrupt, StorageError
from storage.format.sealed import check_seal, seal_bytes
from storage.held.inventory import HeldPart
from storage.held.papers import dump_papers, load_papers
from storage.held.peer_client import Peer
from storage.held.wire import HoldCopy, Ready
from storage.service import table
from storage.service.held_messages import AskCard, AskHeld, AskPart, DropHeld, MeetNodes, NoteRestored
from storage.service.memory import HeldStates
from storage.service.messages import AskStatus, AskUnfinished, Heard, Hello, ProtocolError, dump
from storage.service.server import Server
from tests.cluster import until
from tests.storage.held_cases import Seen, Staged, nodes, restore, store_with, whole
from tests.storage.service_cases import connected, events_in, in_thread, process
from tests.storage.test_service_messages import STAGE

SEEDS = (*range(int(os.environ.get("ODD_SEEDS", "40"))), 54, 74)  # these have found something
MESSAGES = (
    *(Hello(pid=1), STAGE, Heard(number=1), AskUnfinished(url="/run"), AskStatus(), AskCard(node="a")),
    *(MeetNodes(cards=()), AskHeld(run="/run"), AskPart(attempt="a" * 8, rank=0)),
    *(NoteRestored(attempt="a" * 8, step=1), DropHeld(attempts=("a" * 8,), reason="")),
)
ODD = (None, -1, 0, 1, 7, 1 << 40, 1 << 70, 0.5, "", "x", "0" * 64, [], {}, [[]], [None], True)


def leaves(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a JSON document."""
    yield path
    rows = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in rows:
        yield from leaves(value, (*path, key))


def changed(document: Any, rng: random.Random) -> Any:
    """The document with something else in one place, or without that."""
    path = rng.choice([found for found in leaves(document) if found])
    made = json.loads(json.dumps(document))
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    if rng.random() < 0.2:
        del inner[path[-1]]
    else:
        inner[path[-1]] = rng.choice(ODD)
    return made


def several_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log has that is more than one line."""
    return [record.getMessage() for record in caplog.records if "\n" in record.getMessage() or record.exc_info]


def odd_bytes(rng: random.Random) -> tuple[bytes, int]:
    """A head and a body, right or not, and how many descriptors it promises."""
    body = dump(rng.choice(MESSAGES))
    body = json.dumps(changed(json.loads(body), rng)).encode() if rng.random() < 0.8 else rng.randbytes(50)
    num_fds = rng.randrange(3)
    return struct.pack("!4sBI", b"EMcs", num_fds, len(body) + rng.choice((0, 0, 0, 1, -1))) + body, num_fds


def test_a_service_goes_on_whatever_a_caller_sends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    num_fds = len(os.listdir("/proc/self/fd"))
    with in_thread(tmp_path / "node" / "service.sock", held=HeldStates()) as service:
        for seed in SEEDS:
            data, num = odd_bytes(random.Random(seed))
            fds = [os.memfd_create("odd") for _ in range(num)]
            with connected(service.path, "token-0") as caller, contextlib.suppress(OSError, ProtocolError):
                socket.send_fds(caller._socket, [data], fds)
                caller._socket.shutdown(socket.SHUT_WR)
                while caller.receive() is not None:
                    pass
            for fd in fds:
                os.close(fd)
        until("the last save to be looked into", lambda: service.status().num_unfinished == 0)
    assert several_lines(caplog) == []
    until("all descriptors to be closed", lambda: len(os.listdir("/proc/self/fd")) <= num_fds)


@pytest.mark.parametrize("size_bytes", [0, 1, 4096])
def test_a_table_that_is_none_is_refused(size_bytes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with in_thread(tmp_path / "node" / "service.sock") as service, connected(service.path, "token-0") as caller:
        fd = os.memfd_create("odd", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size_bytes)
        caller.send(STAGE, [fd])
        os.close(fd)
        received = caller.receive()
        assert received is not None and "no slot" in getattr(received[0], "reason", "")
        assert service.status().num_unfinished == 0


def test_a_handler_that_fails_ends_that_connection_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise IndexError("a fault\nin two lines")

    monkeypatch.setattr(Server, "_take", fail)
    with in_thread(tmp_path / "node" / "service.sock") as service:
        with connected(service.path, "token-0") as caller:
            fd = slot_fd()
            caller.send(STAGE, [fd])
            os.close(fd)
            assert caller.receive() is None
        assert service.status().num_unfinished == 0


def test_what_fails_on_what_was_staged_is_that_saves_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise IndexError("a fault")

    monkeypatch.setattr(table, "read", fail)
    with in_thread(tmp_path / "node" / "service.sock") as service, connected(service.path, "token-0") as caller:
        for number in range(2):  # the next one is taken as the first was
            fd = slot_fd()
            stage = STAGE.model_copy(update={"attempt": STAGE.attempt.model_copy(update={"step": number})})
            caller.send(stage, [fd])
            os.close(fd)
            received = caller.receive()
            assert received is not None and "a fault" in getattr(received[0], "reason", "")
        assert service.status().num_unfinished == 0


def test_what_a_service_tells_of_a_url_has_none_of_its_secrets(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    told = {AgentEnvironment.variable("events"): str(events)}
    stage = STAGE.model_copy(update={"url": "nosuch://host/run?sig=hunter2", "told": told})
    with process(tmp_path / "node" / "service.sock") as service:
        service.pid()
        with connected(service.path) as caller, contextlib.closing(table.write([], None, None, None)) as listed:
            caller.send(stage, [listed.fd])
            (failed,) = until("its end", lambda: events_in(events))
        assert failed["event"] == "checkpoint_failed"
        assert "no store for nosuch:// in 'nosuch://host/run?sig=...'" in failed["reason"]
        assert "nosuch://host/run?sig=..." in service.log()
        assert "hunter2" not in service.log()


def slot_fd() -> int:
    slot = Slot.create(4096)
    found = os.dup(slot.fd)
    slot.close()
    return found


# --- another node's memory


def papers_of(part: HeldPart, change: Callable[[Any], Any]) -> bytes:
    """The part's papers with another content, sealed."""
    body = check_seal("part", dump_papers(part.papers), "papers")
    return seal_bytes("part", json.dumps(change(json.loads(body))).encode())


def offer(peer: Peer, papers: bytes, objects: int) -> None:
    """Have the node hold a part of those papers, and send it zeroes."""
    with peer._connection() as wire:
        wire.send(HoldCopy(of_node="c", length=len(papers)), [memoryview(papers)])
        wire.receive(Ready)
        wire.send_bytes([memoryview(bytes(objects))])
        wire.receive(Ready)


def test_odd_papers_are_refused_and_the_node_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """An item of an object that there is not was an IndexError once, and the end of the thread."""
    part = Staged(20).part(0)

    def elsewhere(papers: Any) -> Any:
        papers["receipt"]["items"]["object"][0] = 7
        return papers

    with nodes(["a"]) as (a,), contextlib.closing(Peer(a.card())) as peer:
        with pytest.raises(Corrupt, match="not those of one part"):
            offer(peer, papers_of(part, elsewhere), part.label.size_bytes)

        for seed in SEEDS:
            odd = papers_of(part, functools.partial(changed, rng=random.Random(seed)))
            with contextlib.suppress(StorageError):
                offer(peer, odd, part.label.size_bytes)
                raise AssertionError(f"seed {seed}: what is zeroes is not what the papers say")
        assert len(peer.labels()) == 0
        assert several_lines(caplog) == []


@pytest.mark.parametrize("is_known", [True, False])
def test_a_node_goes_on_whatever_a_connection_says(is_known: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "storage.held")
    with nodes(["a"]) as (a,):
        card = a.card()

        def send(rng: random.Random) -> None:
            data = rng.choice((rng.randbytes(rng.randrange(1, 200)), json.dumps(rng.choice(ODD)).encode()))
            framed = rng.choice((b"", struct.pack(">I", len(data)))) + data
            if is_known:
                with contextlib.closing(Peer(card)._connect()) as wire, contextlib.suppress(StorageError, OSError):
                    wire.send_bytes([memoryview(framed)])
                    wire._socket.shutdown(socket.SHUT_WR)
                    wire.receive_bytes(1)
                return
            with contextlib.suppress(OSError), socket.create_connection((card.address, card.port)) as stranger:
                stranger.sendall(framed)
                stranger.shutdown(socket.SHUT_WR)
                stranger.settimeout(60)
                while stranger.recv(4096):
                    pass

        for seed in SEEDS:
            send(random.Random(seed))
        with contextlib.closing(Peer(card)) as peer:
            assert peer.labels() == ()
    assert several_lines(caplog) == []
    assert any("is no message of this protocol" in record.getMessage() for record in caplog.records)


def test_a_peer_with_odd_papers_is_not_believed() -> None:
    """Whatever the papers of a part are changed to: the right state from memory, or the store's."""
    store, staged = store_with(10), Staged(20)
    part = staged.part(1)

    for seed in SEEDS:
        try:
            odd = load_papers(papers_of(part, functools.partial(changed, rng=random.Random(seed))), "papers")
        except StorageError:
            continue  # so says whoever asks for them
        with nodes(["a", "b"]) as (a, b):
            a.add(staged.part(0))
            b.add(HeldPart(odd, part.objects))
            step, state = restore(store, Seen([a, b]), [])
        assert (step, state["n"]) in ((10, 10), (20, 20)), seed
        assert state["w"].equal(whole(step, 2)), seed
