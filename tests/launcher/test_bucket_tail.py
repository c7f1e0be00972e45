"""The store on objects when a request takes long, or cannot be answered: what else goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import uuid

import pytest

from elastic_moe.register import StoreRegister
from launcher.errors import KVUnavailable
from launcher.kv.bucket.beat import BEAT, beat_name
from launcher.kv.bucket.client import LOCAL_PACE, REMOTE_PACE, BucketKV
from launcher.kv.bucket.hedge import hedged
from storage.stores.memory import MemoryStore
from tests.cluster import until

_STUCK_S = 60.0


class FarRegister(StoreRegister):
    """A store far away: every other renewal hangs, and one object cannot be read."""

    is_stuck = False

    def __init__(self) -> None:
        super().__init__(MemoryStore(uuid.uuid4().hex))
        self.written: list[float] = []
        self.released = threading.Event()
        self.unreadable = ""

    @property
    def is_remote(self) -> bool:
        return True

    def write(self, name: str, content: bytes) -> None:
        if name.startswith(BEAT):
            self.written.append(time.monotonic())
            if len(self.written) % 2 and self.is_stuck:
                self.released.wait(_STUCK_S)
        super().write(name, content)

    def read(self, name: str) -> bytes | None:
        if name == self.unreadable:
            raise KVUnavailable(f"{name}: forbidden")
        return super().read(name)


def test_a_renewal_that_hangs_is_made_once_more_beside_itself() -> None:
    """Each first try takes longer than the lease, which is not lost."""
    register = FarRegister()
    register.is_stuck = True
    with contextlib.closing(BucketKV(register, REMOTE_PACE)) as kv:
        lease = kv.lease(5.0)
        ends_s = lease.deadline_s + 5.0
        while lease.deadline_s < ends_s:
            assert not lease.lost.wait(0.05)
        assert len(register.written) >= 2
        register.released.set()


def test_a_lease_that_cannot_be_looked_at_keeps_no_other_from_ending() -> None:
    register = FarRegister()
    pace = dataclasses.replace(LOCAL_PACE, slow_s=0.05)
    with contextlib.closing(BucketKV(register, pace)) as holder, contextlib.closing(BucketKV(register, pace)) as judge:
        first, second = holder.lease(2.0), holder.lease(2.0)
        assert holder.put("l", b"v", lease=first) is not None
        assert holder.put("k", b"v", lease=second) is not None
        register.unreadable = beat_name(first.lease_id)
        watch = judge.watch("", 1)
        first.stop()
        second.stop()
        with contextlib.suppress(KVUnavailable):
            watch.next(0.1)
        until("the lease that can be looked at has ended", lambda: judge.get("k") is None)
        assert first.lease_id in judge._journal.state.leases()


@pytest.mark.parametrize("results", [("ok",), ("slow", "ok"), ("fail", "ok"), ("slow", "fail")])
def test_the_first_success_counts(results: tuple[str, ...]) -> None:
    calls: list[str] = []
    lock = threading.Lock()
    second_is_begun = threading.Event()

    def act() -> None:
        with lock:
            result = results[len(calls)]
            calls.append(result)
        if len(calls) == 2:
            second_is_begun.set()
        if result == "slow":
            assert second_is_begun.wait(_STUCK_S)
        if result == "fail":
            raise KVUnavailable("no")

    hedged(act, 0.05)  # where the second fails, the slow one succeeds after all
    assert tuple(calls) == results


def test_two_failures_are_one() -> None:
    def act() -> None:
        raise KVUnavailable("no")

    with pytest.raises(KVUnavailable, match="no"):
        hedged(act, 0.05)
