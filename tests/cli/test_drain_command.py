"""`elastic-moe drain`: whom it means, and that its orders need no cleaning up."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator

import pytest

from elastic_moe.cli.drain import _wait, choose
from elastic_moe.cli.main import main
from elastic_moe.errors import UserError
from launcher.drain.draining import DrainOrder
from launcher.errors import KVUnavailable
from launcher.job_client import JobClient
from launcher.kv import Prefixed, WatchEvent
from launcher.kv.memory import MemoryKV
from launcher.node.board import DRAIN, JOB, Board, run_prefix
from launcher.reports.job_status import JobStatus, job_status
from launcher.rounds.membership import View
from launcher.rounds.records import Node, Status
from tests.cluster import free_port


def node(node_id: str, host: str) -> Node:
    return Node(node_id=node_id, host=host, address="127.0.0.1", port=1, slots=1)


NODES = [node("gpu-1-aaaa", "h1"), node("gpu-2-bbbb", "h2"), node("x-cccc", "h3"), node("x-dddd", "h3")]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["gpu-1-aaaa"], ["gpu-1-aaaa"]),
        (["gpu-2"], ["gpu-2-bbbb"]),
        (["h1", "gpu-1", "x-dddd"], ["gpu-1-aaaa", "x-dddd"]),
    ],
)
def test_nodes_are_known_by_id_name_and_host(names: list[str], chosen: list[str]) -> None:
    assert choose(NODES, names) == chosen


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x", "2 are called so: x-cccc, x-dddd"),
        ("h3", "2 are called so"),
        ("gpu", "not in this job; there are gpu-1-aaaa"),
    ],
)
def test_who_is_not_meant_is_told(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(NODES, [name])


@pytest.mark.parametrize("argv", [["drain"], ["drain", "a", "--all"]])
def test_nodes_or_all(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "name the nodes, or give --all" in capsys.readouterr().err


def test_an_order_is_seen_by_those_that_follow_the_job_and_goes_with_its_lease() -> None:
    kv = MemoryKV()
    order = DrainOrder(("a-1",), "me@here", 5.0)
    JobClient(kv, "job").drain(order)
    (entry,) = Prefixed(kv, run_prefix("job")).list(JOB).entries
    assert entry.key.startswith(DRAIN)
    board = Board()
    board.apply([WatchEvent(entry.key, entry, 1)])
    assert list(board.drain_orders.values()) == [order]
    board.apply([WatchEvent(entry.key, None, 2)])
    assert not board.drain_orders
    kv.close()


class Followed:
    """A job that tells what it is told to, and may not be asked in between."""

    def __init__(self, *told: tuple[list[Node], str], gone: bool = False) -> None:
        self._told = told
        self._gone = gone

    def follow(self) -> Iterator[tuple[JobStatus, str]]:
        for nodes, trouble in self._told:
            yield job_status("job", View(tuple(nodes), None, 0.0, 0.0, 0.0, "")), trouble
        raise KVUnavailable("refused")

    def has_gone_with_its_store(self) -> bool:
        return self._gone


RUNS, STOPS = (dataclasses.replace(NODES[0], status=status) for status in (Status.RUNNING, Status.STOPPING))


@pytest.mark.parametrize("gone", [False, True])
def test_a_drain_follows_its_nodes(gone: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """What they do is told once; a store that is away tells nothing; one that has gone with its last node, the end."""
    end: tuple[list[Node], str] = ([RUNS], "refused") if gone else ([NODES[1]], "")
    away = [] if gone else [([RUNS], "away")]
    job = Followed(([RUNS], ""), ([RUNS], ""), ([STOPS], ""), *away, end, gone=gone)
    assert _wait(job, ["gpu-1-aaaa"], 60.0) == 0  # type: ignore[arg-type]
    states = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()]
    assert states == ["running", "stopping", "left"]


def test_a_store_that_has_gone_at_once_with_all_its_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert _wait(Followed(gone=True), ["gpu-1-aaaa"], 60.0) == 0  # type: ignore[arg-type]
    assert "gpu-1-aaaa: left" in capsys.readouterr().out
    with pytest.raises(KVUnavailable):
        _wait(Followed(), ["gpu-1-aaaa"], 60.0)  # type: ignore[arg-type]


def test_a_drain_that_takes_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    assert _wait(Followed(([RUNS], "")), ["gpu-1-aaaa"], 0.0) == 1  # type: ignore[arg-type]
    assert capsys.readouterr().err == "not gone within 0 s: gpu-1-aaaa\n"


def test_a_job_has_gone_with_a_store_that_its_last_node_hosted() -> None:
    gone = f"127.0.0.1:{free_port()}"
    kv = MemoryKV()
    assert JobClient(kv, "job", gone, store_outlives_nodes=False).has_gone_with_its_store()
    assert not JobClient(kv, "job", gone, store_outlives_nodes=True).has_gone_with_its_store()
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"127.0.0.1:{server.getsockname()[1]}"
        assert not JobClient(kv, "job", there, store_outlives_nodes=False).has_gone_with_its_store()
    kv.close()
