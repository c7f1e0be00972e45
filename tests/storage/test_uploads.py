"""A rank's part of a save, carried out again from any point at which it may have been broken off."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from storage.errors import Fenced, Transient
from storage.events import CheckpointEvent, Reporter
from storage.format import layout
from storage.format.framing import EncodedItem
from storage.format.manifest import Receipt, ValueEntry
from storage.run import attempt_ids, catalog, owner
from storage.run.attempt import Attempt, StateContents
from storage.run.job import Origin
from storage.run.owner import Claim
from storage.saving import receipts
from storage.saving.saveplan import Chunk
from storage.saving.uploads import SaveJob, SaveRules, Tried, Uploads
from storage.saving.writing import Payload
from storage.stores.memory import MemoryStore
from storage.stores.objects import exists

TOKEN = "0123456789abcdef" * 2
CHUNK = Chunk("n", ("n",), None, None, None, "", 0)


class Broken(Exception):
    """The process has died."""


class Dying(MemoryStore):
    """Dies with its `num_left`-th put: right before it or, if it is `done`, right after; then nothing is put."""

    def __init__(self) -> None:
        super().__init__("x")
        self.num_left: int | None = None
        self.done = False

    def put(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if self.num_left is not None:
            self.num_left -= 1
            if self.num_left < 0:
                if self.done and self.num_left == -1:
                    super().put(key, *args, **kwargs)
                raise Broken(key)
        return super().put(key, *args, **kwargs)


class Hold:
    """A claim, and what was found of it."""

    def __init__(self, store: MemoryStore, generation: int = 0, adopts: tuple[str, ...] = ()) -> None:
        wanted = owner.Owner(lineage="a", generation=generation, epoch=0, token=TOKEN[generation:], adopts=adopts)
        self.claim = Claim(store, owner.claim(store, wanted)[0])
        self.noted: list[Fenced] = []

    def note(self, error: Fenced) -> None:
        self.noted.append(error)


class Save:
    """One save of a single rank."""

    def __init__(self, store: MemoryStore, hold: Hold, step: int = 10, number: int = 1) -> None:
        self.store, self.events = store, list[tuple[str, dict[str, Any]]]()
        report = Reporter(lambda name, fields: self.events.append((name, fields)), {})
        rules = SaveRules(keep=3, timeout_s=5.0)
        self.uploads = Uploads(store, hold, Origin(lineage="a"), report, rules, threading.Event())
        self.attempt = Attempt.of_step(step, attempt_ids.new_id(hold.claim.token, number), 1)
        self.stored: list[Receipt | None] = []

    def job(self, content: bytes = b"value") -> SaveJob:
        item = EncodedItem((content,), 0, len(content))
        contents = StateContents({}, {"n": ValueEntry(path=("n",))})
        return SaveJob(self.attempt, 0, [Payload(CHUNK, item)], contents, started_s=0.0, created_unix_s=1.0)

    def run(self, tried: Tried = Tried.NOT_YET, content: bytes = b"value") -> bool:
        return self.uploads.run(self.job(content), self.stored.append, tried=tried)


def moments() -> list[tuple[int, bool]]:
    """Around each put of a save: the data, its receipt, two manifests, `.metadata`."""
    return list(itertools.product(range(5), (False, True)))


@pytest.mark.parametrize(("number", "done"), moments())
def test_a_save_goes_on_from_wherever_it_was_broken_off(
    number: int, done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Dying()
    save = Save(store, Hold(store))
    store.num_left, store.done = number, done
    with monkeypatch.context() as patch:
        patch.setattr(save.uploads, "_abort", lambda *args: None)  # who has died tells nobody, and looks at nothing
        patch.setattr(save.uploads, "_committed_all_the_same", lambda *args: None)
        assert not save.run()
    store.num_left = None
    if save.stored != [None]:  # where its part was stored, its memory may hold something else by now
        assert save.run(Tried.STORED, b"other")
    else:
        assert save.run(Tried.BEGUN)
    assert [name for name, _ in save.events] == [CheckpointEvent.FAILED, CheckpointEvent.COMMITTED]
    assert {fields["bytes"] for name, fields in save.events if name == CheckpointEvent.COMMITTED} == {5}
    assert catalog.committed_steps(store) == [10]
    (data,) = [info.key for info in store.list("") if info.key.endswith(".distcp")]
    assert store.read(data) == b"value"


class Thawing(MemoryStore):
    """Its process is frozen right before its `number`-th put: what is set for `meanwhile` is done by another."""

    def __init__(self, number: int) -> None:
        super().__init__("x")
        self.num_left = number
        self.meanwhile: Callable[[], object] | None = None

    def put(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if self.meanwhile is not None:
            self.num_left -= 1
            if self.num_left < 0:
                call, self.meanwhile = self.meanwhile, None
                call()
        return super().put(key, *args, **kwargs)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("is_cleaned", [False, True])
def test_a_save_whose_process_was_frozen_and_that_another_has_committed_is_said_to_be_committed(
    number: int, is_cleaned: bool
) -> None:
    store = Thawing(number)
    hold = Hold(store)
    save, other = Save(store, hold), Save(store, hold)
    other.attempt = save.attempt

    def carry_out() -> None:
        assert other.run(Tried.BEGUN)
        if is_cleaned:  # as the claim after it may do
            for info in store.list(save.attempt.prefix):
                if "receipt-" in info.key:
                    store.delete(info.key)

    store.meanwhile = carry_out
    assert save.run()
    assert [name for name, _ in save.events] == [CheckpointEvent.COMMITTED]
    assert {fields["bytes"] for _, fields in save.events} == {5}
    assert catalog.committed_steps(store) == [10]
    assert not [info.key for info in store.list("") if "aborted" in info.key]


class ThawingOnAFullDisk(Thawing):
    """What it puts itself when it goes on has no room, if it is data."""

    def put_from(self, key: str, *args: Any, **kwargs: Any) -> Any:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is None:
            return super().put_from(key, *args, **kwargs)
        meanwhile()
        raise Transient("no space left")


@pytest.mark.parametrize("is_committed", [False, True])
def test_what_another_has_committed_stays_where_the_save_has_no_room(
    is_committed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ThawingOnAFullDisk(99)
    hold = Hold(store)
    save, other, early = Save(store, hold), Save(store, hold), Save(store, hold, number=0)
    other.attempt = save.attempt
    store.put(early.attempt.prefix + layout.data_name(early.attempt.id, 0, 0), [b"left"])

    def carry_out() -> None:
        if is_committed:
            assert other.run(Tried.BEGUN)
            store.delete(save.attempt.prefix + layout.receipt_name(save.attempt.id, 0))
        else:
            store.put(save.attempt.prefix + layout.data_name(save.attempt.id, 0, 0), [b"half"])

    monkeypatch.setattr(Uploads, "_committed_all_the_same", lambda *_: None)  # the store did not tell
    store.meanwhile = carry_out
    assert not save.run()
    assert [name for name, _ in save.events] == [CheckpointEvent.FAILED]
    assert len([info for info in store.list("") if info.key.endswith(".distcp")]) == is_committed
    assert catalog.committed_steps(store) == [10] * is_committed


def test_a_rank_that_was_frozen_for_longer_than_it_may_wait_looks_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Thawing(0)
    hold = Hold(store)
    save = Save(store, hold)
    late = SaveJob(save.attempt, 0, save.job().payloads, None, started_s=0.0)

    def wait(*args: object) -> None:
        assert Save.run(save, Tried.BEGUN)
        raise Transient("gave up waiting for the coordinator to commit")

    monkeypatch.setattr(receipts, "await_outcome", wait)
    assert save.uploads.run(late, save.stored.append)
    assert CheckpointEvent.FAILED not in [name for name, _ in save.events]


def test_what_is_gone_is_not_stored_from_memory_that_may_hold_something_else() -> None:
    store = Dying()
    save = Save(store, Hold(store))
    assert not save.run(Tried.STORED)
    ((_, fields),) = save.events
    assert fields["reason"] == "what rank 0 had stored of it is gone"
    assert catalog.committed_steps(store) == []


def test_what_was_given_up_stays_so() -> None:
    store = Dying()
    save = Save(store, Hold(store))
    receipts.put_aborted(store, save.attempt, "rank 1 failed")
    assert not save.run(Tried.BEGUN)
    assert save.events[0][1]["reason"] == "rank 1 failed"


@pytest.mark.parametrize("is_adopted", [True, False])
def test_a_newer_owner_lets_those_attempts_be_committed_that_it_has_adopted(is_adopted: bool) -> None:
    store = Dying()
    old = Hold(store)
    save = Save(store, old)
    new = Hold(store, 1, (save.attempt.id,) if is_adopted else ())
    assert save.run() == is_adopted
    assert bool(old.noted) != is_adopted
    assert catalog.committed_steps(store) == ([10] if is_adopted else [])
    assert "checkpoint_cleanup_failed" not in [name for name, _ in save.events]
    assert Save(store, new, step=20).run(), "the newer owner saves beside it"


def test_a_newer_owner_spares_what_it_has_adopted_when_it_cleans_up() -> None:
    store = Dying()
    save = Save(store, Hold(store))
    data = f"{save.attempt.prefix}attempt-{save.attempt.id}/__0_0.distcp"
    dead = data.replace(save.attempt.id, "dead0000")
    for key in (data, dead):
        store.put(key, [b"value"])
    new = Hold(store, 1, (save.attempt.id,))
    for step in (20, 30, 40, 50):
        assert Save(store, new, step, number=step).run()
        assert exists(store, data)
    assert not exists(store, dead)
    assert save.run(Tried.BEGUN)


def test_an_id_says_whose_attempt_it_is_and_how_many_came_before() -> None:
    mine, other = (attempt_ids.new_id(token * 2, 0) for token in ("0123456789abcdef", "f" * 16))
    later = [attempt_ids.new_id("0123456789abcdef" * 2, number) for number in (1, 2, 3)]
    assert layout.parse_attempt(f"attempt-{mine}") == mine
    assert attempt_ids.AttemptNumber.parse(later[2]) == attempt_ids.AttemptNumber("0123456789abcdef", 3)
    assert attempt_ids.AttemptNumber.parse(str(uuid.uuid4())) is None
    seen = [mine, other, *later, "dead0000"]
    assert attempt_ids.live_beside(later[1], seen) == {later[1], later[2]}
    assert attempt_ids.live_beside(later[1], seen, [other, "gone0000"]) == {later[1], later[2], other}
    assert attempt_ids.live_beside("dead0000", seen) == {"dead0000"}
