"""Connections of strangers to what an agent listens on: they cost it few descriptors, and the job goes on."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.connections import BoundedConnections, num_max
from launcher.frames import ProtocolError, receive
from launcher.health.liveness import LivenessListener
from launcher.kv.embedded import wire
from launcher.kv.embedded.client import EmbeddedKV
from launcher.kv.embedded.server import EmbeddedServer
from tests.cluster import Cluster, Node, read_lines, until

COOPERATIVE = str(Path(__file__).parent / "scripts" / "cooperative.py")
NUM_STRANGERS = 1000
NUM_DESCRIPTORS = 256


@contextlib.contextmanager
def strangers(port: int, num: int = NUM_STRANGERS) -> Iterator[list[socket.socket]]:
    """Connections that stay: most say nothing, some a byte, some that four gigabytes are to come."""
    with contextlib.ExitStack() as held:
        found = []
        for number in range(num):
            sock = held.enter_context(socket.socket())
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(("127.0.0.1", port))
            found.append(sock)
            if number % 10 == 0:
                with contextlib.suppress(OSError):
                    sock.send(b"\xff\xff\xff\xff{" if number % 20 else b"\0")
        yield found


@contextlib.contextmanager
def few_descriptors() -> Iterator[None]:
    """For the processes that are started meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (NUM_DESCRIPTORS, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def num_descriptors() -> int:
    return psutil.Process().num_fds()


def gate(*hosts: str, limit: int = 3) -> tuple[BoundedConnections, list[socket.socket], list[socket.socket | None]]:
    """BoundedConnections of those hosts, one after the other; they, and who had to go for each."""
    connections, socks = BoundedConnections(limit), [socket.socket() for _ in hosts]
    gone = [connections.admit(sock, host, float(at)) for at, (sock, host) in enumerate(zip(socks, hosts, strict=True))]
    for sock in socks:
        sock.close()
    return connections, socks, gone


def test_who_goes_is_the_oldest_of_the_host_with_the_most() -> None:
    connections, socks, gone = gate("a", "b", "b", "b", "b")
    assert gone == [None, None, None, socks[1], socks[2]]
    assert len(connections) == 3 and connections.leave(socks[0]) and not connections.leave(socks[0])
    assert gate("a", "b", "c", "d")[2][3] is not None
    assert connections.admit(socks[0], "c", 9.0) is None, "there is room again"


def test_who_has_just_come_is_left_time_to_greet() -> None:
    connections, socks, _ = gate("a", "a", "a")
    began_s = time.monotonic()
    connections.wait_for_room(0.2, 0.0)
    assert time.monotonic() - began_s >= 0.15
    began_s = time.monotonic()
    connections.wait_for_room(0.2, 100.0)
    threading.Timer(0.1, connections.leave, (socks[1],)).start()
    connections.wait_for_room(60.0, 0.0)
    assert time.monotonic() - began_s < 30


def test_a_listener_keeps_a_part_of_the_descriptors() -> None:
    with few_descriptors():
        assert num_max() == NUM_DESCRIPTORS // 8
    assert num_max(10) == 10


def test_a_listener_keeps_few_connections_and_still_answers() -> None:
    with few_descriptors():
        bell = LivenessListener("127.0.0.1")
        bell.start()
    try:
        with strangers(bell.port) as connections:
            before = num_descriptors()
            # Not all in the order in which they were opened: the kernel lets some wait where the listener is slow.
            until("many are turned away", lambda: sum(map(is_closed, connections)) >= NUM_STRANGERS // 2)
            assert num_descriptors() - before <= NUM_DESCRIPTORS // 8 + 1, "one that comes is there before another goes"
            until(
                "one stays, of which the strangers that are still to be accepted turn none away",
                lambda: stays(bell.port),
            )
    finally:
        bell.close()


def stays(port: int) -> bool:
    """Whether a connection that is opened now is still there in a moment; a neighbour opens one that is not anew."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as link:
        link.settimeout(0.3)
        try:
            link.recv(1)
        except TimeoutError:
            return True
        except OSError:
            pass
        return False


def is_closed(sock: socket.socket) -> bool:
    try:
        return not sock.recv(1 << 16)
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_the_embedded_store_serves_its_clients_among_strangers() -> None:
    with few_descriptors():
        server = EmbeddedServer("127.0.0.1", 0, token="t")
        server.start()
    try:
        client = EmbeddedKV(["127.0.0.1"], server.port, token="t")
        client.put("before", b"1")
        with strangers(server.port):
            until("their connections are there", lambda: len(server._server.strangers) >= NUM_DESCRIPTORS // 8)
            assert len(server._server.connections) <= 2 * NUM_DESCRIPTORS // 8
            client.put("key", b"2")  # who has shown that it knows the token stays
            other = EmbeddedKV(["127.0.0.1"], server.port, token="t")
            until("a new client is served", lambda: _get(other, "key") == b"2")
            other.close()
        client.close()
    finally:
        server.close()


def _get(client: EmbeddedKV, key: str) -> bytes | None:
    with contextlib.suppress(Exception):
        entry = client.get(key)
        return entry.value if entry else None
    return None


def test_a_handshake_ends_in_time_however_it_is_fed() -> None:
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def feed() -> None:
        theirs.sendall(struct.pack(">I", 1000))
        while not stop.wait(0.05):
            with contextlib.suppress(OSError):
                theirs.send(b" ")

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        for greet in (
            lambda: wire.greet_as_server(ours, "t", "store", 0.4),
            lambda: wire.greet_as_client(ours, "t", 0.4),
        ):
            began_s = time.monotonic()
            with pytest.raises((TimeoutError, ProtocolError)):
                greet()
            assert time.monotonic() - began_s < 30
    finally:
        stop.set()
        feeder.join()
        ours.close()
        theirs.close()


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1000,
        b"{" * 900,
        b'{"nonce": "\\ud800", "proof": "\\udfff"}',
        b'{"nonce": 1e999}',
        b"\xff" * 10,
        b"1" * 900,
    ],
)
def test_a_strangers_greeting_raises_nothing_else(body: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack(">I", len(body)) + body)
        with pytest.raises(ProtocolError):
            wire.greet_as_server(ours, "t", "store", 60)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        hello = json.dumps({"protocol": wire.PROTOCOL, "nonce": "\ud800"}).encode()
        theirs.sendall(struct.pack(">I", len(hello)) + hello + struct.pack(">I", len(body)) + body)
        with pytest.raises(ProtocolError):
            wire.greet_as_client(ours, "t", 60)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack(">I", 1 << 31))
        with pytest.raises(ProtocolError, match="more than"):
            receive(ours, 1024)


class FewDescriptors(Cluster):
    """Nodes with few descriptors; this process, which has the strangers, keeps its own."""

    def spawn(self, name: str, arguments: list[str], environment: dict[str, str], log: int) -> subprocess.Popen[bytes]:
        limited = (
            "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2);"
            "os.execv(sys.executable, [sys.executable, '-m', 'elastic_moe', *sys.argv[2:]])"
        )
        command = [sys.executable, "-c", limited, str(NUM_DESCRIPTORS), *arguments]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "nodes").mkdir()
    made = FewDescriptors(tmp_path / "nodes")
    yield made
    made.end()


def largest(node: Node) -> psutil.Process:
    """Of a node's processes, some of which come and go."""
    size_bytes = {}
    for process in node.tree():
        with contextlib.suppress(psutil.NoSuchProcess):
            size_bytes[process] = process.memory_info().rss
    return max(size_bytes, key=size_bytes.__getitem__)


def listening(pid: int) -> list[int]:
    return [c.laddr.port for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]


@pytest.mark.slow
def test_a_job_goes_on_with_a_thousand_strangers_at_each_listener(nodes: Cluster, tmp_path: Path) -> None:
    def steps(**fields: int) -> list[dict[str, int]]:
        done = read_lines(tmp_path / "steps.jsonl")
        return [step for step in done if all(step[name] == value for name, value in fields.items())]

    conf = "join_cooldown=1,last_call=1"
    first = nodes.start("first", COOPERATIVE, str(tmp_path), conf=conf)
    until("steps of one node", lambda: steps(generation=1))
    ports = listening(first.process.pid)
    assert len(ports) >= 3, "the listener, the embedded store, the workers' store"
    with contextlib.ExitStack() as held:
        for port in ports:
            held.enter_context(strangers(port))
        second = nodes.start("second", COOPERATIVE, str(tmp_path), conf=conf)
        joined = until("steps of both", lambda: steps(world_size=2))[0]["generation"]
        for port in set(listening(first.process.pid) + listening(second.process.pid)) - set(ports):
            held.enter_context(strangers(port))
        largest(second).kill()
        until("steps after a worker died", lambda: [s for s in steps(world_size=2) if s["generation"] > joined])
        assert psutil.Process(first.process.pid).num_fds() < NUM_DESCRIPTORS * 3 // 4
        (tmp_path / "finish").touch()
        assert first.wait() == 0, first.output
        assert second.wait() == 0, second.output
    assert not nodes.events("node_lost"), "nobody was taken for dead"
