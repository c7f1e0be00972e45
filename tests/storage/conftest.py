"""What the storage tests share."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import ranks
from tests.s3 import BUCKET, S3Server, juicefs_gateway, moto_server, seaweedfs_gateway
from tests.storage import copied_runs
from tests.storage.small_runs import Events, fresh_memory_url

__all__ = ["ranks"]

_names = itertools.count()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """FAULTS_SAVED_BY (worker, service) names who saves in the matrices of faults; else the workers do."""
    chosen = tuple(filter(None, os.environ.get("FAULTS_SAVED_BY", "").split(",")))
    if "saved_by" in metafunc.fixturenames and chosen:
        metafunc.parametrize("saved_by", chosen, indirect=True)


@pytest.fixture
def saved_by(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Who saves for Checkpointers of this process; a service runs on a thread of it."""
    found = str(getattr(request, "param", "worker"))
    assert found in ("worker", "service"), f"FAULTS_SAVED_BY={found}"
    if found == "worker":
        yield found
        return
    from storage.agent import AgentEnvironment
    from tests.storage.service_cases import in_thread

    path = tmp_path / "node" / "service.sock"
    monkeypatch.setenv(AgentEnvironment.variable("service"), str(path))
    with in_thread(path):
        yield found


@pytest.fixture
def memory_url() -> str:
    """The URL of a fresh in-memory store."""
    return fresh_memory_url()


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 10 and 20, each of five objects; nobody writes to it."""
    folder = tmp_path_factory.mktemp("source")
    copied_runs.save(str(folder), 10, 20)
    return folder


@pytest.fixture
def other(tmp_path: Path) -> str:
    """A run that has another step 20."""
    copied_runs.save(f"{tmp_path}/other", 20)
    return f"{tmp_path}/other"


@pytest.fixture
def events() -> Events:
    """A list of events and the listener that fills it."""
    seen: list[tuple[str, dict[str, Any]]] = []
    return seen, lambda name, fields: seen.append((name, fields))


@pytest.fixture
def no_look_at_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """No owner finds out by itself that it has lost the run, as it does every 5 s: a test may take that long."""
    from storage.run.heartbeat import Heartbeat

    monkeypatch.setattr("storage.saving.ownership.Heartbeat", functools.partial(Heartbeat, interval_s=600.0))


@pytest.fixture(scope="session")
def _juicefs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with juicefs_gateway(tmp_path_factory.mktemp("juicefs")) as server:
        yield server


@pytest.fixture(scope="session")
def _moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with moto_server(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def _seaweedfs() -> Iterator[S3Server]:
    with seaweedfs_gateway() as server:
        yield server


@pytest.fixture
def seaweedfs(_seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The session's SeaweedFS, with its credentials in the environment."""
    return _in_environment(_seaweedfs, monkeypatch)


@pytest.fixture
def juicefs(_juicefs: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The session's S3 gateway, with its credentials in the environment."""
    return _in_environment(_juicefs, monkeypatch)


@pytest.fixture
def moto(_moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The session's moto server, with its credentials in the environment."""
    return _in_environment(_moto, monkeypatch)


def _in_environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def make_url(request: pytest.FixtureRequest, tmp_path: object, memory_url: str) -> Callable[[str], str]:
    """From the name of a back end to the URL of a fresh store of its kind."""
    fresh = f"run-{next(_names)}"

    def make(kind: str) -> str:
        match kind:
            case "file-url":
                return f"file://{tmp_path}/a run"
            case "memory":
                return memory_url
            case "fsspec-file":
                return f"fsspec+file://{tmp_path}/run"
            case "fsspec-memory":
                return f"fsspec+memory://{fresh}"
            case "fsspec-s3":
                request.getfixturevalue("juicefs")
                return f"fsspec+s3://{BUCKET}/{fresh}"
            case "juicefs" | "moto":
                server: S3Server = request.getfixturevalue(kind)
                return server.url(fresh)
            case _:
                return f"{tmp_path}/run"

    return make


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Data objects of the service wait at it."""
    from storage.service import lanes
    from tests.storage.service_cases import Gate, Gated

    gate = Gate()

    def open_store(url: str) -> Gated:
        return Gated(url, gate, ".distcp")

    monkeypatch.setattr(lanes, "open_store", open_store)
    yield gate
    gate.opened.set()
