"""From options to a store: what a user may write, and what is told of a mistake."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

import launcher.kv.endpoint
from launcher.errors import UsageError
from launcher.kv.connect import connect
from launcher.kv.embedded.server import EmbeddedServer
from launcher.kv.endpoint import addresses_of, in_order, parse_endpoint
from launcher.kv.options import StoreOptions
from tests.cluster import free_port


@pytest.mark.parametrize(
    ("endpoint", "parsed"),
    [
        ("host", ("host", 29400)),
        ("host:1", ("host", 1)),
        (" 10.0.0.1:65535 ", ("10.0.0.1", 65535)),
        ("[::1]:5", ("::1", 5)),
        ("[::1]", ("::1", 29400)),
        ("job-0.job_headless.ns.svc.cluster.local:29400", ("job-0.job_headless.ns.svc.cluster.local", 29400)),
    ],
)
def test_endpoints(endpoint: str, parsed: tuple[str, int]) -> None:
    assert parse_endpoint(endpoint) == parsed


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        ("", "the host is missing"),
        (":5", "the host is missing"),
        ("host:", "'' is no port from 1 to 65535"),
        ("host:x", "'x' is no port"),
        ("host:0", "'0' is no port"),
        ("host:65536", "'65536' is no port"),
        ("host:-1", "'-1' is no port"),
        ("host:1.5", "'1.5' is no port"),
        ("host:\u00b2", "is no port"),  # a digit to Python, and no number
        ("host:\u0663", "is no port"),
        ("host:" + "9" * 5000, "is no port"),
        ("[::1]:x", "'x' is no port"),
        ("::1", "an IPv6 address goes into brackets"),
        ("fe80::1:29400", "an IPv6 address goes into brackets"),
        ("[::1:5", "an IPv6 address goes into brackets"),
        ("[host]:5", "'host' is no IPv6 address"),
        ("tcp://host:5", "leave tcp:// out"),
        ("host/x:5", "'host/x' is no host name"),
        ("me@host:5", "'me@host' is no host name"),
        ("a b:5", "'a b' is no host name"),
        ("a,b:5", "only etcd3 takes several"),
    ],
)
def test_bad_endpoints_are_told_in_one_line(endpoint: str, told: str) -> None:
    with pytest.raises(UsageError, match="--rdzv-endpoint") as error:
        parse_endpoint(endpoint)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_free_port_is_found_and_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_MOE_TOKEN", "t")
    first = connect("embedded", "localhost:0", timeout_s=60)
    try:
        (told,) = [record.getMessage() for record in caplog.records]
        assert told.startswith("the store listens at localhost:")
        second = connect("embedded", told.rpartition(" ")[2], StoreOptions(is_host=False), timeout_s=60)
        first.kv.put("a", b"1")
        assert second.kv.get("a") is not None
        second.close()
    finally:
        first.close()
    with pytest.raises(UsageError, match="'0' is no port"):
        connect("embedded", "localhost:0", StoreOptions(is_host=False), timeout_s=1)
    with pytest.raises(UsageError, match="a free port can be found on this machine only"):
        connect("embedded", "203.0.113.7:0", timeout_s=1)


def test_ipv6() -> None:
    first = connect("embedded", "[::1]:0", timeout_s=60)
    first.close()
    endpoint = f"[::1]:{free_port()}"
    first = connect("embedded", endpoint, timeout_s=60)
    try:
        second = connect("embedded", endpoint, timeout_s=60)
        assert (first.hosts_store, second.hosts_store, second.local_address) == (True, False, "::1")
        second.close()
    finally:
        first.close()


class Names:
    """A resolver: what each name is, and how often it is unknown before."""

    def __init__(self, patch: pytest.MonkeyPatch, **names: tuple[int, list[str]]) -> None:
        self.asked = 0
        self._names = {name.replace("_", "-"): told for name, told in names.items()}
        self._real = socket.getaddrinfo
        patch.setattr(socket, "getaddrinfo", self._answer)

    def _answer(self, host: str, port: int | None, *args: Any, **options: Any) -> list[Any]:
        if host not in self._names:
            return self._real(host, port, *args, **options)
        self.asked += 1
        num_unknown, addresses = self._names[host]
        if self.asked <= num_unknown:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]


def test_a_name_that_is_not_known_yet_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = Names(monkeypatch, job_0=(3, ["10.0.0.2"]))
    monkeypatch.setattr(launcher.kv.endpoint, "_RETRY_S", 0.01)
    assert addresses_of("job-0", 20) == ["10.0.0.2"]
    assert names.asked == 4
    assert len([r for r in caplog.records if "host 'job-0' is unknown" in r.getMessage()]) == 1, "told once"


def test_a_name_that_stays_unknown_is_told_after_the_time_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    Names(monkeypatch, job_0=(10**9, []))
    begun_s = time.monotonic()
    with pytest.raises(UsageError, match="host 'job-0' is unknown: Name or service not known"):
        connect("embedded", "job-0:5", timeout_s=0.2)
    assert 0.2 <= time.monotonic() - begun_s < 30
    with pytest.raises(UsageError, match="is no host name"):
        addresses_of("a..b", 20)  # nothing to wait for


def test_all_addresses_of_a_name_are_tried_and_one_is_hosted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order a resolver gives them in: to each node another one."""
    Names(monkeypatch, store=(0, ["127.0.0.3", "127.0.0.2"]))
    monkeypatch.setattr(launcher.kv.endpoint, "is_local", lambda host: True)
    port = free_port()
    first = connect("embedded", f"store:{port}", timeout_s=60)
    try:
        assert first.hosts_store
        assert first.kv.address == "127.0.0.2"  # type: ignore[attr-defined]
    finally:
        first.close()
    server = EmbeddedServer("127.0.0.3", port, token="")
    server.start()
    try:
        second = connect("embedded", f"store:{port}", StoreOptions(is_host=False), timeout_s=60)
        assert second.kv.address == "127.0.0.3"  # type: ignore[attr-defined]
        second.close()
    finally:
        server.close()


def test_addresses_are_in_the_same_order_on_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_order(["fd00::1", "10.0.0.10", "10.0.0.9", "::1"]) == ["10.0.0.9", "10.0.0.10", "::1", "fd00::1"]
    Names(monkeypatch, node_1=(0, ["127.0.1.1", "10.0.0.9"]))
    assert addresses_of("node-1") == ["10.0.0.9"], "what Debian's /etc/hosts says beside it"
    Names(monkeypatch, node_2=(0, ["127.0.1.1"]))
    with pytest.raises(UsageError, match=r"'node-2' is 127\.0\.1\.1 here"):
        addresses_of("node-2")


def test_the_first_hosts_and_the_second_connects() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    first = connect("embedded", endpoint, timeout_s=60)
    try:
        second = connect("embedded", endpoint, timeout_s=60)
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
        connect("embedded", "0.0.0.0:1", timeout_s=1)
    with pytest.raises(UsageError, match=r"token_file=.*No such file"):
        connect("embedded", "0.0.0.0:1", StoreOptions(token_file=tmp_path / "none"), timeout_s=1)


def test_a_node_that_must_host_says_why_it_cannot() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    first = connect("embedded", endpoint, timeout_s=60)
    try:
        with pytest.raises(UsageError, match="cannot be bound"):
            connect("embedded", endpoint, StoreOptions(is_host=True), timeout_s=1)
    finally:
        first.close()


def test_an_unknown_back_end_is_told() -> None:
    with pytest.raises(UsageError, match="--rdzv-backend zookeeper: unknown"):
        connect("zookeeper", "", timeout_s=1)
