"""The way into a job and out of it: whatever fails, nothing that was opened stays open."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous.api import RendezvousParameters
from torch.distributed.launcher.api import LaunchConfig

import launcher.coordination.member
from launcher import launch
from launcher.elastic import joining
from launcher.elastic.handlers import TorchrunRendezvous, create_handler
from launcher.elastic.joining import Meeting, arrive, join, plan_no_mesh
from launcher.elastic.rdzv_conf import RendezvousConf
from launcher.errors import KVUnavailable, UsageError
from launcher.health import liveness
from launcher.kv.embedded.client import EmbeddedKV
from launcher.rounds.membership import Rules
from tests.cluster import free_port, until

RULES = Rules(min_nodes=1, max_nodes=2)
Front = Callable[[str], None]


def by_torchrun(endpoint: str) -> None:
    create_handler(RendezvousParameters("embedded", endpoint, "job", 1, 2, None, timeout=900))


def by_run(endpoint: str) -> None:
    config = LaunchConfig(1, 2, 1, run_id="job", rdzv_backend="embedded", rdzv_endpoint=endpoint)
    launch._launch_agent(config, ["true"], launch.LaunchOptions(warm_workers=False))


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a store that this node hosts; afterwards nobody listens there, and no thread is left."""
    monkeypatch.setattr(liveness, "_PATIENCE_S", 0.02)
    before, port = set(threading.enumerate()), free_port()
    yield f"127.0.0.1:{port}"

    def left() -> set[str]:
        return {thread.name for thread in set(threading.enumerate()) - before}

    until("no thread is left", lambda: not left())
    socket.create_server(("127.0.0.1", port)).close()


def fail(error: BaseException) -> Callable[..., Any]:
    def failing(*args: object, **options: object) -> Any:
        raise error

    return failing


@pytest.fixture(params=["listen", "look", "lease", "signal"])
def failing_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the line about it says; that step fails."""
    monkeypatch.setattr(launcher.coordination.member, "_START_TIMEOUT_S", 0.1)
    match request.param:
        case "listen":
            monkeypatch.setattr(liveness.LivenessListener, "start", fail(OSError(99, "no such address")))
            return "--local-addr 127.0.0.1: cannot listen there: no such address"
        case "look":
            monkeypatch.setattr(joining, "reopen_failed", fail(KVUnavailable("away")))
            return "--rdzv-endpoint 127.0.0.1:"
        case "lease":
            monkeypatch.setattr(EmbeddedKV, "lease", fail(KVUnavailable("away")))
            return "--rdzv-endpoint 127.0.0.1:"
        case _:
            monkeypatch.setattr(joining, "reopen_failed", fail(KeyboardInterrupt("stopped")))
            return "stopped"


@pytest.mark.parametrize("front", [by_torchrun, by_run])
def test_whatever_fails_on_the_way_in_everything_is_closed(
    front: Front, endpoint: str, failing_step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((UsageError, SystemExit, KeyboardInterrupt)) as failed:
        front(endpoint)
    assert failing_step in f"{failed.value}\n{capsys.readouterr().err}"


def test_a_store_that_cannot_be_opened_leaves_nothing(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmbeddedKV, "wait_ready", fail(UsageError("it does not answer")))
    with pytest.raises(UsageError, match="does not answer"):
        by_run(endpoint)


def meeting(endpoint: str, backend: str = "embedded") -> Meeting:
    return Meeting(backend, endpoint, "job", RendezvousConf.parse({"zone": "z"}), local_addr=None)


def nodes(arrival: joining.Arrival) -> tuple[Any, ...]:
    return arrival.connection.kv.list("elastic-moe/job/nodes/").entries


def quiet(event: object, /, **fields: object) -> None: ...


def test_a_member_leaves_before_the_store_is_closed(endpoint: str) -> None:
    with arrive(meeting(endpoint), slots=1) as first:
        with arrive(meeting(endpoint), slots=3, name="b") as second, join(second, RULES, plan_no_mesh, quiet):
            (entry,) = nodes(first)
            assert entry.key == f"elastic-moe/job/nodes/{second.node.node_id}"
            assert (second.node.slots, second.node.zone, second.node.node_id[:2]) == (3, "z", "b-")
            assert (first.connection.hosts_store, second.connection.hosts_store) == (True, False)
        assert nodes(first) == ()


def test_a_member_whose_work_fails_leaves(endpoint: str) -> None:
    with arrive(meeting(endpoint), slots=1) as first:
        with contextlib.suppress(ZeroDivisionError), join(first, RULES, plan_no_mesh, quiet):
            assert nodes(first)
            raise ZeroDivisionError
        assert nodes(first) == ()


def test_a_node_prepares_itself_before_it_stops_a_job_at_work(endpoint: str) -> None:
    prepared: list[int] = []
    with arrive(meeting(endpoint), slots=1) as first, arrive(meeting(endpoint), slots=1) as second:
        prepare = lambda: prepared.append(len(nodes(first)))  # noqa: E731
        with join(first, RULES, plan_no_mesh, quiet, prepare=prepare) as member:
            assert prepared == [], "nobody is at work"
            until("a round", member.round)
            with join(second, RULES, plan_no_mesh, quiet, prepare=prepare):
                assert prepared == [1], "before it has joined"


def test_the_host_of_the_store_stays_until_the_others_have_gone(
    endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    with arrive(meeting(endpoint), slots=1) as host, arrive(meeting(endpoint), slots=1, name="b") as other:
        staying = threading.Thread(target=launch._linger, args=(host,))
        with join(other, RULES, plan_no_mesh, quiet) as member:
            until("a round", member.round)
            staying.start()
            until("that is told", lambda: f"staying for {other.node.node_id}" in caplog.text)
            assert staying.is_alive()
        staying.join(60)
        assert not staying.is_alive()
    launch._linger(host)  # there is no store any more to stay for


def test_torchruns_handler_leaves_once(endpoint: str) -> None:
    handler = create_handler(RendezvousParameters("embedded", endpoint, "job", 1, 2, None, timeout=900))
    assert isinstance(handler, TorchrunRendezvous)
    assert handler.shutdown()
    assert handler.shutdown()
