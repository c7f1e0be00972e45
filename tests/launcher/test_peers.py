"""A neighbour's death is heard at once; a link that breaks without it is not taken for it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

from launcher.health.liveness import LivenessListener, connect, is_refused
from launcher.health.peers import PeerWatch
from launcher.rounds.partitions import watched_by
from launcher.rounds.records import Participant, Round
from tests.cluster import until

BELL = """
import sys, time
from launcher.health.liveness import LivenessListener
listener = LivenessListener("127.0.0.1")
listener.start()
print(listener.port, flush=True)
time.sleep(600)
"""


class Reports(list[tuple[str, str]]):
    def __call__(self, node_id: str, reason: str) -> None:
        self.append((node_id, reason))


@pytest.fixture
def reports() -> Reports:
    return Reports()


@pytest.fixture
def peers(reports: Reports) -> Iterator[PeerWatch]:
    with PeerWatch(reports, lambda node_id: reports(node_id, "silent")) as made:
        yield made


@pytest.fixture
def peer() -> Iterator[tuple[subprocess.Popen[str], Participant]]:
    with subprocess.Popen([sys.executable, "-c", BELL], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield process, Participant("peer", 1, "127.0.0.1", port)
        process.kill()


def names(watched: Sequence[Participant]) -> list[str]:
    return [p.node_id for p in watched]


def test_the_next_two_are_watched_around_the_end() -> None:
    current = Round(1, "L", tuple(Participant(n, 1) for n in "abcd"), None, (), "")
    assert names(watched_by(current, "a")) == ["b", "c"]
    assert names(watched_by(current, "d")) == ["a", "b"]
    assert watched_by(current, "x") == ()
    two = Round(1, "L", tuple(Participant(n, 1) for n in "ab"), None, (), "")
    assert names(watched_by(two, "b")) == ["a"]
    assert watched_by(Round(1, "L", (Participant("a", 1),), None, (), ""), "a") == ()


def test_a_killed_neighbour_is_reported(
    peers: PeerWatch, reports: Reports, peer: tuple[subprocess.Popen[str], Participant]
) -> None:
    process, node = peer
    peers.watch([node])
    until("linked", lambda: linked(node.port))
    assert not reports
    process.kill()
    until("reported", lambda: reports)
    assert reports[0][0] == "peer"
    assert "connection refused" in reports[0][1]


def test_a_neighbour_that_is_already_dead_is_reported(peers: PeerWatch, reports: Reports) -> None:
    bell = LivenessListener("127.0.0.1")
    bell.start()
    bell.close()
    peers.watch([Participant("gone", 1, "127.0.0.1", bell.port)])
    until("reported", lambda: reports)


def test_a_link_that_breaks_is_not_a_death(peers: PeerWatch, reports: Reports) -> None:
    with socket.create_server(("127.0.0.1", 0)) as alive:
        alive.settimeout(60)
        port = alive.getsockname()[1]
        peers.watch([Participant("alive", 1, "127.0.0.1", port)])
        alive.accept()[0].close()
        alive.accept()[0].close()  # it asks whether somebody is there
        peers.close()
    assert not reports


def test_a_neighbour_whose_first_link_fails_is_linked_anew(
    peers: PeerWatch, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def slow_once(address: str, port: int, timeout_s: float) -> socket.socket:
        tries.append(port)
        if len(tries) == 1:
            raise TimeoutError("timed out")
        return connect(address, port, timeout_s)

    monkeypatch.setattr("launcher.health.peers.connect", slow_once)
    bell = LivenessListener("127.0.0.1")
    bell.start()
    peers.watch([Participant("slow", 1, "127.0.0.1", bell.port)])
    until("linked", lambda: tries[1:])
    bell.close()
    until("reported", lambda: reports)


def linked(port: int) -> set[str]:
    """Established connections to a port, from /proc/net/tcp (proc(5))."""
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    return {row[1] for row in rows if row[2].endswith(f":{port:04X}") and row[3] == "01"}


def test_a_listener_answers_many_and_refuses_once_closed() -> None:
    bell = LivenessListener("127.0.0.1")
    bell.start()
    for _ in range(50):
        assert not is_refused("127.0.0.1", bell.port)
    bell.close()
    assert is_refused("127.0.0.1", bell.port)


def test_a_silent_neighbour_is_told_apart(peers: PeerWatch, reports: Reports) -> None:
    """A queue of connections that is full and never emptied: the kernel drops what else comes, as a cut would."""
    with contextlib.ExitStack() as stack:
        deaf = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = deaf.getsockname()[1]
        while True:
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0.5)
            try:
                filler.connect(("127.0.0.1", port))
            except TimeoutError:
                break
        peers.watch([Participant("deaf", 1, "127.0.0.1", port)])
        until("told", lambda: reports)
    assert reports == [("deaf", "silent")]
