"""What a Checkpointer tells by itself: to the agent's file, to its listener, and of a store that is away."""

from __future__ import annotations

import gc
import json
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe import worker
from storage import Checkpointer, open_store
from storage.errors import Cause, Denied, Transient
from storage.events import CheckpointEvent, Reporter
from storage.run import owner
from storage.run.heartbeat import Heartbeat
from storage.stores.health import StoreAway, StoreBack, StoreHealth
from tests.cluster import read_lines, until
from tests.s3 import S3Server
from tests.storage.heartbeat_cases import owner_of
from tests.storage.proxy import Fault, FaultProxy


@pytest.fixture
def agents_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As an agent names it to its workers."""
    path = tmp_path / "logs" / "events.jsonl"
    path.parent.mkdir()
    environment = {"EVENTS": str(path), "RUN_ID": "job", "NODE": "a-1", "GENERATION": "7"}
    for name, value in environment.items():
        monkeypatch.setenv(f"ELASTIC_MOE_{name}", value)
    monkeypatch.setenv("RANK", "3")
    return path


def use(url: str, **options: Any) -> None:
    """A save, a restore of it, and a save whose commit is waited for."""
    with Checkpointer(url, **options) as checkpointer:
        checkpointer.save(1, {"w": torch.ones(1000)})
        assert checkpointer.restore({"w": torch.zeros(1000)}) == 1
        checkpointer.save(2, {"w": torch.ones(1000)}, wait=True)


def names(path: Path) -> list[str]:
    told = [line["event"] for line in read_lines(path)]
    return [name for name in told if name != "checkpoint_waited"]  # unless it took no time


STORY = ["checkpoint_staged", "checkpoint_committed", "restored", "checkpoint_staged", "checkpoint_committed"]


def test_no_secret_of_a_url_is_told(agents_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[dict[str, Any]] = []
    report = Reporter(lambda _, fields: heard.append(fields))
    report(CheckpointEvent.DIRECT, url="https://h/x?sig=hunter2", reason=["at ftp://u:hunter2@h/x"], step=1)
    told = {"url": "https://h/x?sig=...", "reason": ["at ftp://u:...@h/x"], "step": 1}
    assert heard == [told]
    (line,) = read_lines(agents_file)
    assert {name: line[name] for name in told} == told
    assert "hunter2" not in caplog.text


def test_events_go_to_the_agents_file_in_the_launchers_form(agents_file: Path, tmp_path: Path) -> None:
    began_ts = time.time()
    use(str(tmp_path / "run"))
    assert names(agents_file) == STORY
    first = read_lines(agents_file)[0]
    assert list(first)[:6] == ["ts", "run_id", "node", "generation", "event", "rank"]
    assert (first["run_id"], first["node"], first["generation"], first["rank"]) == ("job", "a-1", 7, 3)
    assert began_ts - 1 < first["ts"] < time.time()
    assert (first["step"], first["bytes"] > 0, first["seconds"] > 0) == (1, True, True)
    assert agents_file.stat().st_mode & 0o777 == 0o600


def test_a_listener_hears_them_too(agents_file: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    use(str(tmp_path / "run"), on_event=lambda name, fields: heard.append(name))
    assert heard == names(agents_file) == STORY


def test_a_listener_that_writes_them_itself_makes_no_doubles_and_may_add_to_them(
    agents_file: Path, tmp_path: Path
) -> None:
    def forward(name: str, fields: dict[str, Any]) -> None:
        worker.event("mine", about=name)  # another event is no reason to leave out this one
        if name == "checkpoint_staged":
            worker.event(name, **fields, model="big")

    use(str(tmp_path / "run"), on_event=forward)
    assert [name for name in names(agents_file) if name != "mine"] == STORY
    assert [line.get("model") for line in read_lines(agents_file) if line["event"] == "checkpoint_staged"] == [
        "big"
    ] * 2


def test_a_listener_that_fails_costs_no_event(agents_file: Path, tmp_path: Path) -> None:
    def fail(name: str, fields: dict[str, Any]) -> None:
        raise RuntimeError("no")

    use(str(tmp_path / "run"), on_event=fail)
    assert names(agents_file) == STORY


def test_a_failed_save_is_told(agents_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise Transient("the store is on fire")

    with Checkpointer(str(tmp_path / "run")) as checkpointer:
        monkeypatch.setattr("storage.saving.uploads.write_payloads", fail)
        checkpointer.save(1, {"w": torch.ones(10)}, wait=True)
    (failed,) = (line for line in read_lines(agents_file) if line["event"] == "checkpoint_failed")
    assert "the store is on fire" in failed["reason"]


def test_a_file_that_cannot_be_written_costs_the_event_only(
    agents_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    agents_file.parent.rmdir()
    use(str(tmp_path / "run"))
    assert "event checkpoint_staged lost" in caplog.text


def test_without_an_agent_nothing_is_written(tmp_path: Path) -> None:
    use(str(tmp_path / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class Time:
    now_s = 100.0


@pytest.fixture
def told() -> tuple[StoreHealth, Time, list[StoreAway | StoreBack]]:
    clock, heard = Time(), list[StoreAway | StoreBack]()
    health = StoreHealth(lambda: clock.now_s)
    health.tell = heard.append
    return health, clock, heard


def ask(health: StoreHealth, clock: Time, seconds: float, error: Exception | None = None) -> None:
    """A request that takes so long."""
    try:
        with health.watched():
            clock.now_s += seconds
            if error is not None:
                raise error
    except type(error or Exception()):
        pass


class TestHealth:
    def test_an_outage_is_told_once_and_its_end_with_its_length(self, told: Any) -> None:
        health, clock, heard = told
        ask(health, clock, 0.1)
        for _ in range(20):
            ask(health, clock, 1.0, Transient("away", Cause.UNREACHABLE))
        ask(health, clock, 1.0)
        assert heard == [StoreAway(pytest.approx(3.0), Cause.UNREACHABLE, "away"), StoreBack(pytest.approx(21.0))]  # type: ignore[arg-type]

    def test_one_success_among_failures_is_no_outage(self, told: Any) -> None:
        health, clock, heard = told
        for _ in range(20):
            ask(health, clock, 1.0, Transient("slow", Cause.THROTTLED))
            ask(health, clock, 0.1)
        assert heard == []

    def test_a_request_that_hangs_counts_from_its_start(self, told: Any) -> None:
        health, clock, heard = told
        ask(health, clock, 30.0, Transient("nothing came", Cause.STALLED))
        assert heard == [StoreAway(30.0, Cause.STALLED, "nothing came")]

    def test_what_an_owner_sees_between_two_beats_began_halfway(self, told: Any) -> None:
        health, clock, heard = told
        ask(health, clock, 0.0)
        clock.now_s += 5.0
        ask(health, clock, 1.0, Transient("away"))
        assert heard == [StoreAway(3.5, Cause.OTHER, "away")]

    @pytest.mark.parametrize("error", [Denied("no"), Transient("another was first", Cause.CONFLICT)])
    def test_a_refusal_is_an_answer(self, told: Any, error: Exception) -> None:
        health, clock, heard = told
        for _ in range(5):
            ask(health, clock, 1.0, error)
        assert heard == []


def test_a_listener_is_not_kept_by_the_store_that_is_watched(memory_url: str) -> None:
    store = open_store(memory_url)
    report = Reporter(None)
    report.watch(store)
    gone = weakref.ref(report)
    del report
    gc.collect()
    assert gone() is None
    assert store.retries.health.tell is not None
    store.retries.health.tell(StoreBack(1.0))


def test_an_outage_of_s3_is_told_with_its_length(moto: S3Server, agents_file: Path) -> None:
    """By the signs of life of the run's owner alone: the training neither saves nor restores meanwhile."""
    with FaultProxy(moto) as proxy:
        store = open_store(proxy.url("outage"))
        report = Reporter(None)
        report.watch(store)
        mine, _ = owner.claim(store, owner_of("a", "a", 1))
        beats = Heartbeat(store, mine, None, report, interval_s=0.2).start()
        try:
            away = Fault("lose", times=1_000_000)
            began_s = time.monotonic()
            proxy.faults.append(away)
            until(
                "it is told", lambda: "checkpoint_store_away" in agents_file.read_text() if agents_file.exists() else 0
            )
            until("three seconds are over", lambda: time.monotonic() > began_s + 3)
            away.times = 0
            until("its end is told", lambda: "checkpoint_store_back" in agents_file.read_text())
            told_s = time.monotonic()
        finally:
            beats.close()
    gone, back = read_lines(agents_file)
    assert (gone["event"], gone["cause"], back["event"]) == ("checkpoint_store_away", "reset", "checkpoint_store_back")
    # it counts from the last beat that was answered, 2.5 s before at most; a busy machine may hold the next one up
    assert 3.0 <= back["seconds"] <= told_s - began_s + 2.5
    assert moto.secret_key not in json.dumps([gone, back])
