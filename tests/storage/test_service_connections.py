"""Connections of a worker to its service that are lost, made anew or late, and what is said by each."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from storage import Checkpointer, CheckpointEvent
from storage.agent import AgentEnvironment
from storage.service import client, lanes, sidecar
from storage.service.client import ServiceBackend
from storage.service.messages import Drain, Drained, Released
from storage.service.server import ServerOptions
from storage.service.sessions import Session, Sessions
from storage.service.ways import ServiceAt
from tests.cluster import until
from tests.storage.service_cases import InThread, answering, committed, connected, in_thread
from tests.storage.small_runs import Events, state


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InThread]:
    """The service of an agent, which the environment names."""
    monkeypatch.setenv(AgentEnvironment.variable("service"), str(tmp_path / "node" / "service.sock"))
    with in_thread(tmp_path / "node" / "service.sock") as service:
        yield service


@pytest.mark.parametrize("num_crashes", [0, 2])
def test_a_service_that_crashes_while_it_drains_is_asked_again(num_crashes: int, tmp_path: Path) -> None:
    told: list[str] = []
    service = sidecar.CheckpointService()
    service._process, service._path, service._tell = Mock(), tmp_path / "node" / "service.sock", told.append
    with answering(service._path, *[None] * num_crashes, Drained(num_finished=1, num_abandoned=3)) as asked:
        service.drain(60.0)
    assert told == ["3 saves were given up, as there was no more time"]
    graces = [question.grace_s for question in asked if isinstance(question, Drain)]
    assert len(graces) == num_crashes + 1 and sorted(graces, reverse=True) == graces and graces[0] <= 60.0
    told.clear()
    with answering(service._path, None):
        service.drain(0.0)
    assert told == ["it cannot be drained: it has crashed meanwhile, and there is no more time"]


@pytest.mark.parametrize(("code", "told"), [(0, []), (-9, ["it has ended (exit code -9), and is started again"])])
def test_a_service_that_ends_once_it_was_drained_is_not_started_again(
    code: int, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agent may come late to close it. What is killed may still have something to bring to its end."""
    heard: list[str] = []
    service = sidecar.CheckpointService()
    service._process, service._path, service._tell = Mock(), tmp_path / "node" / "service.sock", heard.append
    service._process.wait.return_value = code

    def run(lifeline: int) -> object:
        service._is_closing.set()
        return service._process

    monkeypatch.setattr(service, "_run", run)
    with answering(service._path, Drained(num_finished=1, num_abandoned=0)):
        service.drain(60.0)
    service._watch(os.open(os.devnull, os.O_RDONLY))
    assert heard == told


def test_who_connects_again_is_not_forgotten_meanwhile(node: InThread, monkeypatch: pytest.MonkeyPatch) -> None:
    of, tidy, name = Sessions.of, threading.Event(), "token-0"

    def tidy_up() -> None:
        node.server._tidy()
        tidy.set()

    def slowly(self: Sessions, session: str) -> Session:
        found = of(self, session)
        tidying = threading.Thread(target=tidy_up)
        tidying.start()
        tidying.join(0.2)  # it waits for whoever connects
        return found

    lane = lanes.Lane(of(node.server._sessions, name), node.server._shared)
    node.server._lanes[name] = lane
    monkeypatch.setattr(Sessions, "of", slowly)
    with connected(node.path, name):
        assert tidy.wait(60)
        assert of(node.server._sessions, name) is lane.session


class Later:
    """A lock that `first` has before whoever comes first."""

    def __init__(self, lock: Any, first: Callable[[], None]) -> None:
        self._lock = lock
        self._first: Callable[[], None] | None = first

    def __enter__(self) -> None:
        first, self._first = self._first, None
        if first is not None:
            first()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_what_has_ended_counts_while_its_lane_is_forgotten(tmp_path: Path) -> None:
    """Else a drain that ends just then has finished nothing."""
    server = InThread(tmp_path / "node" / "service.sock", ServerOptions()).server
    with contextlib.closing(server._listener):
        server._lanes["token-0"] = lanes.Lane(server._sessions.of("token-0"), server._shared)
        server._lanes["token-0"].num_ended = 1
        server._lock = Later(server._lock, server._tidy)  # type: ignore[assignment]
        assert server._num_ended_now() == 1
        assert not server._lanes


def test_an_end_that_was_said_to_a_lost_connection_is_said_to_the_next(
    tmp_path: Path, node: InThread, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker has handed the save over again by then, and waits to hear of it."""
    put, end, num_put, lost = lanes.Lane.put, Session.end, itertools.count(1), list[str]()
    handed_again = threading.Event()

    def put_and_count(self: lanes.Lane, parcel: Any) -> None:
        put(self, parcel)
        if next(num_put) > 1:
            handed_again.set()

    def lose_the_first(self: Session, attempt: str, **how: Any) -> bool:
        if not lost:
            lost.append(attempt)
            (caller,) = [caller for caller in node.server._callers.all if caller.session is not None]
            caller.channel.close()
            assert handed_again.wait(60)
            return False
        return end(self, attempt, **how)

    monkeypatch.setattr(lanes.Lane, "put", put_and_count)
    monkeypatch.setattr(Session, "end", lose_the_first)
    with Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt:
        ckpt.save(1, state(1))
        assert ckpt._savers()[0]._committer.await_end(60)
        assert ckpt.wait()
    assert [str(name) for name, _ in events[0]] == ["checkpoint_staged", "checkpoint_committed"]
    assert len(lost) == 1


def test_a_slot_that_was_given_back_by_a_lost_connection_is_given_back_by_the_next(
    tmp_path: Path, node: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save has not ended by then; where states are held it would be in use for as long as the connection lasts."""
    send, end, lost, may_end = Session.send, Session.end, list[str](), threading.Event()

    def lose_the_first(self: Session, message: Any) -> None:
        if isinstance(message, Released) and not lost:
            lost.append(message.attempt)
            (caller,) = [caller for caller in node.server._callers.all if caller.session is not None]
            caller.channel.close()
        else:
            send(self, message)

    def end_late(self: Session, attempt: str, **how: Any) -> bool:
        assert may_end.wait(60)
        return end(self, attempt, **how)

    monkeypatch.setattr(Session, "send", lose_the_first)
    monkeypatch.setattr(Session, "end", end_late)
    with Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state(1))
        arena = ckpt._savers()[0]._arena
        try:
            until("the slot to be free", lambda: lost and not arena._used)
        finally:
            may_end.set()
        assert ckpt.wait()


def test_nobody_waits_for_what_was_said_by_the_connection_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end may be found out long after the worker has connected anew."""
    monkeypatch.setattr("storage.service.sessions._LOOK_S", 600.0)
    session, said = Session("token-0"), threading.Event()
    before, now = Mock(), Mock()
    before.send = lambda message: said.set()
    session.attach(before, os.getpid(), 1)
    saying = threading.Thread(target=session.end, args=("a" * 8,), kwargs={"committed": True, "fenced": None})
    saying.start()
    assert said.wait(60)
    session.attach(now, os.getpid(), 2)
    session.detach(before)
    saying.join(60)
    assert not saying.is_alive()


def test_a_connection_of_which_the_service_learns_late_takes_nobodys_place(
    node: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker has lost it by then, made the next one, and would hear of no save any more."""
    attach, is_first, has_next = Session.attach, itertools.chain([True], itertools.repeat(False)), threading.Event()

    def attach_late(self: Session, *args: Any) -> None:
        if next(is_first):
            assert has_next.wait(60)
            return attach(self, *args)
        attach(self, *args)
        return has_next.set()

    monkeypatch.setattr(Session, "attach", attach_late)
    with connected(node.path, "token-0"):
        pass
    with connected(node.path, "token-0") as worker:
        until("the first to have gone", lambda: has_next.is_set() and len(node.server._callers.all) == 1)
        node.server._sessions.of("token-0").send(Released(attempt="a" * 8))
        worker.limit_receive(30)
        assert worker.receive() == (Released(attempt="a" * 8), [])


def test_what_was_given_up_at_the_end_is_handed_over_by_no_connection_that_comes_late(
    tmp_path: Path, node: InThread, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, may_connect = ServiceAt.connect, threading.Event()

    def late(*args: Any) -> Any:
        assert may_connect.wait(60)
        return connect(*args)

    monkeypatch.setattr(ServiceAt, "connect", late)
    monkeypatch.setattr(ServiceAt, "patience_s", 0.0)
    monkeypatch.setattr(client, "_END_S", 0.0)
    ckpt = Checkpointer(tmp_path / "run", on_event=events[1]).start()
    backend = ckpt._savers()[0]._committer._backend
    assert isinstance(backend, ServiceBackend)
    ckpt.save(1, state(1))
    ckpt._close(abandon=True)
    may_connect.set()
    assert backend._thread is not None
    backend._thread.join(60)
    assert not backend._thread.is_alive()
    (failed,) = [fields for name, fields in events[0] if name == CheckpointEvent.FAILED]
    assert failed["reason"] == "this process ends before a checkpoint service has taken it over"
    assert node.safe.told == []
    assert committed(tmp_path / "run") == []
