"""One bit that flips on its way is no damage, whoever reads and whatever it is of; what stays damaged is named."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from storage import Checkpointer, ShardReader, inspection, open_store
from storage.errors import Corrupt, Disputed
from storage.format import dcp_metadata, layout
from storage.format.manifest import Aborted, dump_aborted, load_aborted
from storage.run import catalog, quarantine
from storage.stores.memory import MemoryStore
from storage.transfer import copy_jobs
from storage.transfer.copying import Copier
from storage.verified.twice import read_agreed, read_document, read_verified
from tests.storage.small_runs import opened, save, state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

PREFIX = "step-000000007/"
KINDS = ["ours", "stock", "streamed", "long"]


class Flipping(MemoryStore):
    """Flips a bit of one answer, the one of number `flip_at`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.watch(None)

    def watch(self, flip_at: int | None) -> None:
        """Count answers from here on."""
        self.flip_at, self.num_answers = flip_at, 0

    def read(self, key: str) -> bytes:
        data = bytearray(super().read(key))
        self._maybe_flip([memoryview(data)])
        return bytes(data)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        etag = super().read_into(key, offset, buffers, if_match=if_match)
        self._maybe_flip(buffers)
        return etag

    def _maybe_flip(self, buffers: Sequence[memoryview]) -> None:
        number, self.num_answers = self.num_answers, self.num_answers + 1
        if number == self.flip_at:
            place = max(buffers, key=len)
            place[len(place) // 2] ^= 1 << number % 8


def contents_of(kind: str) -> dict[str, Any]:
    """A tensor of several blocks, and a value."""
    tensor = torch.arange(60_000, dtype=torch.int32)
    return {"w": torch.stack((tensor, tensor), 1)[:, 0] if kind == "long" else tensor, "n": [1, "two"]}


@pytest.fixture
def store(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flipping:
    """A checkpoint of that kind: of ours; of stock DCP's short items; of long ones in parts; of one that only its own
    pickle can make a tensor of."""
    store = Flipping("flipping")
    if kind == "ours":
        with Checkpointer(opened(store)) as ckpt:
            ckpt.save(7, contents_of(kind), wait=True)
    else:
        dcp.save(contents_of(kind), checkpoint_id=tmp_path / PREFIX, no_dist=True)
        for path in tmp_path.glob("*/*"):
            store.put(f"{PREFIX}{path.name}", [path.read_bytes()])
    if kind in ("streamed", "long"):
        monkeypatch.setattr(dcp_metadata, "LONG_ITEM_BYTES", 64 << 10)
        monkeypatch.setattr(dcp_metadata, "PART_SIZE_BYTES", 32 << 10)
    return store


def damage(store: MemoryStore) -> str:
    """Flip a bit of the tensor, in the store; the key of its object."""
    info = max(store.list(PREFIX), key=lambda info: info.size_bytes)
    data = bytearray(store.read(info.key))
    data[len(data) // 2] ^= 4
    store.put(info.key, [data])
    return info.key


def each_answer(store: Flipping, call: Any) -> Any:
    """What the call returns for each answer with a bit flipped."""
    store.watch(None)
    call()
    num_answers = store.num_answers
    assert num_answers > 1
    for number in range(num_answers):
        store.watch(number)
        yield call()
        assert store.num_answers > number


@pytest.mark.parametrize("kind", KINDS)
def test_verify_finds_one_flipped_answer_clean(store: Flipping) -> None:
    for found in each_answer(store, lambda: inspection.verify(store, PREFIX)):
        assert found.problems == ()


@pytest.mark.parametrize("kind", KINDS)
def test_verify_names_damage_that_stays(store: Flipping) -> None:
    key = damage(store)
    (problem,) = inspection.verify(store, PREFIX).problems
    assert problem.startswith(f"{key} ")
    assert "checksum" in problem
    assert inspection.verify(store, PREFIX, only=()).problems == ()


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_reads_past_one_flipped_answer(kind: str, store: Flipping) -> None:
    url, whole = f"{opened(store)}/{PREFIX}", contents_of(kind)

    def load() -> dict[str, Any]:
        found = {"w": torch.zeros_like(whole["w"]), "n": None}
        dcp.load(found, storage_reader=ShardReader(url), no_dist=True)
        return found

    for found in each_answer(store, load):
        assert torch.equal(found["w"], whole["w"])
        assert found["n"] == whole["n"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_refuses_damage_that_stays(kind: str, store: Flipping) -> None:
    key = damage(store)
    found = {"w": torch.zeros_like(contents_of(kind)["w"])}
    with pytest.raises(dcp.CheckpointException, match=rf"{key}.* is damaged: checksum"):
        dcp.load(found, storage_reader=ShardReader(f"{opened(store)}/{PREFIX}"), no_dist=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_sends_what_is_whole_past_one_flipped_answer(kind: str, store: Flipping) -> None:
    source = inspection.locate(opened(store))

    def copy() -> tuple[str, MemoryStore]:
        target = MemoryStore("target")
        (job,) = copy_jobs.plan(source, inspection.Location(target, None))
        found = copy_jobs.look(store, target, job)
        assert isinstance(found, copy_jobs.Found)
        return Copier(store, target, 0.0).copy(found).state, target

    for outcome, target in each_answer(store, copy):
        assert outcome == "copied"
        assert inspection.verify(target, PREFIX).problems == ()
    damage(store)
    # of stock DCP's nobody can tell that it is not what a planner has stored
    assert copy()[0] == ("damaged" if kind == "ours" else "copied")


@pytest.mark.parametrize("kind", KINDS)
def test_details_are_told_past_one_flipped_answer(store: Flipping) -> None:
    for found in each_answer(store, lambda: inspection.details(store, PREFIX)):
        assert [tensor.key for tensor in found.tensors] == ["w"]


def test_the_judge_sets_nothing_aside_for_a_flipped_answer(memory_url: str) -> None:
    """Two flips make a load take the checkpoint for damaged, and a third one meets the judge."""

    class Flips(Flipping):
        num_bad = 0

        def read_into(self, key: str, *args: Any, **kwargs: Any) -> str:
            is_bad = key.endswith(".distcp") and self.num_bad > 0
            self.num_bad -= is_bad
            self.watch(0 if is_bad else None)
            return super().read_into(key, *args, **kwargs)

    store = Flips(memory_url)
    url = opened(store)
    save(url, 7)
    store.num_bad = 3
    with Checkpointer(url) as ckpt, pytest.raises(Disputed, match="step 7 reads as damaged"):
        ckpt.restore(state(0))
    assert inspection.verify(store, PREFIX).problems == ()
    assert [row.state for row in inspection.summaries(inspection.Location(store, None))] == ["committed"]


def test_what_is_set_aside_or_withdrawn_is_so_past_one_flipped_answer() -> None:
    def aside(flip_at: int) -> None:
        store = Flipping("aside")
        store.put(f"{PREFIX}.metadata", [b"what commits it"])
        judged = store.info(f"{PREFIX}.metadata")
        store.watch(flip_at)
        quarantine.set_aside(store, judged)
        store.watch(None)
        assert store.read(f"{PREFIX}{layout.quarantined_name(b'what commits it')}") == b"what commits it"
        store.put(f"{PREFIX}.metadata", [b"what commits it"])
        store.watch(flip_at)
        assert quarantine.find_aside(store, PREFIX) is not None
        store.delete(f"{PREFIX}{layout.quarantined_name(b'what commits it')}")
        store.watch(flip_at)
        quarantine.withdraw(store, PREFIX, b"what commits it")
        store.watch(None)
        assert not catalog.is_checkpoint(store, PREFIX)

    for flip_at in range(3):
        aside(flip_at)


def test_a_sealed_document_is_read_past_one_flipped_answer() -> None:
    store = Flipping("sealed")
    store.put("note", [dump_aborted(Aborted(attempt="a" * 8, reason="why not"))])
    read = functools.partial(read_document, store, "note", functools.partial(load_aborted, name="note"))
    store.watch(0)
    assert read().reason == "why not"
    assert store.retries.snapshot().num_by_cause == {"damaged": 1}
    store.put("note", [b"{}"])
    with pytest.raises(Corrupt, match="note is damaged"):
        read()


def test_the_second_read_may_go_another_way(caplog: pytest.LogCaptureFixture) -> None:
    store = open_store("memory://ways")

    def first() -> int:
        raise Corrupt("the first way")

    assert read_verified(store, "it", first, lambda: 2) == 2
    assert "read again, it is whole; the first time: the first way" in caplog.text
    with pytest.raises(Corrupt, match="the first way"):
        read_verified(store, "it", first)


@pytest.mark.parametrize(("answers", "agreed"), [("aa", "a"), ("aba", "a"), ("baa", "a"), ("aab", "a"), ("abc", None)])
def test_two_of_three_answers_must_agree(monkeypatch: pytest.MonkeyPatch, answers: str, agreed: str | None) -> None:
    store, left = open_store("memory://agreed"), iter(answers)
    monkeypatch.setattr(type(store), "read", lambda *_: next(left).encode())
    if agreed is None:
        with pytest.raises(Corrupt, match="read differently each time"):
            read_agreed(store, "it")
    else:
        assert read_agreed(store, "it") == agreed.encode()
