"""A store that fails in the middle of a save: reported, not fatal, and never told wrongly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from storage import Checkpointer, register_scheme
from storage.errors import Transient
from storage.format.manifest import Receipt
from storage.run import owner
from storage.saving import commit, receipts
from storage.stores.buffers import Buffer
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectInfo
from tests.storage.small_runs import Events


def make_state(number: int) -> dict[str, Any]:
    return {"w": torch.full((300, 70), float(number)), "n": number}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return torch.equal(left["w"], right["w"]) and bool(left["n"] == right["n"])


def names(events: Events) -> list[str]:
    return [name for name, _ in events[0]]


class Failing(MemoryStore):
    """Fails where a test tells it to."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.fails: Callable[[str, str], bool] = lambda operation, key: False

    def put(self, key: str, buffers: Any, *, if_absent: bool = False) -> ObjectInfo:
        if self.fails("put", key):
            raise Transient(f"cannot put {key}")
        if self.fails("tear", key):
            cut: list[Buffer] = [b"".join(buffers)[:-1]]
            super().put(key, cut, if_absent=if_absent)
            return ObjectInfo(key, sum(memoryview(buffer).nbytes for buffer in buffers), "etag")
        info = super().put(key, buffers, if_absent=if_absent)
        if self.fails("answer", key):
            raise Transient(f"no answer to the put of {key}")
        return info

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        if self.fails("list", prefix):
            raise Transient(f"cannot list {prefix}")
        return super().list(prefix)

    def read(self, key: str) -> bytes:
        if self.fails("read", key):
            raise Transient(f"cannot read {key}")
        return super().read(key)

    def delete(self, key: str) -> None:
        if self.fails("delete", key):
            raise Transient(f"cannot delete {key}")
        super().delete(key)


@pytest.fixture
def failing(memory_url: str) -> tuple[str, Failing]:
    store = Failing(memory_url)
    scheme = memory_url.removeprefix("memory://")
    register_scheme(scheme, lambda rest: store)
    return f"{scheme}://run", store


@pytest.mark.parametrize("where", [".distcp", "receipt-", "manifest.json", ".metadata"])
@pytest.mark.parametrize("how", ["put", "tear"])
def test_a_failed_save_is_reported_and_not_fatal(
    failing: tuple[str, Failing], events: Events, where: str, how: str
) -> None:
    url, store = failing
    with Checkpointer(url, on_event=events[1], timeout_s=0.5) as ckpt:
        ckpt.save(10, make_state(10), wait=True)
        store.fails = lambda operation, key: operation == how and where in key
        ckpt.save(20, make_state(20), wait=True)
        assert not ckpt.wait()
        store.fails = lambda operation, key: False
        state = make_state(0)
        assert ckpt.restore(state) == 10
        assert same(state, make_state(10))
        ckpt.save(20, make_state(22), wait=True)
        assert ckpt.wait()
        assert ckpt.restore(state) == 20
        assert same(state, make_state(22))
    failed = [fields for name, fields in events[0] if name == "checkpoint_failed"]
    assert len(failed) == 1
    assert failed[0]["step"] == 20
    assert failed[0]["reason"]


def test_an_abort_that_cannot_be_told_does_not_hide_the_cause(
    failing: tuple[str, Failing], events: Events, caplog: pytest.LogCaptureFixture
) -> None:
    url, store = failing
    store.fails = lambda operation, key: operation == "put" and key.endswith(("aborted.json", "manifest.json"))
    with Checkpointer(url, on_event=events[1]) as ckpt:
        ckpt.save(10, make_state(10), wait=True)
        assert not ckpt.wait()
    assert "manifest.json" in dict(events[0])["checkpoint_failed"]["reason"]
    assert "cannot be told that step 10 has failed: cannot put" in caplog.text


@pytest.mark.parametrize("operation", ["read", "answer"])
def test_a_commit_that_stands_is_no_failure(failing: tuple[str, Failing], events: Events, operation: str) -> None:
    """The store falters right after `.metadata` is there."""
    url, store = failing
    left = [2 if operation == "read" else 1]

    def fails(called: str, key: str) -> bool:
        if called != operation or not key.endswith(".metadata") or not left[0]:
            return False
        left[0] -= 1
        return True

    store.fails = fails
    with Checkpointer(url, on_event=events[1]) as ckpt:
        ckpt.save(10, make_state(10), wait=True)
        assert ckpt.wait()
    assert left == [0]
    assert names(events) == ["checkpoint_staged", "checkpoint_committed"]


def test_a_commit_that_cannot_be_confirmed_is_not_announced_as_aborted(
    failing: tuple[str, Failing], events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, store = failing
    monkeypatch.setattr(commit, "_NUM_TRIES", 2)
    store.fails = lambda operation, key: operation == "read" and key.endswith(".metadata")
    with Checkpointer(url, on_event=events[1]) as ckpt:
        ckpt.save(10, make_state(10), wait=True)
        assert not ckpt.wait()
        assert "could not be read: cannot read" in dict(events[0])["checkpoint_failed"]["reason"]
        assert not [info.key for info in store.list("") if info.key.endswith("aborted.json")]
        store.fails = lambda operation, key: False
        assert ckpt.restore(make_state(0)) == 10


def test_failed_clean_up_is_reported(failing: tuple[str, Failing], events: Events) -> None:
    url, store = failing
    store.fails = lambda operation, key: operation == "delete"
    with Checkpointer(url, keep=1, on_event=events[1]) as ckpt:
        for step in (1, 2):
            ckpt.save(step, make_state(step), wait=True)
            assert ckpt.wait()
    assert names(events)[-1] == "checkpoint_cleanup_failed"


@pytest.mark.parametrize("operation", ["list", "read"])
def test_a_poll_outlasts_an_outage(failing: tuple[str, Failing], operation: str) -> None:
    """The coordinator waits for a receipt that comes late, and the store is away meanwhile."""
    _, store = failing
    attempt = commit.Attempt.of_step(10, "a" * 8, 2)
    claim = owner.Claim(store, owner.claim(store, owner.Owner(lineage="", generation=0, epoch=0, token="token"))[0])
    left = [3]

    def fails(called: str, key: str) -> bool:
        if called != operation or left[0] == 0:
            return False
        left[0] -= 1
        if left[0] == 0:
            receipts.put_receipt(store, attempt, Receipt(rank=1, attempt=attempt.id))
        return True

    receipts.put_receipt(store, attempt, Receipt(rank=0, attempt=attempt.id))
    store.fails = fails
    patience = receipts.Patience(time.monotonic() + 60, threading.Event())
    assert [receipt.rank for receipt in receipts.await_receipts(store, attempt, patience, claim)] == [0, 1]
    store.fails = lambda called, key: called == operation
    hurry = receipts.Patience(time.monotonic() + 0.1, threading.Event())
    with pytest.raises(Transient, match="gave up waiting for the receipts of ranks 0, 1; the store: cannot"):
        receipts.await_receipts(store, attempt, hurry, claim)
