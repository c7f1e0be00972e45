"""The store on objects where many write at once: that others are first takes time, and nothing else."""

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

_TTL_S = 1.0


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
        assert time.monotonic() > ends_s
        assert lease.deadline_s - time.monotonic() > _TTL_S / 2
        assert kv.put("k", b"mine", lease=lease) is not None


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
