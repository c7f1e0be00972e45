"""From options to a store: what a user may write, and what is told of a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.elastic.conf import RendezvousConf
from launcher.errors import UsageError
from launcher.kv.connect import connect, parse_endpoint
from tests.cluster import free_port


@pytest.mark.parametrize(
    ("endpoint", "parsed"),
    [
        ("host", ("host", 29400)),
        ("host:1", ("host", 1)),
        (" 10.0.0.1:65535 ", ("10.0.0.1", 65535)),
        ("[::1]:5", ("::1", 5)),
        ("[::1]", ("::1", 29400)),
    ],
)
def test_endpoints(endpoint: str, parsed: tuple[str, int]) -> None:
    assert parse_endpoint(endpoint) == parsed


@pytest.mark.parametrize("endpoint", ["", ":5", "host:", "host:x", "host:0", "host:65536"])
def test_bad_endpoints_are_told(endpoint: str) -> None:
    with pytest.raises(UsageError, match="--rdzv-endpoint"):
        parse_endpoint(endpoint)


def test_the_first_hosts_and_the_second_connects() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    first = connect("embedded", endpoint, {}, local_addr=None, timeout_s=5)
    try:
        second = connect("embedded", endpoint, {}, local_addr=None, timeout_s=5)
        assert (first.hosts_store, second.hosts_store) == (True, False)
        assert second.local_address == "127.0.0.1"
        first.kv.put("a", b"1")
        assert second.kv.get("a") is not None
        second.close()
    finally:
        first.close()


def test_beyond_loopback_a_token_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ELASTIC_MOE_TOKEN", raising=False)
    with pytest.raises(UsageError, match="ELASTIC_MOE_TOKEN"):
        connect("embedded", "0.0.0.0:1", {}, local_addr=None, timeout_s=1)
    with pytest.raises(UsageError, match=r"token_file=.*No such file"):
        connect("embedded", "0.0.0.0:1", {"token_file": str(tmp_path / "none")}, local_addr=None, timeout_s=1)


def test_a_node_that_must_host_says_why_it_cannot() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    first = connect("embedded", endpoint, {}, local_addr=None, timeout_s=5)
    try:
        with pytest.raises(UsageError, match="cannot be bound"):
            connect("embedded", endpoint, {"is_host": "true"}, local_addr=None, timeout_s=1)
    finally:
        first.close()


def test_an_unknown_back_end_is_told() -> None:
    with pytest.raises(UsageError, match="--rdzv-backend zookeeper: unknown"):
        connect("zookeeper", "", {}, local_addr=None, timeout_s=1)


class TestConf:
    def test_strings_as_torchrun_hands_them_over(self) -> None:
        conf = RendezvousConf.parse({"lease_ttl": "3", "last_call_timeout": "1.5", "timeout": 900})
        assert (conf.lease_ttl, conf.last_call) == (3.0, 1.5)
        assert RendezvousConf.parse({"last_call": "4"}).last_call == 4.0

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ({"lease_tl": "3"}, "--rdzv-conf lease_tl: no such key; did you mean lease_ttl?"),
            ({"qqq": "3"}, "--rdzv-conf qqq: no such key; known are lease_ttl, "),
            ({"lease_ttl": "0"}, "--rdzv-conf lease_ttl=0: input should be greater than or equal to 1"),
            ({"lease_ttl": "soon"}, "--rdzv-conf lease_ttl=soon: input should be a valid number"),
        ],
    )
    def test_mistakes(self, given: dict[str, str], told: str) -> None:
        with pytest.raises(UsageError) as error:
            RendezvousConf.parse(given)
        assert str(error.value).startswith(told)
