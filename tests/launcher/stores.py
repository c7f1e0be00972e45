"""The back ends over which the contract of a rendezvous store is tested, and what is built on it."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from elastic_moe.register import open_register
from launcher.kv import KV, Prefixed
from launcher.kv.bucket.client import REMOTE_PACE, BucketKV
from launcher.kv.bucket.register import Register
from launcher.kv.embedded.client import EmbeddedKV
from launcher.kv.embedded.server import EmbeddedServer
from launcher.kv.memory import Hub, MemoryKV
from tests.etcd import Server, connected, etcd
from tests.s3 import S3Server, moto_server, seaweedfs_gateway

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


class CountedRegister:
    """A register that counts what is asked of it; `StoreRegister`'s is the one in it."""

    def __init__(self, register: Register) -> None:
        self._register = register
        self.count = 0
        self.num_read: Counter[str] = Counter()

    @property
    def is_remote(self) -> bool:
        return self._register.is_remote

    @property
    def name_size_bytes_max(self) -> int:
        return self._register.name_size_bytes_max

    def read(self, name: str) -> bytes | None:
        self.count += 1
        self.num_read[name] += 1
        return self._register.read(name)

    def create(self, name: str, content: bytes) -> bool:
        self.count += 1
        return self._register.create(name, content)

    def write(self, name: str, content: bytes) -> None:
        self.count += 1
        self._register.write(name, content)

    def names(self, prefix: str) -> list[str]:
        self.count += 1
        return self._register.names(prefix)

    def remove(self, name: str) -> None:
        self.count += 1
        self._register.remove(name)

    def close(self) -> None: ...


@contextlib.contextmanager
def _folder(request: pytest.FixtureRequest) -> Iterator[Connect]:
    folder = request.getfixturevalue("tmp_path") / "meet"
    yield lambda: BucketKV(open_register(str(folder)))


@contextlib.contextmanager
def _bucket(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """As far away as an object store, in how it is asked."""
    url = f"memory://{uuid.uuid4().hex}"
    yield lambda: BucketKV(open_register(url), REMOTE_PACE)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One S3 server for all tests; each keeps to a prefix of its own."""
    is_moto = os.environ["KV_ON_S3"] == "moto"
    with moto_server(tmp_path_factory.mktemp("moto")) if is_moto else seaweedfs_gateway() as server:
        yield server


@contextlib.contextmanager
def _s3(request: pytest.FixtureRequest) -> Iterator[Connect]:
    server: S3Server = request.getfixturevalue("s3_server")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        url = server.url(uuid.uuid4().hex)
        yield lambda: BucketKV(open_register(url))


BACKENDS: dict[str, Callable[[pytest.FixtureRequest], AbstractContextManager[Connect]]] = {
    "memory": _memory,
    "prefixed": _prefixed,
    "embedded": _embedded,
    "etcd": _etcd,
    "folder": _folder,
    "bucket": _bucket,
}
"""A back end is put under the whole contract by one line here: a fresh, empty store, and how to connect to it."""
if "KV_ON_S3" in os.environ:  # "moto" or "seaweedfs"; that takes a minute
    BACKENDS["s3"] = _s3


@pytest.fixture(params=BACKENDS)
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of one fresh store of each back end, and closes them."""
    with BACKENDS[request.param](request) as make, contextlib.ExitStack() as clients:

        def tracked() -> KV:
            return clients.enter_context(contextlib.closing(make()))

        yield tracked
