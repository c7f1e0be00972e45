"""`elastic-moe drain`: whom it means, and that its orders need no cleaning up."""

from __future__ import annotations

import socket

import pytest

from elastic_moe.cli.drain import choose
from elastic_moe.cli.main import main
from elastic_moe.errors import UserError
from launcher.drain.draining import DrainOrder
from launcher.job_client import JobClient
from launcher.kv import Prefixed, WatchEvent
from launcher.kv.memory import MemoryKV
from launcher.node.board import DRAIN, JOB, Board, run_prefix
from launcher.rounds.records import Node
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


def test_a_job_has_gone_with_a_store_that_its_last_node_hosted() -> None:
    gone = f"127.0.0.1:{free_port()}"
    kv = MemoryKV()
    assert JobClient(kv, "job", gone, store_outlives_nodes=False).has_gone_with_its_store()
    assert not JobClient(kv, "job", gone, store_outlives_nodes=True).has_gone_with_its_store()
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"127.0.0.1:{server.getsockname()[1]}"
        assert not JobClient(kv, "job", there, store_outlives_nodes=False).has_gone_with_its_store()
    kv.close()
