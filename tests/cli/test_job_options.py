"""The store options of verbs that look at a job: they find it, never host it, and mistakes are one line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from elastic_moe.cli.job_options import add_job_options, open_named_job
from elastic_moe.cli.parser import Parser
from launcher.job_client import JobClient
from launcher.kv.embedded.server import EmbeddedServer
from launcher.node.board import NODES, run_prefix
from launcher.rounds.records import Node
from tests.cluster import free_port


@pytest.fixture
def endpoint() -> Iterator[str]:
    with EmbeddedServer("127.0.0.1", 0, token="") as server:
        yield f"127.0.0.1:{server.port}"


def parse(*argv: str) -> argparse.Namespace:
    parser = Parser(prog="test")
    add_job_options(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize("option", ["--rdzv-endpoint", "--rdzv_endpoint"])
def test_a_job_is_found_and_its_nodes_are_read(endpoint: str, option: str) -> None:
    node = Node(node_id="a-1", host="a", address="127.0.0.1", port=1, slots=2)
    with open_named_job(parse(option, endpoint, "--rdzv-id", "job", "--rdzv-conf", "lease_ttl=3")) as job:
        assert job.run_id == "job"
        assert not job.nodes()
        job.kv.put(f"{run_prefix('job')}{NODES}a-1", node.to_json())
        assert job.nodes() == [node]
        assert not JobClient(job.kv, "another").nodes()


def test_torchruns_variables_are_defaults(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_RDZV_BACKEND", "c10d")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", endpoint)
    with open_named_job(parse()) as job:
        assert (job.endpoint, job.run_id) == (endpoint, "default")


def test_the_store_is_never_hosted_here() -> None:
    with pytest.raises(Exception, match="cannot be reached"), open_named_job(at(f"127.0.0.1:{free_port()}")):
        pass


def at(endpoint: str) -> argparse.Namespace:
    return parse("--rdzv-endpoint", endpoint, "--rdzv-conf", "connect_timeout=0.1")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--rdzv-endpoint: needed"),
        (["--rdzv-backend", "memory"], "inside its one agent"),
        (["--rdzv-backend", "etcd"], "did you mean etcd3"),
        (["--rdzv-backend", "etcd3", "--rdzv-endpoint", "h:1"], "--rdzv-id: needed"),
        (["--rdzv-endpoint", "h:1", "--rdzv-conf", "user"], "--rdzv-conf user: expected KEY=VALUE"),
        (["--rdzv-endpoint", "h:1", "--rdzv-conf", "usr=me"], "did you mean user"),
        (["--rdzv-endpoint", "h:x"], "expected HOST:PORT"),
    ],
)
def test_mistakes_are_told_in_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught, open_named_job(parse(*argv)):
        pass
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]
