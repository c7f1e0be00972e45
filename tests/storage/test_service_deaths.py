"""Whatever is killed: a save that had returned is committed, or said to have failed; and nothing is left."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from storage import Checkpointer, JobIdentity
from storage.agent import AgentEnvironment
from storage.service import address, starting
from storage.service.client import ServiceBackend
from storage.service.held_messages import AskCard
from storage.service.sidecar import CheckpointService
from storage.service.ways import OwnService
from tests import sample
from tests.cluster import is_running, until
from tests.ranks import Ranks
from tests.storage.service_cases import asked, committed, connected, events_in, process, status
from tests.storage.small_runs import Events, state

SERVICE = AgentEnvironment.variable("service")
NUM_KILLS = int(os.environ.get("SERVICE_KILLS", "1"))
pytestmark = pytest.mark.timeout(max(300, 20 * NUM_KILLS))  # a service that is killed in a row is started ever later


@pytest.fixture
def agents_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of an agent's worker; its file of events."""
    monkeypatch.setenv(SERVICE, str(tmp_path / "node" / "service.sock"))
    monkeypatch.setenv(AgentEnvironment.variable("events"), str(tmp_path / "events.jsonl"))
    monkeypatch.setenv(AgentEnvironment.variable("lineage"), "one launch")
    return tmp_path / "events.jsonl"


def outcomes(events: Path, step: int) -> list[str]:
    """What was said to have become of a step."""
    ends = ("checkpoint_committed", "checkpoint_failed")
    return [event["event"] for event in events_in(events) if event.get("step") == step and event["event"] in ends]


def die_after_saving(url: str, environment: dict[str, str], step: int) -> None:
    """Save with all ranks, and be killed 10 ms after that has returned on each of them."""
    os.environ.update(environment)
    Checkpointer(url).save(step, {"w": torch.full((200_000,), float(step)), "n": step})
    dist.barrier()
    time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(AgentEnvironment.variable("")[:-1])}


def test_workers_that_are_killed_after_their_save_have_saved(tmp_path: Path, agents_files: Path, ranks: Ranks) -> None:
    with process(tmp_path / "node" / "service.sock"):
        for step in range(1, NUM_KILLS + 1):
            ranks.run_losing([0, 1], die_after_saving, f"{tmp_path}/run", environment(), step, world_size=2)
            until(f"the outcome of step {step}", functools.partial(outcomes, agents_files, step))
            assert outcomes(agents_files, step) == ["checkpoint_committed"]
            assert committed(tmp_path / "run")[0] == step
    with Checkpointer(tmp_path / "run") as ckpt:
        assert ckpt.restore({"w": torch.zeros(200_000), "n": 0}) == NUM_KILLS


def test_a_service_that_is_killed_comes_back_and_commits(tmp_path: Path, agents_files: Path, events: Events) -> None:
    rng = random.Random(7)
    with (
        process(tmp_path / "node" / "service.sock", "--rate-limit", "20e6") as service,
        Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt,
    ):
        for step in range(1, NUM_KILLS + 1):
            ckpt.save(step, {"w": torch.full((1_000_000,), float(step)), "n": step})
            time.sleep(rng.uniform(0.0, 0.3))
            service.kill_service()
            assert ckpt.wait(), f"step {step}: {events[0]}"
        assert until("it is back", service.status).num_restarts == NUM_KILLS
    ends = [str(name) for name, _ in events[0] if name in ("checkpoint_committed", "checkpoint_failed")]
    assert ends == ["checkpoint_committed"] * NUM_KILLS


def test_workers_and_service_are_killed_at_once(tmp_path: Path, agents_files: Path, ranks: Ranks) -> None:
    """What the service had taken over is taken up by the next one, which the keeper starts."""
    with process(tmp_path / "node" / "service.sock", "--rate-limit", "4e5") as service, ThreadPoolExecutor(1) as beside:
        dying = beside.submit(
            ranks.run_losing, [0], die_after_saving, f"{tmp_path}/run", environment(), 1, world_size=1
        )
        until("the service to have it", lambda: (found := service.status()) and found.num_unfinished + found.num_ended)
        service.kill_service()
        dying.result()
        until("an outcome", lambda: outcomes(agents_files, 1))
        assert outcomes(agents_files, 1) == ["checkpoint_committed"]
        assert until("it is back", service.status).num_restarts == 1


def die_while_one_waits(url: str, environment: dict[str, str], step: int) -> None:
    """Save twice with all ranks, the second while the first is being stored, and be killed."""
    os.environ.update(environment)
    ckpt = Checkpointer(url, keep=9, backlog="replace")
    for number in (step, step + 1):
        ckpt.save(number, {"w": torch.full((200_000,), float(number)), "n": number})
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_waits_is_saved_though_workers_and_service_are_killed(
    tmp_path: Path, agents_files: Path, ranks: Ranks
) -> None:
    with process(tmp_path / "node" / "service.sock", "--rate-limit", "2e6") as service:
        for step in range(1, 2 * NUM_KILLS, 2):
            ranks.run_losing([0, 1], die_while_one_waits, f"{tmp_path}/run", environment(), step, world_size=2)
            service.kill_service()
            for number in (step, step + 1):
                until(f"the outcome of step {number}", functools.partial(outcomes, agents_files, number))
                assert outcomes(agents_files, number) == ["checkpoint_committed"]
        assert committed(tmp_path / "run")[:2] == [2 * NUM_KILLS, 2 * NUM_KILLS - 1]


@pytest.mark.parametrize("is_alone", [False, True])
def test_when_all_are_killed_that_had_a_save_it_is_said_to_have_failed(
    is_alone: bool, tmp_path: Path, agents_files: Path, ranks: Ranks
) -> None:
    """By the service that an agent starts again; where there is no agent, by what outlives them, and goes then."""
    path = tmp_path / "node" / "service.sock"
    with process(path, "--rate-limit", "1e4", "--linger", "0", is_alone=is_alone) as service:
        ranks.run_losing([0], die_after_saving, f"{tmp_path}/run", environment(), 1, world_size=1)
        assert list(address.kept(path).glob("*.json")), "whether or not the service has heard of it"
        if is_alone:
            for pid in (service.keeper.pid, service.pid()):
                os.kill(pid, signal.SIGKILL)
            until("an outcome", lambda: outcomes(agents_files, 1))
            until("all files to be gone", lambda: not list(path.parent.iterdir()))
    assert is_alone or outcomes(agents_files, 1) == []
    if not is_alone:
        with process(path):
            until("an outcome", lambda: outcomes(agents_files, 1))
            until("its note to be gone", lambda: not list(address.kept(path).glob("*")))
    assert outcomes(agents_files, 1) == ["checkpoint_failed"]
    assert committed(tmp_path / "run") == []


def die_before_the_service_hears_of_it(url: str, environment: dict[str, str]) -> None:
    """Save, and be killed with what was sent."""
    os.environ.update(environment)
    ServiceBackend._send = lambda *args: None  # type: ignore[method-assign]
    Checkpointer(url).save(1, {"w": torch.ones(1000), "n": 1})
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_the_service_has_not_heard_of_is_said_to_have_failed(
    tmp_path: Path, agents_files: Path, ranks: Ranks
) -> None:
    """By the service that lives, once the worker is gone."""
    path = tmp_path / "node" / "service.sock"
    with process(path):
        ranks.run_losing([0], die_before_the_service_hears_of_it, f"{tmp_path}/run", environment(), world_size=1)
        until("an outcome", lambda: outcomes(agents_files, 1))
        until("its note to be gone", lambda: not list(address.kept(path).glob("*")))
    assert outcomes(agents_files, 1) == ["checkpoint_failed"]


def test_with_its_keeper_a_service_goes_and_the_worker_saves_by_itself(
    tmp_path: Path, agents_files: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.service.client.RESTART_S", 0.0)
    with (
        process(tmp_path / "node" / "service.sock", "--rate-limit", "1e5") as service,
        Checkpointer(tmp_path / "run", on_event=events[1]) as ckpt,
    ):
        ckpt.save(1, state(1) | {"w": torch.zeros(200_000)})
        pid = service.pid()
        service.keeper.kill()
        assert ckpt.wait()
        until("the service to be gone", lambda: not is_running(pid))
    assert "checkpoint_direct" in [str(name) for name, _ in events[0]]


ORDERS = [" ".join(names) for names in itertools.permutations(("agent", "service", "worker"))]
FEWER = ("agent service worker", "service worker agent", "worker agent service")
"""Each of them once in each place."""


@pytest.mark.parametrize("order", [order if order in FEWER else sample.rest(order) for order in ORDERS])
def test_nothing_is_left_of_agent_service_and_worker(order: str, tmp_path: Path, agents_files: Path) -> None:
    """No process, no socket, no note, no folder; and of memory there is only what has no name."""
    agent = subprocess.Popen([sys.executable, "-c", AGENT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert agent.stdout is not None
        folder, keeper = agent.stdout.readline().split()
        path = Path(folder) / "service" / "service.sock"
        until("the service", lambda: path.exists() and status(path))
        with connecting(path) as child:
            family = [psutil.Process(int(keeper)), *psutil.Process(agent.pid).children(recursive=True)]
            victims = {
                "agent": [agent.pid],
                "service": [int(keeper), *(p.pid for p in psutil.Process(int(keeper)).children())],
                "worker": [child.pid],
            }
            assert len(victims["service"]) == 2
            for name in order.split():
                for pid in victims[name]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
    finally:
        agent.kill()
        agent.communicate()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    until("all files to be gone", lambda: not list(tmp_path.iterdir()))


@contextlib.contextmanager
def connecting(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is connected to the service."""
    child = subprocess.Popen([sys.executable, "-c", WORKER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "connected\n"
        yield child
    finally:
        child.kill()
        child.communicate()


WORKER = """
import os, sys, time
from pathlib import Path
from storage.service.channel import connect
from storage.service.messages import Hello
channel, _ = connect(Path(sys.argv[1]), Hello(pid=os.getpid(), session="a"))
print("connected", flush=True)
time.sleep(600)
"""
AGENT = """
import sys, tempfile, time
from launcher.workers.runtime import runtime_dir
from storage import CheckpointService
tempfile.tempdir = sys.argv[1]
with runtime_dir() as folder:
    service = CheckpointService()
    service.start(folder, print)
    print(folder, service._process.pid, flush=True)
    time.sleep(600)
"""


def test_an_agents_service_is_started_again_is_there_when_it_is_expected_and_ends_with_it(tmp_path: Path) -> None:
    def is_used() -> bool:
        service.expect()
        return address.used(path).exists()

    told: list[str] = []
    service = CheckpointService()
    service.start(tmp_path, told.append)
    try:
        path = Path(service.address)
        until("the socket", path.exists)
        first = service._process
        assert first is not None
        first.kill()
        until("another", lambda: service._process is not first)
        assert told == ["it has ended (exit code -9), and is started again"]
        with Checkpointer(tmp_path / "run", service=False) as ckpt:
            ckpt.save(1, state(1), wait=True)
        until("its process", is_used)
        assert status(path).num_unfinished == 0
        assert starting.log_of(path).read_text() == "", "who only wanted it to be there is no stranger"
        service.drain(0.0)
    finally:
        service.close()
    assert not path.exists()
    assert len(told) == 1


def test_a_checkpointer_starts_a_service_of_its_own(
    tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    found: list[Path] = []
    start = OwnService.start

    def starting(self: OwnService) -> None:
        self._arguments = ("--linger", "0")
        found.append(self.path)
        start(self)

    monkeypatch.setattr(OwnService, "start", starting)
    with Checkpointer(tmp_path / "run", service=True, on_event=events[1]) as ckpt:
        assert not found, "it starts with the first save"
        ckpt.save(1, state(1), wait=True)
        assert ckpt.wait()
    assert [str(name) for name, _ in events[0]] == ["checkpoint_staged", "checkpoint_committed"]
    until("the service to have gone", lambda: not found[0].exists())


def test_states_in_memory_outlive_a_crash_of_the_service(
    tmp_path: Path, agents_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is stored as well as the newer one that is in memory alone; and others find it where it was."""
    monkeypatch.setenv(AgentEnvironment.variable("node"), "a")
    path, cards, told = tmp_path / "node" / "service.sock", list[object](), list[tuple[str, dict[str, Any]]]()

    def card() -> object:
        with connected(path) as caller:
            return asked(caller, AskCard(node="a"))

    with process(path) as service:
        with Checkpointer(tmp_path / "run", job=JobIdentity(lineage="l", generation=1), every=10, ram_every=1) as ckpt:
            for step in (10, 11):
                ckpt.save(step, {"w": torch.full((300_000,), float(step)), "n": step})
            assert ckpt.wait()
        until("the service to be done", lambda: (found := service.status()) and not found.num_unfinished)
        cards.append(card())
        service.kill_service()
        until("another one", lambda: (found := service.status()) and found.num_restarts == 1)
        cards.append(card())
        state: dict[str, Any] = {"w": torch.zeros(300_000), "n": 0}
        job = JobIdentity(lineage="l", generation=2)
        with Checkpointer(tmp_path / "run", job=job, on_event=lambda n, f: told.append((str(n), f))) as ckpt:
            assert ckpt.restore(state) == 11
        assert (state["n"], float(state["w"].min())) == (11, 11.0)
    assert cards[0] == cards[1], "its address and its token"
    assert dict(told)["restored"]["from_own"] > 300_000 * 4
    assert "checkpoint_memory_away" not in [name for name, _ in told]
    assert committed(tmp_path / "run") == [10]
