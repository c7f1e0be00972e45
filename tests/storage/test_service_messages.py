"""What goes over a connection to the checkpoint service, and who is refused."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.run.owner import Owner
from storage.service import address, channel, messages, processes
from storage.service.channel import Channel, connect
from storage.service.messages import (
    PROTOCOL_VERSION,
    AskStatus,
    Hello,
    ProtocolError,
    Rejected,
    ServiceMessage,
    ServiceStatus,
    Stage,
    StagedAttempt,
    Told,
    Welcome,
)
from tests.storage.service_cases import connected, in_thread

STAGE = Stage(
    session="token-0",
    pid=1,
    url="/runs/a",
    attempt=StagedAttempt(prefix="step-000000010/", step=10, id="a" * 8, world_size=2, rank=1),
    owner=Owner(lineage="a", generation=3, epoch=7, token="token"),
    keep=3,
    timeout_s=1800.0,
    started_s=1.5,
    created_unix_s=2.5,
    told={"RANK": "1"},
)


@pytest.mark.parametrize(
    "message", [STAGE, Hello(pid=1), Told(number=1, event="x", fields={"a": [1, None]}), Rejected(reason="ö")], ids=repr
)
def test_a_message_comes_back_as_it_was(message: ServiceMessage) -> None:
    assert messages.load(messages.dump(message)) == message


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "no message of version"),
        (b"[]", "no message of version"),
        (b'{"Hello":{}, "Stage":{}}', "no message of version"),
        (b'{"Nothing":{}}', "no message of version"),
        (b'{"Hello":{}}', "Hello: pid: Field required"),
        (b'{"Told":{"number":1,"event":"x","fields":{},"more":1}}', "Told: more: Extra inputs"),
    ],
)
def test_what_is_no_message_is_told_in_one_line(data: bytes, told: str) -> None:
    with pytest.raises(ProtocolError, match=told) as raised:
        messages.load(data)
    assert "\n" not in str(raised.value)


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    ends = socket.socketpair()
    channels = Channel(ends[0]), Channel(ends[1])
    yield channels
    for end in channels:
        end.close()


def test_descriptors_travel_with_their_message(pair: tuple[Channel, Channel]) -> None:
    read_fd, write_fd = os.pipe()
    pair[0].send(AskStatus())
    pair[0].send(STAGE, [write_fd])
    os.close(write_fd)
    assert pair[1].receive() == (AskStatus(), [])
    received = pair[1].receive()
    assert received is not None
    message, (fd,) = received
    assert message == STAGE
    assert not os.get_inheritable(fd)
    os.write(fd, b"x")
    assert os.read(read_fd, 1) == b"x"
    os.close(fd)
    os.close(read_fd)
    pair[0].close()
    assert pair[1].receive() is None


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        struct.pack("!4sBI", b"EMcs", 0, channel.MESSAGE_SIZE_BYTES_MAX + 1),
        struct.pack("!4sBI", b"EMcs", 9, 2) + b"{}",
        struct.pack("!4sBI", b"EMcs", 1, 2) + b"{}",
        struct.pack("!4sBI", b"EMcs", 0, 100) + b"{}",
        struct.pack("!4sBI", b"EMcs", 0, 2) + b"{}",
    ],
    ids=["another protocol", "too large", "too many descriptors", "without its descriptor", "cut off", "no message"],
)
def test_what_is_not_this_protocol_ends_the_connection(data: bytes) -> None:
    mine, other = socket.socketpair()
    with mine:
        mine.sendall(data)
        mine.shutdown(socket.SHUT_WR)
        end = Channel(other)
        with pytest.raises(ProtocolError):
            end.receive()
        end.close()


def test_another_version_is_refused_with_a_reason(tmp_path: Path) -> None:
    with in_thread(tmp_path / "run" / "service.sock") as service:
        with pytest.raises(ProtocolError, match=f"speaks version {PROTOCOL_VERSION} of its protocol, and not 1"):
            connect(service.path, Hello(version=1, pid=os.getpid()))
        with connected(service.path):
            pass  # it goes on serving others


def test_a_worker_of_another_pid_namespace_is_refused_and_given_up_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pid is another process here, or none."""
    other = processes.space() + 1
    with in_thread(tmp_path / "run" / "service.sock") as service:
        with pytest.raises(ProtocolError, match="another PID namespace than the checkpoint service"):
            connect(service.path, Hello(pid=1, session="a", pid_space=other))
        for known in (processes.space(), 0):
            connect(service.path, Hello(pid=1, session="a", pid_space=known))[0].close()
    nobody = 1 << 22  # greater than all pids
    assert processes.is_alive(nobody, of_space=other)
    assert not processes.is_alive(nobody, of_space=processes.space())
    monkeypatch.setattr(processes, "space", lambda: 0)
    assert not processes.is_alive(nobody, of_space=other), "nothing is known of namespaces here"


def test_a_service_of_another_version_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "run" / "service.sock"
    with address.listen(path) as listener:
        other = _answering(listener, {"Welcome": {"version": PROTOCOL_VERSION + 1, "pid": 1, "news": "x"}})
        with pytest.raises(ProtocolError, match=f"another protocol than version {PROTOCOL_VERSION}"):
            connect(path, Hello(pid=os.getpid()))
        other.join(60)


def _answering(listener: socket.socket, answer: object) -> threading.Thread:
    def answer_one() -> None:
        connection, _ = listener.accept()
        with connection:
            body = json.dumps(answer).encode()
            connection.sendall(struct.pack("!4sBI", b"EMcs", 0, len(body)) + body)
            connection.recv(1 << 16)

    thread = threading.Thread(target=answer_one, daemon=True)
    thread.start()
    return thread


def test_another_user_is_refused_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strange, uid = "MainThread", os.getuid()
    monkeypatch.setattr(
        Channel, "peer_uid", property(lambda self: 12345 if threading.current_thread().name == strange else uid)
    )
    with in_thread(tmp_path / "run" / "service.sock") as service:
        with pytest.raises(PermissionError, match="is user 12345's"):
            connect(service.path, Hello(pid=os.getpid()))
        strange = "caller"
        with pytest.raises(ProtocolError, match="user 12345 may not use it"):
            connect(service.path, Hello(pid=os.getpid()))


def test_the_socket_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "run" / "service.sock"
    with address.listen(path):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.chmod(0o755)
    with pytest.raises(PermissionError, match="open to other users"):
        address.listen(path)


def test_a_long_path_is_no_obstacle(tmp_path: Path) -> None:
    with in_thread(tmp_path / ("d" * 100) / "service.sock") as service:
        assert service.status().num_unfinished == 0


def test_a_message_that_is_not_for_the_service_ends_the_connection(tmp_path: Path) -> None:
    with in_thread(tmp_path / "run" / "service.sock") as service, connected(service.path) as mine:
        mine.send(Welcome(pid=1))
        assert mine.receive() is None
        assert isinstance(service.status(), ServiceStatus)
