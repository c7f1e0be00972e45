"""The back ends over which the contract of a rendezvous store is tested, and what is built on it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from launcher.kv import KV, Prefixed
from launcher.kv.embedded.client import EmbeddedKV
from launcher.kv.embedded.server import EmbeddedServer
from launcher.kv.memory import Hub, MemoryKV
from tests.etcd import Server, connected, etcd

Connect = Callable[[], KV]
"""Makes one more client of a store."""


@pytest.fixture(scope="session")
def etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One etcd for all tests; each keeps to a prefix of its own."""
    with etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@contextlib.contextmanager
def _memory(request: pytest.FixtureRequest) -> Iterator[Connect]:
    hub = Hub()
    yield lambda: MemoryKV(hub)
    hub.close()


@contextlib.contextmanager
def _prefixed(request: pytest.FixtureRequest) -> Iterator[Connect]:
    with contextlib.closing(MemoryKV()) as kv:
        kv.put("ab", b"beside the view")
        kv.put("a/b/", b"where the view begins")
        kv.delete("a/b/")
        yield lambda: Prefixed(Prefixed(kv, "a/"), "b/")


@contextlib.contextmanager
def _embedded(request: pytest.FixtureRequest) -> Iterator[Connect]:
    with EmbeddedServer("127.0.0.1", 0, token="t") as server:
        yield lambda: EmbeddedKV("127.0.0.1", server.port, token="t")


@contextlib.contextmanager
def _etcd(request: pytest.FixtureRequest) -> Iterator[Connect]:
    server = request.getfixturevalue("etcd_server")
    prefix = f"{uuid.uuid4().hex}/"
    with contextlib.ExitStack() as clients:
        yield lambda: Prefixed(clients.enter_context(connected(server.endpoint)), prefix)


BACKENDS: dict[str, Callable[[pytest.FixtureRequest], AbstractContextManager[Connect]]] = {
    "memory": _memory,
    "prefixed": _prefixed,
    "embedded": _embedded,
    "etcd": _etcd,
}
"""A back end is put under the whole contract by one line here: a fresh, empty store, and how to connect to it."""


@pytest.fixture(params=BACKENDS)
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of one fresh store of each back end, and closes them."""
    with BACKENDS[request.param](request) as make, contextlib.ExitStack() as clients:

        def tracked() -> KV:
            return clients.enter_context(contextlib.closing(make()))

        yield tracked
