"""Live states between workers, their node's service and its agent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.arena.slot import Slot
from storage.events import Reporter
from storage.held.choice import join
from storage.held.inventory import HeldPart
from storage.live.link import LiveLink
from storage.live.state import LiveState
from storage.ranks.agreement import AgreeingGroup
from storage.run.job import Origin
from storage.service import address, capture_request
from storage.service.capture_request import CaptureRequest
from storage.service.capturing import LiveKeeper
from storage.service.live_messages import KeepLive, WatchLive
from storage.service.messages import Identity, StagedAttempt
from storage.service.server import ServerOptions
from storage.service.sessions import ServiceCaller
from tests.cluster import until
from tests.storage.service_cases import PATIENCE_S, InThread, connected


class Service:
    """A service in this process, and what it holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: list[HeldPart] = []
        self.keeper = LiveKeeper(self.parts.append)
        self.running = InThread(path, ServerOptions(linger_s=PATIENCE_S, wind_up_s=PATIENCE_S))
        self.keeper.serve(self.running.server)

    def capture(self, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """As the agent asks for it, until it is answered."""
        request = CaptureRequest(self.path, timeout_s).start()
        until("the answer", request.done)
        return dict(request.told())


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path / "private" / "service.sock")
    service.running.start()
    yield service
    service.running.close()
    for part in service.parts:
        part.release()


class Worker:
    """One that trains and notes its steps."""

    def __init__(self, service: Service, generation: int = 1) -> None:
        self.state: dict[str, Any] = {"weight": torch.arange(6.0), "step": 0}
        origin = Origin(generation=generation, lineage="here", mesh={"replicate": 1})
        self.link = LiveLink(service.path, "/runs/a", 0, origin)
        self.live = LiveState(AgreeingGroup(alone=True), self.link.keep, Reporter(None)).start()
        self.link.start(self.live.ask)
        until("the connection", lambda: self.link._channel)
        known = service.keeper._node.watchers
        until("the service to know it", lambda: any(who.generation == generation for who in list(known.values())))

    def train(self, step: int) -> None:
        self.state["weight"] += 1
        self.state["step"] = step
        self.live.note(step, self.state)

    def close(self, *, rescue: bool = False) -> None:
        self.live.close(rescue=rescue)
        self.link.close()


@contextlib.contextmanager
def worker(service: Service, generation: int = 1) -> Iterator[Worker]:
    found = Worker(service, generation)
    try:
        yield found
    finally:
        found.close()


def test_what_an_agent_asks_for_is_kept(service: Service) -> None:
    with worker(service) as found:
        found.train(1)
        found.train(2)
        assert service.capture() == {"steps": {0: 2}, "missed": {}}
    (part,) = service.parts
    label = part.label
    assert (label.step, label.rank, label.generation, label.lineage, label.run) == (2, 0, 1, "here", "/runs/a")
    assert label.is_all
    joined = join([part.papers]).manifest
    entry = next(item for item in joined.items.rows() if item.key == "weight")
    held = part.objects[joined.objects[entry.object].name]
    assert entry.raw_offset is not None
    data = b"".join(map(bytes, held.views(entry.offset + entry.raw_offset, 24)))
    assert torch.frombuffer(bytearray(data), dtype=torch.float32).tolist() == [2, 3, 4, 5, 6, 7]


def test_a_worker_that_an_error_has_ended_has_kept_its_state_by_itself(service: Service) -> None:
    found = Worker(service)
    found.train(1)
    found.close(rescue=True)
    assert service.capture() == {"steps": {0: 1}, "missed": {}}
    assert len(service.parts) == 1
    with worker(service, generation=2):
        told = service.capture()
    assert told == {"steps": {}, "missed": {0: "no step was noted yet"}}, "that of a generation before is not told anew"


def test_a_part_that_cannot_be_taken_of_a_worker_that_is_gone_is_waited_for_by_nobody(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(caller: ServiceCaller, message: object) -> None:
        raise BrokenPipeError

    with connected(service.path) as gone, monkeypatch.context() as patch:
        patch.setattr(ServiceCaller, "answer", refuse)
        attempt = StagedAttempt(prefix="a/", step=1, id="a", world_size=1, rank=0)
        with contextlib.closing(Slot.create(1)) as slot:
            gone.send(KeepLive(url="/runs/a", attempt=attempt, origin=Identity()), [slot.fd])
            assert gone.receive() is None
    assert service.keeper._node.num_keeping == 0


def test_a_worker_that_does_not_answer_is_waited_for_no_longer_than_the_agent_says(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_request, "_ANSWER_S", PATIENCE_S)  # the service itself may be slow to say so
    with connected(service.path) as silent:
        silent.send(WatchLive(rank=3, generation=1))
        until("the worker", lambda: service.keeper._node.watchers)
        assert service.capture(0.1) == {"steps": {}, "missed": {3: "it has not answered in time"}}
    until("its end", lambda: not service.keeper._node.watchers)
    assert service.capture() == {"steps": {}, "missed": {}}


def test_a_state_that_the_service_cannot_hold_is_told_to_the_agent(service: Service) -> None:
    def fails(part: HeldPart) -> None:
        part.release()
        raise MemoryError("there is none")

    service.keeper._hold = fails
    missed = {0: "the state after step 1 cannot be held: MemoryError: there is none"}
    found = Worker(service)
    found.train(1)
    assert service.capture() == {"steps": {}, "missed": missed}
    found.close()
    assert service.capture() == {"steps": {}, "missed": missed}, "also once the worker is gone"


def test_a_service_that_is_away_costs_the_live_state_alone(tmp_path: Path) -> None:
    path = tmp_path / "private" / "service.sock"
    path.parent.mkdir(mode=0o700)
    with address.listen(path) as silent:
        request = CaptureRequest(path, PATIENCE_S).start()
        assert request.told()["reason"] == "the service has not answered in time"
        silent.accept()[0].close()
        until("its end", request.done)
        assert "reason" in request.told()
    request = CaptureRequest(path, PATIENCE_S).start()
    until("its end", request.done)
    assert "reason" in request.told()
    link = LiveLink(path, "/runs/a", 0, Origin())
    events: list[tuple[str, dict[str, Any]]] = []
    report = Reporter(lambda name, fields: events.append((name, fields)))
    live = LiveState(AgreeingGroup(alone=True), link.keep, report).start()
    live.note(1, {"weight": torch.ones(2)})
    link.start(live.ask)
    assert live.capture(PATIENCE_S) == "the node's checkpoint service is away"
    live.close(rescue=False)
    link.close()
    assert [name for name, _ in events] == ["checkpoint_live_missed"]


def test_a_worker_finds_a_service_that_was_started_again(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with worker(service) as found:
        found.train(1)
        before, known = found.link._channel, service.keeper._node.watchers
        assert before is not None
        (first,) = known
        before.close()
        until("another connection", lambda: found.link._channel not in (None, before))
        until("the service to know it", lambda: any(caller is not first for caller in list(known)))
        assert service.capture() == {"steps": {0: 1}, "missed": {}}
