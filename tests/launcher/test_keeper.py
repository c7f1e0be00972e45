"""A node's own record in a store that may carry out a write late, or without a word."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from launcher.coordination.keeper import RecordKeeper
from launcher.errors import KVUnavailable
from launcher.kv import Entry, Lease
from launcher.kv.memory import MemoryKV
from launcher.rounds.records import Node, Status

KEY = "nodes/a"


class LateKV(MemoryKV):
    """Whose writes may be given up, while they are still on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.holds = self.is_unheard = False
        self.late: list[Callable[[], Entry | None]] = []

    def put(
        self, key: str, value: bytes, *, if_revision: int | None = None, lease: Lease | None = None
    ) -> Entry | None:
        def write() -> Entry | None:
            return MemoryKV.put(self, key, value, if_revision=if_revision, lease=lease)

        if self.holds:
            self.late.append(write)
            raise KVUnavailable("no answer")
        written = write()
        if self.is_unheard:
            raise KVUnavailable("no answer")
        return written


class Kept:
    def __init__(self) -> None:
        self.kv = LateKV()
        node = Node(node_id="a", host="a", address="127.0.0.1", port=1, slots=1)
        lock = threading.RLock()
        changed = threading.Condition(lock)
        self.keeper = RecordKeeper(self.kv, KEY, node, lock, changed, lambda *_, **__: None, lease_ttl_s=600.0)
        self.keeper.register(first=True)

    def status(self) -> Status | None:
        entry = self.kv.get(KEY)
        return Node.from_json(entry.value, entry.create_revision).status if entry else None

    def give_up(self, action: Callable[[], Any]) -> None:
        self.kv.holds = True
        with pytest.raises(KVUnavailable):
            action()
        self.kv.holds = False


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    yield made
    made.kv.close()


def test_a_write_that_comes_late_does_not_replace_a_newer_one(kept: Kept) -> None:
    kept.keeper.change(status=Status.RUNNING)
    kept.give_up(kept.keeper._write)
    kept.keeper.change(status=Status.STOPPING)
    assert kept.keeper._write()
    kept.kv.late[0]()
    assert kept.status() is Status.STOPPING


def test_a_registration_that_comes_late_does_not_replace_a_newer_one(kept: Kept) -> None:
    kept.give_up(kept.keeper.register)
    kept.keeper.register()
    kept.keeper.change(status=Status.RUNNING)
    assert kept.keeper._write()
    kept.kv.late[0]()
    assert kept.status() is Status.RUNNING


def test_a_write_that_was_not_heard_of_is_found_and_the_next_one_follows(kept: Kept) -> None:
    kept.keeper.change(status=Status.RUNNING)
    kept.kv.is_unheard = True
    with pytest.raises(KVUnavailable):
        kept.keeper._write()
    kept.kv.is_unheard = False
    kept.keeper.change(status=Status.STOPPING)
    assert not kept.keeper._write(), "the record is not as it was"
    assert kept.keeper._write()
    assert kept.status() is Status.STOPPING


def test_a_record_that_another_node_deleted_is_not_brought_back(kept: Kept) -> None:
    kept.kv.delete(KEY)
    kept.keeper.change(status=Status.STOPPING)
    assert not kept.keeper._write()
    assert kept.keeper.fenced()
    assert kept.status() is None


def test_a_record_that_is_not_the_one_written_is_written_again(kept: Kept) -> None:
    kept.kv.put(KEY, b"of before", lease=kept.keeper.lease)
    kept.keeper._check()
    assert kept.keeper._stored is None
    assert kept.keeper._write()
    assert kept.status() is Status.READY
