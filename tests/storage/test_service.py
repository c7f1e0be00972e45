"""Saves that the checkpoint service carries out, here on a thread of the test's process."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from storage import Checkpointer, CheckpointEvent, JobIdentity, register_scheme
from storage.agent import AgentEnvironment
from storage.run.heartbeat import Heartbeat
from storage.saving import adoption
from storage.service import lanes, processes
from storage.service.channel import Channel
from storage.service.client import ServiceBackend
from storage.service.messages import (
    AskStatus,
    AskUnfinished,
    Drain,
    Drained,
    Heard,
    ServiceMessage,
    ServiceStatus,
    Unfinished,
)
from storage.service.server import ServerOptions
from storage.service.sessions import Session
from storage.stores.local import LocalStore
from tests.cluster import until
from tests.storage.service_cases import Gate, InThread, asked, committed, connected, events_in, in_thread
from tests.storage.small_runs import Events, state

SERVICE = AgentEnvironment.variable("service")
NAMES = ("with", "without")
NUM_SAVES = int(os.environ.get("SERVICE_SAVES", "10"))


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InThread]:
    """The service of an agent, which the environment names."""
    monkeypatch.setenv(SERVICE, str(tmp_path / "node" / "service.sock"))
    with in_thread(tmp_path / "node" / "service.sock") as service:
        yield service


def names(events: Events) -> list[str]:
    return [str(name) for name, _ in events[0]]


def test_the_service_commits_and_the_worker_hears_of_it(tmp_path: Path, service: InThread, events: Events) -> None:
    with Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state(step), wait=True)
        assert ckpt.wait()
        other = state(0)
        assert ckpt.restore(other) == 2
    assert other["n"] == 2
    assert names(events) == [
        *["checkpoint_staged", "checkpoint_committed"] * 2,
        "restored",
    ]
    assert {fields["bytes"] for name, fields in events[0] if name == CheckpointEvent.COMMITTED} != {0}
    (first, second) = until("both to be done", lambda: service.safe.of("done")[1:] and service.safe.of("done"))
    assert first.partition("/")[0] == second.partition("/")[0], "one session"
    until("the service to be done", lambda: service.status().num_unfinished == 0)
    assert service.status().num_ended == 2


def test_the_same_state_is_stored_alike_with_and_without(tmp_path: Path, service: InThread) -> None:
    for name, uses_it in zip(NAMES, (None, False), strict=True):
        with Checkpointer(tmp_path / name, service=uses_it) as ckpt:
            ckpt.save(1, state(1), wait=True)
    found = [
        {info.key.rpartition("/")[2]: info.size_bytes for info in LocalStore(tmp_path / n).list("")} for n in NAMES
    ]
    assert {name for name in found[0] if not name.startswith("beat-")} == set(found[1])
    assert found[0]["__0_0.distcp"] == found[1]["__0_0.distcp"]


def test_a_save_is_committed_whose_worker_is_gone(
    tmp_path: Path, service: InThread, gate: Gate, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(AgentEnvironment.variable("events"), str(tmp_path / "events.jsonl"))
    monkeypatch.setenv(AgentEnvironment.variable("checkpoint"), str(tmp_path / "checkpoint"))
    monkeypatch.setenv(AgentEnvironment.variable("node"), "a")
    monkeypatch.setenv("RANK", "0")
    ckpt = Checkpointer(tmp_path / "run", on_event=events[1])
    ckpt.start()
    ckpt.save(7, state(7))
    assert gate.reached.wait(60)
    ckpt._close(abandon=True)  # as far as the service can tell, as good as dead
    assert "checkpoint_committed" not in names(events)
    gate.opened.set()
    until("the commit", lambda: committed(tmp_path / "run") == [7])
    (told,) = until(
        "the event", lambda: [e for e in events_in(tmp_path / "events.jsonl") if e["event"] == "checkpoint_committed"]
    )
    assert (told["step"], told["node"], told["rank"]) == (7, "a", 0)
    note = tmp_path / "checkpoint"  # which comes after the event
    until("the note", lambda: note.exists() and '"step": 7' in note.read_text())


def test_the_next_workers_adopt_what_the_service_still_stores(
    tmp_path: Path, service: InThread, gate: Gate, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = adoption.settle

    def open_and_settle(*args: Any) -> None:
        assert committed(tmp_path / "run") == []
        gate.opened.set()
        settle(*args)

    monkeypatch.setattr("storage.saving.ownership.settle", open_and_settle)
    first = Checkpointer(tmp_path / "run", job=JobIdentity(lineage="a", generation=1)).start()
    first.save(7, state(7))
    assert gate.reached.wait(60)
    first._close(abandon=True)
    with Checkpointer(tmp_path / "run", job=JobIdentity(lineage="a", generation=2), on_event=events[1]) as second:
        other = state(0)
        assert second.restore(other) == 7
        second.save(8, state(8), wait=True)
        assert second.wait()
    assert other["n"] == 7
    assert committed(tmp_path / "run") == [8, 7]
    (adopted,) = [fields for name, fields in events[0] if name == CheckpointEvent.ADOPTED]
    assert adopted["steps"] == [7]
    assert "checkpoint_failed" not in names(events)


def test_a_claim_beats_on_while_there_is_something_to_commit_and_its_worker_is_gone(
    tmp_path: Path, service: InThread, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "Heartbeat", functools.partial(Heartbeat, interval_s=0.05))
    monkeypatch.setattr(Session, "is_worker_alive", False)
    ckpt = Checkpointer(tmp_path / "run").start()
    ckpt.save(7, state(7))
    assert gate.reached.wait(60)
    ckpt._close(abandon=True)  # lets the run go

    def beats() -> list[str]:
        found = []
        for path in (tmp_path / "run").glob("beat-*"):
            with contextlib.suppress(FileNotFoundError):  # it goes just now
                found.append(path.read_text())
        return found

    first = until("a beat", beats)
    until("another beat", lambda: beats() not in ([], first))
    gate.opened.set()
    until("the commit", lambda: committed(tmp_path / "run") == [7])
    until("the run to be let go", lambda: not beats())


def test_slots_are_free_once_stored_and_nothing_is_kept(tmp_path: Path, service: InThread) -> None:
    num_fds = len(os.listdir("/proc/self/fd"))
    with Checkpointer(tmp_path / "run", keep=1) as ckpt:
        for step in range(1, NUM_SAVES + 1):
            ckpt.save(step, state(step))
        assert ckpt.wait()
    until("the service to be done", lambda: service.status().staged_bytes == 0)
    until("descriptors to be closed", lambda: len(os.listdir("/proc/self/fd")) <= num_fds)


def test_a_failed_save_is_told_with_its_reason(tmp_path: Path, service: InThread, events: Events) -> None:
    folder = tmp_path / "run"
    with Checkpointer(folder, on_event=events[1]) as ckpt:
        ckpt.start()
        (folder / "step-000000001").write_bytes(b"in the way")
        ckpt.save(1, state(1), wait=True)
        assert not ckpt.wait()
        ckpt.save(2, state(2), wait=True)
        assert ckpt.wait()
    (failed,) = [fields for name, fields in events[0] if name == CheckpointEvent.FAILED]
    assert failed["step"] == 1
    assert failed["reason"]


def test_without_a_service_the_worker_saves_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: Events
) -> None:
    monkeypatch.setenv(SERVICE, str(tmp_path / "node" / "service.sock"))
    monkeypatch.setattr("storage.service.client.RESTART_S", 0.0)
    with contextlib.ExitStack() as later, Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state(step), wait=True)
        assert ckpt.wait()
        assert committed(tmp_path / "run") == [2, 1]
        service = later.enter_context(in_thread(tmp_path / "node" / "service.sock"))  # it is there at last
        ckpt.save(3, state(3), wait=True)
        assert ckpt.wait()
        until("the service to be done", lambda: service.status().num_ended == 1)
    direct = [fields for name, fields in events[0] if name == CheckpointEvent.DIRECT]
    assert [fields["reason"] for fields in direct] == [
        f"no checkpoint service listens at {tmp_path}/node/service.sock"
    ], "told once"
    assert names(events).count("checkpoint_service_back") == 1


def test_what_the_service_had_is_saved_by_the_worker_when_it_is_lost(
    tmp_path: Path, service: InThread, gate: Gate, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.service.client.RESTART_S", 0.0)
    with Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt:
        ckpt.save(1, state(1))
        assert gate.reached.wait(60)
        service.close()
        assert ckpt.wait()
    assert committed(tmp_path / "run") == [1]
    assert "checkpoint_direct" in names(events)


def test_what_a_worker_has_written_before_it_went_is_written_once(
    tmp_path: Path, service: InThread, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed before it can say so; here it loses its connection."""
    send, lost = Channel.send, list[Channel]()

    def send_or_lose(self: Channel, message: ServiceMessage, fds: Sequence[int] = ()) -> None:
        if isinstance(message, Heard) and not lost:
            lost.append(self)
            self.close()
        send(self, message, fds)

    monkeypatch.setattr(Channel, "send", send_or_lose)
    monkeypatch.setenv(AgentEnvironment.variable("events"), str(tmp_path / "events.jsonl"))
    with Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt:
        ckpt.save(1, state(1))
        assert ckpt.wait()
    assert lost
    assert [event["event"] for event in events_in(tmp_path / "events.jsonl")].count("checkpoint_committed") == 1


def test_a_worker_that_the_service_cannot_see_saves_by_itself(
    tmp_path: Path, service: InThread, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another PID namespace; the note of what it has staged is taken for no dead one's."""
    for module in ("client", "handed"):
        monkeypatch.setattr(f"storage.service.{module}.space", lambda: processes.space() + 1)
    with Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt:
        ckpt.save(1, state(1))
        assert ckpt.wait()
    assert committed(tmp_path / "run") == [1]
    (direct,) = [fields for name, fields in events[0] if name == CheckpointEvent.DIRECT]
    assert f"process {os.getpid()} is of another PID namespace" in direct["reason"]


def test_nothing_else_comes_into_a_slot_that_a_lost_service_may_still_read(
    tmp_path: Path, service: InThread, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.service.client.RESTART_S", 0.0)
    with Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state(1))
        assert gate.reached.wait(60)
        (lane,) = service.server._all_lanes()
        _, slot = lane.unfinished[0].staged.slots
        before = bytes(slot.memory)
        service.close()  # as far as the worker can tell: its thread is in the midst of storing the slot
        for step in (1, 2, 3):
            ckpt.save(step, state(step), wait=True)
        assert bytes(slot.memory) == before
    assert committed(tmp_path / "run") == [3, 2, 1]


@pytest.mark.parametrize("how", ["scheme", "environment"])
def test_what_the_service_cannot_open_alike_is_saved_by_the_worker(
    how: str, tmp_path: Path, service: InThread, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, told = f"{tmp_path}/run", "credentials or proxies"
    if how == "scheme":
        register_scheme("mine", lambda rest: LocalStore(tmp_path / "run"))
        monkeypatch.setattr(LocalStore, "url", property(lambda self: "mine://run"))
        url, told = "mine://run", "this process only"
    else:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    with Checkpointer(url, on_event=events[1]) as ckpt:
        ckpt.save(1, state(1), wait=True)
        assert ckpt.wait()
    assert service.status().num_ended == 0
    (direct,) = [fields for name, fields in events[0] if name == CheckpointEvent.DIRECT]
    assert told in direct["reason"]


@pytest.mark.parametrize("backlog", ["wait", "replace"])
def test_what_is_handed_over_when_the_service_turns_out_not_to_do_is_saved_by_the_worker(
    backlog: Any, tmp_path: Path, service: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens to a service any more that would open the store in another way."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")

    def then_it_is_found_out(backend: ServiceBackend) -> bool:
        until("the service to be looked at", lambda: backend._never is not None)
        return False

    monkeypatch.setattr(ServiceBackend, "_goes_directly", then_it_is_found_out)
    with Checkpointer(tmp_path / "run", backlog=backlog, keep=9) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state(step))
        assert ckpt.wait()
    assert committed(tmp_path / "run") == [2, 1]


def test_a_drain_finishes_what_is_under_way(tmp_path: Path, service: InThread, gate: Gate) -> None:
    with Checkpointer(tmp_path / "run") as ckpt, connected(service.path) as agent:
        ckpt.save(1, state(1))
        assert gate.reached.wait(60)
        agent.send(Drain(grace_s=60.0))
        until("it to be heard", lambda: service.server._drain)  # else nothing is under way any more
        gate.opened.set()
        received = agent.receive()
        assert received is not None
        assert received[0] == Drained(num_finished=1, num_abandoned=0)
        assert ckpt.wait()
    assert committed(tmp_path / "run") == [1]
    service.thread.join(60)
    assert not service.thread.is_alive()


def test_a_drain_gives_up_what_takes_too_long_and_says_so(
    tmp_path: Path, service: InThread, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 of two waits for the receipt of the other, which never comes."""
    with Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt, connected(service.path) as agent:
        monkeypatch.setattr("storage.saving.receipts.await_receipts", _never)
        monkeypatch.setattr("storage.service.client._END_S", 0.1)  # the end is no part of this
        ckpt.save(1, state(1))
        until("the service to have it", lambda: service.status().num_unfinished == 1)
        agent.send(Drain(grace_s=0.0))
        received = agent.receive()
        assert received is not None
        assert not ckpt.wait()
    (failed,) = [fields for name, fields in events[0] if name == CheckpointEvent.FAILED]
    assert failed["reason"] == "closed while waiting for the receipt of rank 1"


def _never(store: object, attempt: object, patience: Any, claim: object) -> Any:
    return patience.until(lambda: "the receipt of rank 1", lambda: None)


def test_it_says_what_is_unfinished(tmp_path: Path, service: InThread, gate: Gate) -> None:
    url = f"{tmp_path}/run"
    with Checkpointer(url) as ckpt, connected(service.path) as other:
        ckpt.save(1, state(1))
        assert gate.reached.wait(60)
        found = asked(other, AskUnfinished(url=url))
        assert isinstance(found, Unfinished)
        assert [(part.step, part.rank, part.world_size) for part in found.attempts] == [(1, 0, 1)]
        assert asked(other, AskUnfinished(url=f"{url}-2")) == Unfinished()
        gate.opened.set()
        assert ckpt.wait()


def test_who_never_stages_anything_is_forgotten(service: InThread) -> None:
    for number in range(5):
        with connected(service.path, session=f"s-{number}") as other:
            assert isinstance(asked(other, AskStatus()), ServiceStatus)
    until("nobody to be known", lambda: service.server._sessions.names() == [])


def test_a_service_ends_when_nobody_wants_it(tmp_path: Path) -> None:
    with in_thread(tmp_path / "node" / "service.sock", ServerOptions(linger_s=0.2)) as service:
        service.thread.join(60)
        assert not service.thread.is_alive()


def test_it_stays_as_long_as_its_agent(tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()
    service = InThread(tmp_path / "node" / "service.sock", ServerOptions(linger_s=0.0))
    service.server._lifeline = read_fd
    service.start()
    assert service.status().num_unfinished == 0
    service.thread.join(1.0)
    assert service.thread.is_alive()
    os.close(write_fd)
    service.thread.join(60)
    assert not service.thread.is_alive()
    service.close()


def test_a_worker_that_never_answers_is_not_waited_for(
    tmp_path: Path, service: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.service.sessions._HEARD_S_MAX", 0.0)
    monkeypatch.setattr("storage.service.sessions._LOOK_S", 0.01)
    monkeypatch.setattr(ServiceBackend, "_hear", lambda *args: None)
    ckpt = Checkpointer(tmp_path / "run").start()
    ckpt.save(1, state(1))
    until("the commit", lambda: committed(tmp_path / "run") == [1])
    until("the service to be done", lambda: service.status().num_ended == 1)
    ckpt._close(abandon=True)
