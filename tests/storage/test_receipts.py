"""How the ranks of a save meet in the store: receipts that are read, and what those read that wait for the commit."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import Fenced, Transient
from storage.format.manifest import HEAD_SIZE_BYTES, Head, Receipt, dump_manifest, load_head
from storage.run import owner
from storage.run.attempt import Attempt
from storage.saving import commit, receipts
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectInfo
from tests.storage.commit_cases import (
    ATTEMPT,
    FOLDER,
    MANIFEST,
    METADATA,
    SIZE_BYTES,
    Scripted,
    built,
    claimed,
    owner_of,
    ready,
)

T = TypeVar("T")


class Never:
    """A look that finds nothing is the last."""

    def until(self, what: Callable[[], str], look: Callable[[], T | None]) -> T:
        found = look()
        if found is None:
            raise Transient(f"no {what()}")
        return found


# the receipts ---------------------------------------------------------------------------------------------------


class Meeting(MemoryStore):
    """Reads of receipts are answered when as many have come as `sizes` says, of one time after the other."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__("x")
        self._barriers = [met for size in sizes for met in [threading.Barrier(size, timeout=60)] * size]
        self._lock = threading.Lock()

    def read(self, key: str) -> bytes:
        if "receipt-" in key:
            with self._lock:
                barrier = self._barriers.pop(0)
            barrier.wait()
        return super().read(key)


def test_the_receipts_of_many_ranks_are_read_at_once() -> None:
    store, attempt = Meeting([16, 16, 8]), Attempt.of_step(10, ATTEMPT.id, 40)
    claim = claimed(store)
    for rank in range(40):
        receipts.put_receipt(store, attempt, Receipt(rank=rank, attempt=attempt.id))
    found = receipts.await_receipts(store, attempt, Never(), claim)  # type: ignore[arg-type]
    assert [receipt.rank for receipt in found] == [*range(40)]


@given(st.lists(st.integers(0, 3 << 20), max_size=60))
def test_batches_are_all_of_it_and_bounded(sizes_bytes: list[int]) -> None:
    infos = [ObjectInfo(str(number), size, "") for number, size in enumerate(sizes_bytes)]
    found = receipts.batches(infos)
    assert [info for batch in found for info in batch] == infos
    limits = [(len(batch), sum(info.size_bytes for info in batch)) for batch in found]
    assert all(1 <= number <= 16 and size <= 8 << 20 for number, size in limits)
    followed = zip(limits, found[1:], strict=False)
    assert all(number == 16 or size + batch[0].size_bytes > 8 << 20 for (number, size), batch in followed)
    assert receipts.batches([ObjectInfo("a", 1 << 30, "")]) == [[ObjectInfo("a", 1 << 30, "")]]


def test_a_receipt_that_a_newer_owner_has_removed_tells_that_there_is_one() -> None:
    store = Scripted()
    claim = claimed(store)
    receipts.put_receipt(store, ATTEMPT, Receipt(rank=0, attempt=ATTEMPT.id))
    key = FOLDER + "receipt-000000.json"

    def remove() -> None:
        owner.claim(store, owner_of(1))
        store.delete(key)

    store.before[f"read {key}"] = remove
    with pytest.raises(Fenced):
        receipts.await_receipts(store, ATTEMPT, Never(), claim)  # type: ignore[arg-type]


# the ranks that wait --------------------------------------------------------------------------------------------


class Counting(MemoryStore):
    """Counts what is read of each object."""

    def __init__(self) -> None:
        super().__init__("x")
        self.read_bytes: dict[str, int] = {}

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        self._count(key, sum(buffer.nbytes for buffer in buffers))
        return super().read_into(key, offset, buffers, if_match=if_match)

    def read(self, key: str) -> bytes:
        data = super().read(key)
        self._count(key, len(data))
        return data

    def _count(self, key: str, num_bytes: int) -> None:
        self.read_bytes[key] = self.read_bytes.get(key, 0) + num_bytes


def committed_bytes(store: Counting) -> dict[str, int] | None:
    """What a rank reads to find its attempt committed; None if it does not."""
    store.read_bytes.clear()
    try:
        receipts.await_outcome(store, ATTEMPT, Never())  # type: ignore[arg-type]
    except Transient:
        return None
    return store.read_bytes


def test_a_waiting_rank_reads_the_head_of_a_long_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts, "_PART_SIZE_BYTES", 1000)
    store, (manifest, metadata) = Counting(), built(num_items=SIZE_BYTES // 2)
    claim = ready(store)
    assert len(dump_manifest(manifest)) > 2 * HEAD_SIZE_BYTES
    assert committed_bytes(store) is None
    commit.publish(store, ATTEMPT, manifest, metadata, claim)
    assert committed_bytes(store) == {MANIFEST: HEAD_SIZE_BYTES, METADATA: len(metadata)}
    for other in (metadata[:-1], metadata[:-1] + b"x", metadata + b"x", b""):
        store.put(METADATA, [other])
        assert committed_bytes(store) is None
        assert (METADATA in store.read_bytes) == (len(other) == len(metadata))


def test_a_head_that_is_too_long_is_read_whole() -> None:
    mesh = {"objects": ["x" * HEAD_SIZE_BYTES]}
    store, (manifest, metadata) = Counting(), built(mesh)
    commit.publish(store, ATTEMPT, manifest, metadata, ready(store))
    read_bytes = committed_bytes(store)
    assert read_bytes is not None and read_bytes[MANIFEST] == HEAD_SIZE_BYTES + len(dump_manifest(manifest))


def test_a_head_is_right_or_not_there_wherever_it_is_cut() -> None:
    mesh = {"objects": [{"objects": 1}], 'a"': {"metadata_crc32c": 1, "metadata_size_bytes": 1}, "é": ",}"}
    manifest, _ = built(mesh)
    data, whole = dump_manifest(manifest), Head.of(manifest)
    found = [load_head(data[:size]) for size in range(len(data) + 1)]
    first = next(size for size, head in enumerate(found) if head is not None)
    assert data[:first].endswith(b',"objects":[')
    assert set(found[first:]) == {whole}
    assert load_head(data.replace(b'"version":2', b'"version":4')) is None
    for garbage in (b"", b"[1]", b"7", b'{"manifest":"objects"}', b'{"manifest":["objects"]}', os.urandom(64)):
        assert load_head(garbage) is None
