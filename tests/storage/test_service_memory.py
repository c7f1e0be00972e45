"""States that the checkpoint service holds in memory: before they are stored, after their workers, and for others."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from storage import Checkpointer, JobIdentity, open_store
from storage.agent import AgentEnvironment
from storage.errors import Transient
from storage.held.inventory import HeldPart
from storage.held.node_memory import NodeMemory
from storage.held.truce import Standstill
from storage.run import owner
from storage.service import lanes
from storage.service.memory import HeldStates
from storage.service.messages import AskUnfinished, Unfinished
from storage.service.parcels import Parcel, TakenOver
from storage.service.sessions import Session
from storage.stores.local import LocalStore
from tests.cluster import until
from tests.storage.service_cases import PATIENCE_S, InThread, asked, committed, connected, in_thread

_NUM_SAVES = int(os.environ.get("SERVICE_SAVES", "10"))
_NUM_FDS_HELD = 2 * 2 + 1
"""Two states of two slots each, and a connection."""
Told = list[tuple[str, dict[str, Any]]]


def tensors(number: int) -> dict[str, Any]:
    return {"w": torch.arange(300_000, dtype=torch.float32) + number, "n": number}


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InThread]:
    """The service of an agent, with its memory of states."""
    for name, text in {"service": str(tmp_path / "node" / "service.sock"), "node": "a"}.items():
        monkeypatch.setenv(AgentEnvironment.variable(name), text)
    with in_thread(tmp_path / "node" / "service.sock", held=HeldStates()) as service:
        yield service


@pytest.fixture
def shut(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The store takes no data object from the service until this is set."""
    opened = threading.Event()

    class Shut(LocalStore):
        def put_from(self, key: str, *args: Any, **kwargs: Any) -> Any:
            assert opened.wait(PATIENCE_S)
            return super().put_from(key, *args, **kwargs)

    monkeypatch.setattr(lanes, "open_store", lambda url: Shut(url))
    yield opened
    opened.set()


class Away(LocalStore):
    """A folder that does not answer while this is set."""

    is_away = threading.Event()

    def __getattribute__(self, name: str) -> Any:
        if Away.is_away.is_set() and name in ("put", "put_from", "read", "read_into", "info", "list", "folders"):
            raise Transient("nobody listens")
        return super().__getattribute__(name)


def job(generation: int) -> JobIdentity:
    return JobIdentity(lineage="l", generation=generation)


def held(node: InThread) -> list[int]:
    assert node.held is not None
    return [label.step for label in node.held.node.inventory.labels()]


def restored(url: Path, generation: int) -> tuple[int, dict[str, Any], Told]:
    told: Told = []
    state = tensors(0)
    with Checkpointer(
        url, job=job(generation), on_event=lambda event, fields: told.append((str(event), fields))
    ) as ckpt:
        step = ckpt.restore(state)
    return step, state, told


def test_a_state_that_is_not_stored_yet_is_restored_from_memory(
    tmp_path: Path, node: InThread, shut: threading.Event
) -> None:
    before = Checkpointer(tmp_path / "run", job=job(1)).start()
    before.save(7, tensors(7), wait="held")
    assert before.wait(held=True)
    assert node.server.truce._now != Standstill(), "its way to the store begins after the restore"
    until("its objects", lambda: held(node) == [7])  # who asks for them waits
    before._close(abandon=True)
    step, state, told = restored(tmp_path / "run", 2)
    assert (step, state["n"], torch.equal(state["w"], tensors(7)["w"])) == (7, 7, True)
    until("what stood still to go on", lambda: not node.server.truce.is_on)
    fields = dict(told)["restored"]
    assert fields["from_own"] > 300_000 * 4
    assert not {"from_peer", "from_store"} & fields.keys()
    assert committed(tmp_path / "run") == []  # nobody has waited for that
    shut.set()
    until("the commit", lambda: committed(tmp_path / "run") == [7])


def test_while_the_store_is_away_a_job_goes_on_from_memory_and_claims_the_run_later(
    tmp_path: Path, node: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.checkpointer.open_store", Away)
    monkeypatch.setattr(lanes, "open_store", Away)
    try:
        with Checkpointer(tmp_path / "run", job=job(1)) as ckpt:
            ckpt.save(7, tensors(7), wait=True)
            Away.is_away.set()
            ckpt.save(8, tensors(8), wait=True)
        told: Told = []
        state = tensors(0)
        with Checkpointer(
            tmp_path / "run", job=job(2), on_event=lambda e, fields: told.append((str(e), fields))
        ) as ckpt:
            assert (ckpt.restore(state), state["n"], torch.equal(state["w"], tensors(8)["w"])) == (8, 8, True)
            assert [name for name, _ in told] == [
                "checkpoint_claimed_later",
                "checkpoint_store_unasked",
                "restored",
            ]
            Away.is_away.clear()
            ckpt.save(9, tensors(9), wait=True)
            assert ckpt.wait()
            ckpt.save(10, tensors(10), wait=True)
            assert ckpt.wait()
    finally:
        Away.is_away.clear()
    assert committed(tmp_path / "run") == [10, 9, 7]
    recorded = owner.read_owner(open_store(tmp_path / "run"))
    assert recorded is not None and recorded.generation == 2


def test_without_a_state_in_memory_a_store_that_is_away_ends_the_start(
    tmp_path: Path, node: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.checkpointer.open_store", Away)
    Away.is_away.set()
    try:
        with pytest.raises(Transient, match="nobody listens"):
            Checkpointer(tmp_path / "run", job=job(1)).start()
    finally:
        Away.is_away.clear()


def test_of_a_committed_checkpoint_the_bytes_come_from_memory(tmp_path: Path, node: InThread) -> None:
    with Checkpointer(tmp_path / "run", job=job(1)) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, tensors(step), wait=True)
        assert held(node) == [3, 2]
    step, state, told = restored(tmp_path / "run", 2)
    assert (step, torch.equal(state["w"], tensors(3)["w"])) == (3, True)
    assert dict(told)["restored"]["from_own"] > 300_000 * 4
    assert [name for name, _ in told] == ["restored"]


def test_nobody_adopts_a_save_whose_end_was_told(
    tmp_path: Path, node: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker may hear that its save is committed, and another may claim the run, before the service is through."""
    go_on, end = threading.Event(), Session.end

    def end_slowly(session: Session, attempt: str, **outcome: Any) -> bool:
        found = end(session, attempt, **outcome)
        go_on.wait(60.0)
        return found

    monkeypatch.setattr(Session, "end", end_slowly)
    with Checkpointer(tmp_path / "run", job=job(1)) as ckpt:
        ckpt.save(1, tensors(1), wait=True)
    step, _, told = restored(tmp_path / "run", 2)
    go_on.set()
    assert (step, [name for name, _ in told]) == (1, ["restored"])


def test_what_is_stored_from_memory_is_what_is_stored_without(tmp_path: Path, node: InThread) -> None:
    for name, uses_it in (("with", None), ("without", False)):
        with Checkpointer(tmp_path / name, job=job(1), service=uses_it) as ckpt:
            ckpt.save(1, tensors(1), wait=True)
    (one,), (other,) = ((tmp_path / name).rglob("__0_0.distcp") for name in ("with", "without"))
    assert one.read_bytes() == other.read_bytes()
    step, state, _ = restored(tmp_path / "without", 2)
    assert (step, torch.equal(state["w"], tensors(1)["w"])) == (1, True)


def test_a_slot_that_was_overwritten_costs_no_more_than_the_way_to_the_store(tmp_path: Path, node: InThread) -> None:
    with Checkpointer(tmp_path / "run", job=job(1)) as ckpt:
        ckpt.save(1, tensors(1), wait=True)
    assert node.held is not None
    (label,) = node.held.node.inventory.labels()
    with node.held.node.inventory.reading(label.attempt, label.rank) as part:
        for slot in part.memories:
            slot.memory[len(slot.memory) // 2] ^= 1
    step, state, told = restored(tmp_path / "run", 2)
    assert (step, torch.equal(state["w"], tensors(1)["w"])) == (1, True)
    failed = [fields for name, fields in told if name == "checkpoint_source_failed"]
    assert {fields["tier"] for fields in failed} == {"own"}
    assert dict(told)["restored"]["from_store"] > 0


def test_a_worker_that_asks_how_the_service_is_meets_no_slot_that_is_gone() -> None:
    """It asks from another thread than those that open a parcel and let go of it; an error would end its connection."""
    parcel = Parcel(TakenOver("name", Mock(waits=False), [999_999]))
    assert parcel.size_bytes == 0


def test_memory_that_is_held_is_let_go_with_the_service(tmp_path: Path, node: InThread) -> None:
    num_fds = len(os.listdir("/proc/self/fd"))
    with Checkpointer(tmp_path / "run", job=job(1), keep=1) as ckpt:
        for step in range(1, _NUM_SAVES + 1):
            ckpt.save(step, tensors(step), wait=True)
        assert held(node) == [_NUM_SAVES, _NUM_SAVES - 1]
    until("descriptors to be closed", lambda: len(os.listdir("/proc/self/fd")) <= num_fds + _NUM_FDS_HELD)
    assert node.held is not None
    node.held.close()
    until("all of them", lambda: len(os.listdir("/proc/self/fd")) <= num_fds)


def test_a_service_that_is_gone_is_told_and_gone_on_without(
    tmp_path: Path, node: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.service.local_memory._CONNECT_S", 0.1)
    monkeypatch.setattr("storage.service.client.RESTART_S", 0.1)
    with Checkpointer(tmp_path / "run", job=job(1)) as ckpt:
        ckpt.save(1, tensors(1), wait=True)
    node.close()
    step, state, told = restored(tmp_path / "run", 2)
    assert (step, torch.equal(state["w"], tensors(1)["w"])) == (1, True)
    away = [fields["reason"] for name, fields in told if name == "checkpoint_memory_away"]
    assert away and all("the checkpoint service does not answer" in reason for reason in away)


def test_a_save_for_memory_is_held_and_not_stored(tmp_path: Path, node: InThread) -> None:
    told: Told = []

    def tell(event: str, fields: dict[str, Any]) -> None:
        told.append((str(event), fields))

    with Checkpointer(tmp_path / "run", job=job(1), on_event=tell, every=4, ram_every=1) as ckpt:
        for step in range(1, 7):
            ckpt.save(step, tensors(step))
    assert committed(tmp_path / "run") == [4]
    assert [fields["step"] for name, fields in told if name == "checkpoint_held"] == [1, 2, 3, 5, 6]
    assert held(node) == [6, 5]
    step, state, _ = restored(tmp_path / "run", 2)
    assert (step, torch.equal(state["w"], tensors(6)["w"])) == (6, True)


def test_while_a_state_is_copied_slowly_it_stays_and_newer_ones_are_not_copied(
    tmp_path: Path, node: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each node would have dropped its own part of the state of which the others have copies."""
    settling, seen = list[Callable[[], object]](), dict[int, list[int]]()

    def add_slowly(self: NodeMemory, part: HeldPart, settled: Callable[[], object] = lambda: None) -> None:
        """As where there is another node, whose copies take long."""
        self.inventory.add(part)
        settling.append(settled) if part.is_copied else settled()

    monkeypatch.setattr(NodeMemory, "add", add_slowly)
    with Checkpointer(tmp_path / "run", job=job(1), every=10, ram_every=1) as ckpt:
        for step in range(1, 8):
            ckpt.save(step, tensors(step))
            until("the state", lambda step=step: step in held(node))
            ckpt.wait()
            seen[step] = held(node)
            if step in (1, 5, 6):
                settling.pop()()
                saver = ckpt._savers()[0]
                until("the worker to hear of it", lambda saver=saver: not saver._committer.is_copying)
    assert seen == {1: [1], 2: [2, 1], 3: [3, 2, 1], 4: [4, 3, 2, 1], 5: [5, 4, 2, 1], 6: [6, 5, 2], 7: [7, 6]}


def test_saves_for_memory_end_though_the_store_takes_none_of_those_before_them(
    tmp_path: Path, node: InThread, shut: threading.Event
) -> None:
    """Any number of them: none keeps its slot, or descriptors, until what is stored before it has been."""
    told, num_fds = Told(), 0

    def tell(event: str, fields: dict[str, Any]) -> None:
        told.append((str(event), fields))

    with Checkpointer(tmp_path / "run", job=job(1), on_event=tell, every=100, ram_every=1) as ckpt:
        for step in range(100, 130):
            ckpt.save(step, tensors(step))
            until("the state", lambda step=step: step in held(node))
            num_fds = num_fds if step > 105 else len(os.listdir("/proc/self/fd"))
        assert held(node) == [129, 128]
        until("no more descriptors", lambda: len(os.listdir("/proc/self/fd")) < num_fds + 10)  # some come and go
        with connected(node.path) as caller:
            unfinished = asked(caller, AskUnfinished(url=str(tmp_path / "run")))
        assert isinstance(unfinished, Unfinished)
        assert [attempt.step for attempt in unfinished.attempts] == [100]
        shut.set()
        assert ckpt.wait()
    assert [fields["step"] for name, fields in told if name == "checkpoint_held"] == list(range(101, 130))
    assert not [fields for name, fields in told if name == "checkpoint_skipped"]
    assert committed(tmp_path / "run") == [100]


def test_a_save_for_memory_fails_where_the_service_is_lost_and_is_never_stored(
    tmp_path: Path, node: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other nodes it is only held, so the store would wait for their parts until it counts as failed."""
    monkeypatch.setattr("storage.service.client.RESTART_S", 0.1)
    told = Told()

    def tell(event: str, fields: dict[str, Any]) -> None:
        told.append((str(event), fields))

    with Checkpointer(tmp_path / "run", job=job(1), on_event=tell, every=4, ram_every=1) as ckpt:
        for step in range(4, 9):
            ckpt.save(step, tensors(step))
            ckpt.wait()
            if step == 5:
                node.close()
    assert committed(tmp_path / "run") == [8, 4]
    failed = [(fields["step"], fields["reason"]) for name, fields in told if name == "checkpoint_failed"]
    reason = "it was to stay in the memory of the node's checkpoint service, which is away"
    assert failed == [(6, reason), (7, reason)]


def test_a_save_for_memory_does_not_wait_for_one_that_the_store_is_slow_to_take(
    tmp_path: Path, node: InThread, shut: threading.Event
) -> None:
    before = Checkpointer(tmp_path / "run", job=job(1), every=10, ram_every=1, backlog="wait").start()
    before.save(10, tensors(10))
    until("the first to be held", lambda: held(node) == [10])
    shut.set()
    before.save(11, tensors(11))
    until("the second", lambda: held(node) == [11, 10])
    before.close()
