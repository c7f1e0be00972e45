"""What a checkpoint service and its callers put up with, and what ends then."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import Checkpointer, CheckpointEvent
from storage.agent import AgentEnvironment
from storage.service import callers, lanes, table
from storage.service.messages import AskStatus, ServiceStatus
from storage.service.server import ServerOptions
from tests.cluster import until
from tests.storage.service_cases import Gate, InThread, asked, committed, connected, in_thread
from tests.storage.small_runs import Events, state


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of an agent's service, which the environment names."""
    made = tmp_path / "node" / "service.sock"
    monkeypatch.setenv(AgentEnvironment.variable("service"), str(made))
    monkeypatch.setenv(AgentEnvironment.variable("events"), str(tmp_path / "events.jsonl"))
    return made


@pytest.fixture
def service(path: Path) -> Iterator[InThread]:
    with in_thread(path) as service:
        yield service


def test_without_memory_for_the_list_of_what_was_staged_the_worker_saves_by_itself(
    tmp_path: Path, service: InThread, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> Any:
        raise MemoryError("no room")

    with Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(table.TableWriter, "write", fail)
            ckpt.save(1, state(1), wait=True)
            assert ckpt.wait()
        ckpt.save(2, state(2), wait=True)
        assert ckpt.wait()
    assert committed(tmp_path / "run") == [2, 1]
    (direct,) = [fields for name, fields in events[0] if name == CheckpointEvent.DIRECT]
    assert direct["reason"] == "no table of it can be made: no room"
    until("the other one to be the service's", lambda: service.status().num_ended == 1)


def test_a_save_that_a_service_crashes_of_again_and_again_fails(
    tmp_path: Path, service: InThread, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "_NUM_CRASHES_MAX", -1)
    with Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt:
        ckpt.save(1, state(1), wait=True)
        assert not ckpt.wait()
    (failed,) = [fields for name, fields in events[0] if name == CheckpointEvent.FAILED]
    assert failed["reason"] == "the service has crashed 0 times while it had this save"


def test_a_service_that_waits_for_nobody_ends_what_it_has_begun(tmp_path: Path, path: Path, gate: Gate) -> None:
    """Its worker is gone, and nobody has started it for long."""
    read_fd, write_fd = os.pipe()
    with in_thread(path, ServerOptions(linger_s=0.0), lifeline=read_fd) as service:
        ckpt = Checkpointer(tmp_path / "run").start()
        ckpt.save(1, state(1))
        assert gate.reached.wait(60)
        ckpt._close(abandon=True)
        until("the worker to have gone", lambda: service.server._callers.num == 0)
        os.close(write_fd)
        service.thread.join(0.6)  # as long as it gets, it does not end
        assert service.thread.is_alive()
        gate.opened.set()
        service.thread.join(60)
        assert not service.thread.is_alive()
    assert committed(tmp_path / "run") == [1]


def test_of_connections_that_are_too_many_the_last_are_closed(
    service: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers, "_NUM_CONNECTIONS_MAX", 2)
    num_fds = len(os.listdir("/proc/self/fd"))
    with connected(service.path) as first, connected(service.path) as second:
        for _ in range(3):
            with pytest.raises(OSError), connected(service.path):
                pass
        for caller in (first, second):
            assert isinstance(asked(caller, AskStatus()), ServiceStatus)
    until("their descriptors to be closed", lambda: len(os.listdir("/proc/self/fd")) <= num_fds)
    until("another to be served", lambda: _is_served(service))


def test_who_connects_while_no_thread_can_be_started_is_sent_away_and_the_service_goes_on(
    service: InThread, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    num_fds = len(os.listdir("/proc/self/fd"))
    with connected(service.path) as first:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(OSError), connected(service.path):
                pass
        assert isinstance(asked(first, AskStatus()), ServiceStatus)
    assert "a connection cannot be served: can't start new thread" in caplog.text
    until("another to be served", lambda: _is_served(service))
    until("its descriptors to be closed", lambda: len(os.listdir("/proc/self/fd")) <= num_fds)


def _is_served(service: InThread) -> bool:
    try:
        return service.status().num_unfinished == 0
    except OSError:
        return False


def test_where_no_thread_can_be_started_for_a_save_the_training_waits_for_it(
    memory_url: str, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("storage-save"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with Checkpointer(memory_url, on_event=events[1]) as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            ckpt.save(1, state(1))
            names = [name for name, _ in events[0]]
            assert names.count(CheckpointEvent.COMMITTED) == 1
        ckpt.save(2, state(2), wait=True)
        assert ckpt.wait()
    names = [name for name, _ in events[0]]
    assert names.count(CheckpointEvent.COMMITTED) == 2, "the first one is not made again by the thread that comes"
    assert CheckpointEvent.FAILED not in names
