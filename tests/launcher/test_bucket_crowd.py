"""The store on objects where many write at once: that others are first takes time, and nothing else. Damage is told."""

from __future__ import annotations

import contextlib
import time
import uuid

import pytest

from elastic_moe.register import StoreRegister
from launcher.coordination import member
from launcher.errors import KVUnavailable
from launcher.kv.bucket.client import BucketKV
from launcher.kv.lease import Lease
from storage.stores.memory import MemoryStore
from tests.launcher.members import CuttableKV, Job

_TTL_S = 3.0


def test_a_lease_counts_from_when_it_was_written_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be over when it is granted, and be given up for another one that takes as long."""
    store = MemoryStore(uuid.uuid4().hex)
    rival, register = BucketKV(StoreRegister(store)), StoreRegister(store)
    create, ends_s = register.create, time.monotonic() + 1.2 * _TTL_S

    def overtaken(name: str, content: bytes) -> bool:
        if time.monotonic() < ends_s:
            assert rival.put("k", b"rival")
        return create(name, content)

    monkeypatch.setattr(register, "create", overtaken)
    with contextlib.closing(rival), contextlib.closing(BucketKV(register)) as kv:
        lease = kv.lease(_TTL_S)
        assert kv.put("k", b"mine", lease=lease) is not None
        assert time.monotonic() > ends_s
        assert lease.deadline_s > ends_s + _TTL_S / 2
        assert not lease.lost.is_set()


def test_a_node_waits_for_its_turn_and_not_for_a_store_that_is_away(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "_START_TIMEOUT_S", 0.1)
    grant = CuttableKV.lease

    def slow(kv: CuttableKV, ttl_s: float) -> Lease:
        time.sleep(0.5)
        return grant(kv, ttl_s)

    monkeypatch.setattr(CuttableKV, "lease", slow)
    job.start("a")
    monkeypatch.setattr(CuttableKV, "cut", True)
    with pytest.raises(KVUnavailable, match="cut off"):
        job.start("b")
    monkeypatch.setattr(CuttableKV, "cut", False)


def test_what_was_damaged_on_its_way_is_read_again_and_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore(uuid.uuid4().hex)
    register = StoreRegister(store)
    with contextlib.closing(BucketKV(StoreRegister(store))) as writer, contextlib.closing(BucketKV(register)) as reader:
        entry = writer.put("k", b"value")
        whole = register.read
        damage = lambda data: data and data.replace(b'"revision":1', b'"revision":3')  # noqa: E731
        monkeypatch.setattr(register, "read", lambda name: damage(whole(name)))
        with pytest.raises(KVUnavailable, match="its checksum does not match"):
            reader.get("k")
        monkeypatch.setattr(register, "read", whole)
        assert reader.get("k") == entry
