"""Real S3 servers as places where nodes meet: some that honour conditional puts, and one that does not."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from elastic_moe.register import StoreRegister, open_register
from launcher.errors import UsageError
from launcher.kv.bucket.client import BucketKV
from storage.errors import AlreadyExists, Transient
from storage.stores.buffers import Buffer
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectInfo, exists
from tests.s3 import S3Server


def test_a_real_gateway_that_lets_two_writers_through_is_refused_in_one_line(juicefs: S3Server) -> None:
    with pytest.raises(UsageError, match="honours no conditional puts") as caught:
        open_register(juicefs.url("meet"))
    assert "\n" not in str(caught.value)


def test_one_that_honours_conditions_unless_they_race_is_refused_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SeaweedFS was before 4.17: it looks whether the object is there, takes the content, and writes it."""
    looked = threading.Barrier(4)

    class Racy(MemoryStore):
        def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
            if if_absent and exists(self, key):
                raise AlreadyExists(key)
            if ".race-" in key:
                looked.wait(30)
            return super().put(key, buffers)

    monkeypatch.setattr(StoreRegister, "is_remote", True)
    with pytest.raises(UsageError, match="lets two create one object at once"):
        StoreRegister(Racy("racy")).check()
    raced: list[str] = []

    class Sound(MemoryStore):
        def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
            raced.extend([key] * (".race-" in key))
            return super().put(key, buffers, if_absent=if_absent)

    sound = Sound("sound")
    for _ in range(2):
        register = StoreRegister(sound)
        register.check()
        assert register.names("") == ["elastic-moe"], "nothing is left of the race"
    assert len(raced) == 8, "once for a place"

    class Silent(MemoryStore):
        def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
            if ".race-" in key:
                raced.append(key)
                raise Transient("too many requests")
            return super().put(key, buffers, if_absent=if_absent)

    raced.clear()
    silent = Silent("silent")
    for _ in range(2):
        StoreRegister(silent).check()
    assert len(raced) == 16, "nothing is concluded of a race of which one has not heard the end"


SERVERS = ["moto"] + ["seaweedfs"] * (os.environ.get("KV_ON_S3") == "seaweedfs")
"""SeaweedFS waits for a second or more where several create the same object at once."""


@pytest.mark.parametrize("kind", SERVERS)
def test_nodes_meet_on_a_server_that_honours_conditions(kind: str, request: pytest.FixtureRequest) -> None:
    server: S3Server = request.getfixturevalue(kind)
    with (
        contextlib.closing(BucketKV(open_register(server.url("meet")))) as one,
        contextlib.closing(BucketKV(open_register(server.url("meet")))) as other,
    ):
        lease = one.lease(30.0)
        entry = one.put("a", b"\x00", if_revision=0, lease=lease)
        assert entry is not None
        assert other.get("a") == entry
        assert other.put("a", b"", if_revision=0) is None
        lease.revoke()
        assert other.get("a") is None


@pytest.mark.parametrize("kind", SERVERS)
def test_of_many_who_create_an_object_on_a_real_server_one_does(kind: str, request: pytest.FixtureRequest) -> None:
    server: S3Server = request.getfixturevalue(kind)
    with contextlib.closing(open_register(server.url("race"))) as register, ThreadPoolExecutor(8) as pool:
        for name in ("a", "b", "c"):
            contents = [str(i).encode() for i in range(8)]
            created = list(pool.map(functools.partial(register.create, name), contents))
            assert created.count(True) == 1
            assert register.read(name) == contents[created.index(True)]
