"""What waits for the save before it (`backlog="replace"`): kept by the service, so that it outlives its worker."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from storage import Checkpointer
from storage.agent import AgentEnvironment
from storage.arena.changes import StateChanged
from storage.arena.stager import Staged
from storage.service import listening, table
from storage.service.channel import Channel
from storage.service.client import ServiceBackend
from storage.service.listening import listen
from storage.service.messages import AskStatus, ServiceMessage
from storage.service.ways import ServiceAt
from tests.cluster import until
from tests.storage.service_cases import Gate, InThread, committed, connected, in_thread
from tests.storage.small_runs import Events, opened, state
from tests.storage.test_when_to_save import Gate as GatedMemory

REPLACE: dict[str, Any] = {"backlog": "replace", "keep": 9}


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InThread]:
    """The service of an agent, which the environment names."""
    monkeypatch.setenv(AgentEnvironment.variable("service"), str(tmp_path / "node" / "service.sock"))
    with in_thread(tmp_path / "node" / "service.sock") as service:
        yield service


def told(events: Events, name: str) -> list[Any]:
    return [fields["step"] for event, fields in events[0] if event == name]


def waiting(service: InThread) -> list[int]:
    """The steps that wait there for a word."""
    return [parcel.stage.attempt.step for parcel in service.server._all_unfinished() if parcel.waits]


def test_what_waits_gives_way_in_the_service_too(tmp_path: Path, service: InThread, gate: Gate, events: Events) -> None:
    with Checkpointer(tmp_path / "run", on_event=events[1], **REPLACE) as ckpt:
        ckpt.save(1, state(1))
        assert gate.reached.wait(60)
        for step in (2, 3, 4):
            ckpt.save(step, state(step))
            until(f"step {step} to wait", lambda step=step: waiting(service) == [step])
            until("memory for the next", lambda: ckpt._savers()[0]._arena.wait_free(0.0))
        gate.opened.set()
        assert ckpt.wait()
        found = state(0)
        assert ckpt.restore(found) == 4
        assert found["n"] == 4
    assert told(events, "checkpoint_replaced") == [2, 3]
    assert told(events, "checkpoint_committed") == [1, 4]
    assert not told(events, "checkpoint_skipped")
    until("the service to hold nothing", lambda: service.status().staged_bytes == 0)
    until("the keeper to be told", lambda: set(service.safe.of("keep")) == set(service.safe.of("done")))


@pytest.mark.parametrize("how", ["killed", "an error"])
def test_what_waits_is_saved_though_its_worker_is_gone(
    how: str, tmp_path: Path, service: InThread, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = Checkpointer(tmp_path / "run", **REPLACE).start()
    ckpt.save(1, state(1))
    assert gate.reached.wait(60)
    ckpt.save(2, state(2))
    until("step 2 to wait", lambda: waiting(service) == [2])
    gate.opened.set()
    until("step 1 to be committed", lambda: committed(tmp_path / "run") == [1])
    assert waiting(service) == [2], "its worker lives"
    if how == "killed":
        monkeypatch.setattr("storage.service.lanes.is_alive", lambda *_: False)
        until("step 2 to be committed", lambda: committed(tmp_path / "run") == [2, 1])
    ckpt._close(abandon=True)
    until("step 2 to be committed", lambda: committed(tmp_path / "run") == [2, 1])


def test_a_service_that_comes_back_lets_it_wait_on(tmp_path: Path, service: InThread, gate: Gate) -> None:
    """The worker says again what it had said; what had waited, and does not any more, begins."""
    with Checkpointer(tmp_path / "run", **REPLACE) as ckpt:
        backend = ckpt._savers()[0]._committer._backend
        assert isinstance(backend, ServiceBackend)
        ckpt.save(1, state(1))
        assert gate.reached.wait(60)
        ckpt.save(2, state(2))
        until("step 2 to wait", lambda: waiting(service) == [2])
        with backend._state:
            before = backend._channel
            assert before is not None
            before.close()
        until("another connection", lambda: backend._channel not in (None, before))
        assert waiting(service) == [2]
        backend._say = lambda *_: None  # type: ignore[method-assign]  # the word is lost with a connection
        gate.opened.set()
        until("step 1 to be committed", lambda: committed(tmp_path / "run") == [1])
        queue = ckpt._savers()[0]._queue
        until("step 2 not to wait for step 1", lambda: queue.waiting == "")
        with backend._state:
            assert backend._channel is not None
            backend._channel.close()
        assert ckpt.wait()
    assert committed(tmp_path / "run") == [2, 1]


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_a_lost_service_had_waits_in_the_worker(
    goes_on: bool, tmp_path: Path, service: InThread, gate: Gate, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.service.client.RESTART_S", 0.0)
    with Checkpointer(tmp_path / "run", on_event=events[1], **REPLACE) as ckpt:
        backend = ckpt._savers()[0]._committer._backend
        assert isinstance(backend, ServiceBackend)
        ckpt.save(1, state(1))
        assert gate.reached.wait(60)
        ckpt.save(2, state(2))
        until("step 2 to wait", lambda: waiting(service) == [2])
        carry_out, asked, may_begin = backend._direct.submit, threading.Event(), threading.Event()

        def later(*args: Any) -> None:
            asked.set()
            assert may_begin.wait(60)
            carry_out(*args)

        monkeypatch.setattr(backend._direct, "submit", later)  # of step 1, for which the other waits
        service.close()
        assert asked.wait(60)
        assert backend._custody._back
        if not goes_on:
            ckpt.save(3, state(3))
        may_begin.set()
        assert ckpt.wait()
        gate.opened.set()  # of the service, which is still in the midst of it
    assert committed(tmp_path / "run") == ([2, 1] if goes_on else [3, 1])
    assert told(events, "checkpoint_replaced") == ([] if goes_on else [2])


def test_what_gives_way_while_the_connection_is_lost_is_not_begun_when_the_worker_dies(
    tmp_path: Path, service: InThread, gate: Gate, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, has_given_way = ServiceAt.connect, threading.Event()

    def later(*args: Any) -> Any:
        assert has_given_way.wait(60)
        return connect(*args)

    with Checkpointer(tmp_path / "run", on_event=events[1], **REPLACE) as ckpt:
        backend = ckpt._savers()[0]._committer._backend
        assert isinstance(backend, ServiceBackend)
        give_way = backend.give_way
        backend.give_way = lambda running: (give_way(running), has_given_way.set())  # type: ignore
        for step in (1, 2):
            ckpt.save(step, state(step))
            assert gate.reached.wait(60)
        until("step 2 to wait", lambda: waiting(service) == [2])
        until("it to be let go of at once", lambda: all(p.ready.is_set() for p in service.server._all_unfinished()))
        first, other = dict.fromkeys(name for what, name in service.safe.told if what == "keep")  # one may come twice
        monkeypatch.setattr(ServiceAt, "connect", later)
        with backend._state:
            assert backend._channel is not None
            backend._channel.close()
        until("the connection to be lost", lambda: backend._channel is None)
        ckpt.save(3, state(3))
        until("step 3 to wait", lambda: waiting(service) == [3])
        told_of = list(service.safe.told)
        third = next(word for word in told_of if word[0] == "keep" and word[1] not in (first, other))
        assert told_of.index(("done", other)) < told_of.index(third), "it was told before the next came"
        gate.opened.set()
        assert ckpt.wait()
    assert committed(tmp_path / "run") == [3, 1]
    assert (told(events, "checkpoint_replaced"), told(events, "checkpoint_failed")) == ([2], [])


@pytest.mark.parametrize("gives_way", [True, False])
def test_what_cannot_be_handed_over_waits_in_the_worker_and_is_told_of_once(
    gives_way: bool, tmp_path: Path, service: InThread, gate: Gate, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> Any:
        raise MemoryError("no room")

    with Checkpointer(tmp_path / "run", on_event=events[1], **REPLACE) as ckpt:
        ckpt.save(1, state(1))
        assert gate.reached.wait(60)
        with monkeypatch.context() as patch:
            patch.setattr(table.TableWriter, "write", fail)
            ckpt.save(2, state(2))
        if gives_way:
            ckpt.save(3, state(3))
        gate.opened.set()
        assert ckpt.wait()
    assert committed(tmp_path / "run") == [3 if gives_way else 2, 1]
    assert told(events, "checkpoint_replaced") == ([2] if gives_way else [])
    assert told(events, "checkpoint_failed") == []
    assert sorted(told(events, "checkpoint_committed")) == [1, 3 if gives_way else 2]


def test_a_copy_that_is_not_whole_gives_way_before_it_is_handed_over(
    tmp_path: Path, service: InThread, gate: Gate, events: Events
) -> None:
    parameter = torch.nn.Parameter(torch.zeros(100_000))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with Checkpointer(tmp_path / "run", staging="overlapped", on_event=events[1], **REPLACE) as ckpt:
        for step in (1, 2, 3, 4):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            ckpt.save(step, {"w": parameter, "n": step})
        gate.opened.set()
        assert ckpt.wait()
        found = {"w": torch.zeros(100_000), "n": 0}
        newest = max(told(events, "checkpoint_staged"))
        assert ckpt.restore(found) == newest == found["n"]
    assert sorted(told(events, "checkpoint_committed") + told(events, "checkpoint_replaced")) == told(
        events, "checkpoint_staged"
    )


def test_without_a_service_what_waits_is_told_to_be_lost(events: Events) -> None:
    store = GatedMemory()
    ckpt = Checkpointer(opened(store), every=1, on_event=events[1], **REPLACE).start()
    ckpt.save(1, state(1))
    assert store.is_met.wait(60)
    ckpt.save(2, state(2))
    store.is_open.set()
    ckpt._close(abandon=True)
    failed = {fields["step"]: fields["reason"] for event, fields in events[0] if event == "checkpoint_failed"}
    assert "no checkpoint service keeps what waits" in failed[2]


def test_what_gives_way_takes_no_rank_with_it_though_its_copy_is_of_no_use(
    events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state was changed too early: a save that raised for that, on this rank alone, would leave the others."""

    def wait(self: Staged) -> None:
        raise StateChanged("w")

    store = GatedMemory()
    with Checkpointer(opened(store), every=1, on_event=events[1], **REPLACE) as ckpt:
        ckpt.save(1, state(1))
        assert store.is_met.wait(60)
        ckpt.save(2, state(2))
        try:
            with monkeypatch.context() as patch:
                patch.setattr(Staged, "wait", wait)
                ckpt.save(3, state(3))
        finally:
            store.is_open.set()
        assert ckpt.wait()
    assert told(events, "checkpoint_replaced") == [2]
    assert told(events, "checkpoint_committed") == [1, 3]


def test_who_listens_goes_on_to_the_next_connection_whatever_becomes_of_this_one(
    tmp_path: Path, service: InThread
) -> None:
    """Else no save would ever end: nobody hears of it."""
    with connected(service.path) as channel:
        channel.close()  # by who has found that nothing can be sent
        listen(channel, _no_word, lambda: True, lambda: False, _not_silent)
    with connected(service.path) as channel:
        channel.send(AskStatus())
        listen(channel, _no_word, lambda: True, lambda: False, _not_silent)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_service_that_answers_nothing_is_told_of_once_before_it_is_given_up(
    is_stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is frozen: a training may stand still for it. Who is stopped itself has not listened meanwhile."""
    for name, value in {"_LOOK_MS": 10, "_ASK_S": 0.05, "_SILENT_S": 0.1, "_SILENCE_S": 0.3}.items():
        monkeypatch.setattr(listening, name, value)
    told: list[float] = []
    stands_still = [threading.Event()] * is_stopped

    def on_silent(seconds: float) -> None:
        told.append(seconds)

    def is_waiting() -> bool:
        while stands_still:
            stands_still.pop().wait(0.4)
        return True

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs, contextlib.closing(Channel(ours)) as channel:
        listen(channel, _no_word, lambda: False, iter([False] * 40 + [True]).__next__, on_silent)
        assert not told, "nobody waits for it"
        listen(channel, _no_word, is_waiting, lambda: False, on_silent)
    assert told == [pytest.approx(0.1)]


def _not_silent(seconds: float) -> None:
    raise AssertionError(f"silent for {seconds:.0f} s")


def _no_word(channel: Channel, message: ServiceMessage, fds: list[int]) -> None:
    raise KeyError("an odd word")
