"""What a checkpoint service, and who has to do with it, makes of what should not happen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import Checkpointer, CheckpointEvent, JobIdentity
from storage.agent import AgentEnvironment
from storage.held.keeping import KeepingStore
from storage.run.job import Origin
from storage.saving import adoption, receipts
from storage.service import address, choice, lanes, parcels
from storage.service.channel import Channel, welcome
from storage.service.client import ServiceBackend
from storage.service.memory import HeldStates
from storage.service.messages import ServiceMessage, Welcome
from storage.service.ways import ServiceAt
from storage.stores.objects import ObjectStore
from tests.cluster import until
from tests.storage.service_cases import Gate, InThread, committed, events_in, in_thread
from tests.storage.small_runs import Events, state


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InThread]:
    """The service of an agent, with its memory of states."""
    for name, text in {"service": str(tmp_path / "node" / "service.sock"), "node": "a"}.items():
        monkeypatch.setenv(AgentEnvironment.variable(name), text)
    with in_thread(tmp_path / "node" / "service.sock", held=HeldStates()) as service:
        yield service


def test_a_list_of_what_was_staged_that_is_damaged_fails_that_save_alone(
    tmp_path: Path, node: InThread, gate: Gate, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.service.client.RESTART_S", 0.0)
    with Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt:
        ckpt.save(1, state(1))
        assert gate.reached.wait(60)
        (lane,) = node.server._all_lanes()
        table, _ = lane.unfinished[0].staged.slots
        table.memory[20] ^= 1
        node.close()
        assert not ckpt.wait()
        ckpt.save(2, state(2), wait=True)
    assert committed(tmp_path / "run") == [2]
    (failed,) = [fields for name, fields in events[0] if name == CheckpointEvent.FAILED]
    assert (failed["step"], "table of what was staged" in failed["reason"]) == (1, True)


def test_what_cannot_be_held_is_stored_and_its_memory_comes_back(
    tmp_path: Path, node: InThread, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: KeepingStore, prefix: str) -> Any:
        raise ValueError("a fault")

    monkeypatch.setattr(KeepingStore, "objects", fail)
    with Checkpointer(tmp_path / "run", keep=9, timeout_s=30.0, on_event=events[1]) as ckpt:
        for step in range(1, 7):
            ckpt.save(step, state(step), wait="held")
            assert ckpt.wait()
            assert committed(tmp_path / "run")[0] == step
    told = [name for name, _ in events[0]]
    assert told.count("checkpoint_memory_away") == 6, "who was told that it is kept has the store's"


def test_a_service_that_was_started_again_says_that_it_holds_nothing(
    tmp_path: Path, node: InThread, events: Events
) -> None:
    with Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt:
        ckpt.save(1, state(1), wait=True)
        node.close()
        with in_thread(node.path, held=HeldStates()) as again:
            for step in (2, 3):
                ckpt.save(step, state(step), wait=True)
            until("the end of both", lambda: again.status().num_ended == 2)
    assert [str(name) for name, _ in events[0]].count("checkpoint_memory_away") == 1
    assert committed(tmp_path / "run") == [3, 2, 1]


def test_a_slot_that_is_given_back_is_read_by_no_service_that_comes_after(
    tmp_path: Path, node: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(url: str) -> ObjectStore:
        raise RuntimeError("a fault")

    monkeypatch.setattr(lanes, "open_store", fail)
    with Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state(1), wait=True)
    until("the end of it", lambda: "done" in dict(node.safe.told))
    assert [what for what, _ in node.safe.told] == ["keep", "stored", "done"]


def test_what_takes_too_long_to_be_adopted_is_committed_no_more(
    tmp_path: Path, node: InThread, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "SETTLE_S", 0.0)
    monkeypatch.setattr(HeldStates, "hold", lambda *args: None)  # else the job goes on from memory
    first = Checkpointer(tmp_path / "run", job=JobIdentity(lineage="a", generation=1)).start()
    first.save(7, state(7))
    assert gate.reached.wait(60)
    first._close(abandon=True)
    with Checkpointer(tmp_path / "run", job=JobIdentity(lineage="a", generation=2)) as second:
        assert second.restore(state(0)) == 0
        gate.opened.set()
        until("the end of what was adopted", lambda: node.status().num_unfinished == 0)
        second.save(3, state(3), wait=True)
    assert committed(tmp_path / "run") == [3]


def test_descriptors_of_what_cannot_be_taken_are_closed() -> None:
    fds = [os.memfd_create(f"not-taken-{number}") for number in range(2)]
    with pytest.raises(ValueError, match="no slot"):
        parcels.unpack_slots(fds)
    for fd in fds:  # which may be another's by now
        with contextlib.suppress(FileNotFoundError):
            assert "not-taken" not in os.readlink(f"/proc/self/fd/{fd}")
    with pytest.raises(ValueError, match="without descriptors"):
        parcels.unpack_slots([])


def test_a_service_that_never_says_what_it_has_to_do_keeps_no_start_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "node" / "service.sock"
    monkeypatch.setenv(AgentEnvironment.variable("service"), str(path))
    monkeypatch.setattr(choice, "_ANSWER_S", 0.01)
    ended = threading.Event()
    with address.listen(path) as listener:

        def greet() -> None:
            channel, _ = welcome(listener.accept()[0], Welcome(pid=1))
            assert ended.wait(60)
            channel.close()

        thread = threading.Thread(target=greet)
        thread.start()
        try:
            with pytest.raises(TimeoutError):
                choice.held_by(str(tmp_path), Origin(), None)
        finally:
            ended.set()
            thread.join()


@pytest.mark.parametrize("kind", ["hold", "lane"])
def test_a_save_that_the_service_can_start_no_thread_for_is_its_workers(
    tmp_path: Path, node: InThread, events: Events, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """And nothing of it stays there, or the next save of that rank would wait behind it for ever."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(f"{kind}-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt:
        with monkeypatch.context() as without:
            without.setattr(threading.Thread, "start", refuse)
            ckpt.save(1, state(1), wait=True)
        assert node.status().num_unfinished == 0
        ckpt.save(2, state(2), wait=True)
        until("the end of the second", lambda: node.status().num_ended == 1)
    assert committed(tmp_path / "run") == [2, 1]
    assert [what for what, _ in node.safe.told][:3] == ["keep", "released", "done"]
    (reason,) = [fields["reason"] for name, fields in events[0] if name == CheckpointEvent.DIRECT]
    assert "can't start new thread" in reason


def test_a_service_of_another_version_is_told_of_and_gone_on_without(
    tmp_path: Path, node: InThread, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one is that was started before elastic-moe was installed anew."""
    monkeypatch.setattr("storage.service.channel.PROTOCOL_VERSION", 1)
    with Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state(step), wait=True)
            assert ckpt.wait()
        assert ckpt.restore(state(0)) == 2
    told = [(str(name), fields.get("reason", "")) for name, fields in events[0]]
    (direct,) = [reason for name, reason in told if name == "checkpoint_direct"]
    away = [reason for name, reason in told if name == "checkpoint_memory_away"]
    assert away and all("speaks version 1 of its protocol, and not" in reason for reason in (direct, *away))
    (off,) = [reason for name, reason in told if name == "checkpoint_live_off"]
    assert "speaks version 1 of its protocol, and not" in off
    assert committed(tmp_path / "run") == [2, 1]


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flock, removed = tmp_path / "node" / "service.sock", fcntl.flock, list[Path]()

    def remove_first(fd: int, how: int) -> None:
        if not removed:  # as the service does which had it
            removed.append(path.with_suffix(".lock"))
            removed[0].unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    fd = address.lock(path)
    assert fd is not None
    assert address.lock(path) is None
    os.close(fd)


def test_a_folder_by_another_name_is_no_place_for_a_socket(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "private")
    with pytest.raises(PermissionError, match="needs a folder"):
        address.listen(tmp_path / "link" / "service.sock")


def test_a_service_that_was_frozen_tells_no_failure_of_what_the_worker_has_committed_meanwhile(
    tmp_path: Path, node: InThread, gate: Gate, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(AgentEnvironment.variable("events"), str(tmp_path / "events.jsonl"))
    monkeypatch.setattr("storage.service.client.RESTART_S", 0.0)
    with Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt:
        ckpt.save(1, state(1))
        assert gate.reached.wait(60)
        with monkeypatch.context() as patch:
            patch.setattr(ServiceAt, "connect", _nobody)
            (caller,) = [caller for caller in node.server._callers.all if caller.session is not None]
            caller.channel.close()  # as the worker sees it that is told nothing for too long
            assert ckpt.wait()
        assert committed(tmp_path / "run") == [1]
        gate.opened.set()
        until("the service to be done", lambda: node.status().num_unfinished == 0)
        ckpt.save(2, state(2), wait=True)
        assert ckpt.wait()
    assert CheckpointEvent.FAILED not in [name for name, _ in events[0]]
    assert "checkpoint_failed" not in [event["event"] for event in events_in(tmp_path / "events.jsonl")]
    assert not list((tmp_path / "run").rglob("aborted*"))


@pytest.mark.parametrize("num_unsaid", [0, 1])
def test_a_save_that_the_worker_has_taken_back_holds_up_none_that_come_after(
    num_unsaid: int, tmp_path: Path, node: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service waits for receipts that were cleaned up while it was frozen, and may freeze again before it hears."""
    said: list[str] = []
    _waits.clear()

    def say(self: ServiceBackend, channel: Channel, message: ServiceMessage) -> bool:
        said.append(type(message).__name__)
        if len(said) <= num_unsaid:
            channel.close()
        return _say(self, channel, message)

    monkeypatch.setattr(ServiceBackend, "_say", say)
    monkeypatch.setattr("storage.service.client.RESTART_S", 0.0)
    monkeypatch.setattr(receipts, "await_receipts", _never_in_a_service)
    with Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state(1))
        until("the service to wait", lambda: _waits.is_set())
        with monkeypatch.context() as patch:
            patch.setattr(ServiceAt, "connect", _nobody)
            (caller,) = [caller for caller in node.server._callers.all if caller.session is not None]
            caller.channel.close()
            assert ckpt.wait()
        monkeypatch.setattr(receipts, "await_receipts", _await_receipts)
        ckpt.save(2, state(2), wait=True)
        assert ckpt.wait()
        until("both to have ended", lambda: node.status().num_ended == 2)
    assert committed(tmp_path / "run") == [2, 1]
    assert said == ["TakenBack"] * (1 + num_unsaid)


_say = ServiceBackend._say
_await_receipts, _waits = receipts.await_receipts, threading.Event()


def _never_in_a_service(store: Any, attempt: Any, patience: Any, claim: Any) -> Any:
    if not threading.current_thread().name.startswith("lane-"):
        return _await_receipts(store, attempt, patience, claim)
    _waits.set()
    return patience.until(lambda: "the receipt of rank 1", lambda: None)


def _nobody(*args: object) -> Any:
    raise ConnectionRefusedError("frozen")


def test_what_a_service_tells_of_a_save_that_was_taken_back_is_not_told_again(
    tmp_path: Path, node: InThread, events: Events
) -> None:
    with Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt:
        ckpt.save(1, state(1), wait=True)
        assert ckpt.wait()
        (caller,) = [caller for caller in node.server._callers.all if caller.session is not None]
        assert caller.session is not None
        caller.session.listener(CheckpointEvent.FAILED, {"step": 1, "reason": "it was frozen"})
        caller.session.listener(CheckpointEvent.RETRIED, {"step": 1})
    assert [str(name) for name, _ in events[0]] == ["checkpoint_staged", "checkpoint_committed", "checkpoint_retried"]
