"""Opening a checkpoint: the looks that it takes go at once; those that do not fit together are repeated in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
import torch.distributed.checkpoint as dcp

from storage import ShardReader, ShardWriter
from storage.errors import NoCheckpoint
from storage.format import layout
from storage.run import catalog
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectInfo
from tests.storage.small_runs import opened, save, state

DEADLINE_S = 60.0


class Asked(MemoryStore):
    """Notes what is looked at, and listed."""

    def __init__(self) -> None:
        super().__init__("asked")
        self.infos: list[str] = []
        self.lists: list[str] = []

    def info(self, key: str) -> ObjectInfo:
        self.infos.append(key)
        return super().info(key)

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        self.lists.append(prefix)
        return super().list(prefix)


def test_only_the_newest_step_is_looked_at() -> None:
    store = Asked()
    save(opened(store), 1, 2, 3)
    store.infos.clear()
    assert next(iter(catalog.candidates(store)))[0] == 3
    assert store.infos == ["step-000000003/.metadata"]


def test_a_root_that_is_no_checkpoint_is_not_listed() -> None:
    store = Asked()
    save(opened(store), 1)
    store.lists.clear()
    with pytest.raises(NoCheckpoint):
        catalog.open_checkpoint(store, "")
    assert store.lists == []


class Meeting(MemoryStore):
    """With a barrier, lets nobody look at a step before all who are expected do."""

    barrier: threading.Barrier | None = None

    def read(self, key: str) -> bytes:
        self._meet(key)
        return super().read(key)

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        self._meet(prefix)
        return super().list(prefix)

    def _meet(self, key: str) -> None:
        if self.barrier is not None and key.startswith("step-"):
            self.barrier.wait(DEADLINE_S)


def test_a_step_is_opened_in_one_round_of_requests() -> None:
    store = Meeting("meeting")
    save(opened(store), 1)
    store.barrier = threading.Barrier(3)
    assert catalog.open_checkpoint(store, layout.step_folder(1) + "/").step == 1


class Late(MemoryStore):
    """Lets `meanwhile` act before a `.metadata` is read, when the two looks beside it have been answered."""

    meanwhile: Callable[[], None] | None = None

    def __init__(self) -> None:
        super().__init__("late")
        self._answered = threading.Semaphore(0)

    def read(self, key: str) -> bytes:
        if key.endswith(layout.METADATA) and self.meanwhile is not None:
            for _ in range(2):
                assert self._answered.acquire(timeout=DEADLINE_S)
            act, self.meanwhile = self.meanwhile, None
            act()
        data = super().read(key)
        if key.endswith(layout.MANIFEST) and self.meanwhile is not None:
            self._answered.release()
        return data

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        found = super().list(prefix)
        if self.meanwhile is not None:
            self._answered.release()
        return found


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_step_that_is_saved_anew_between_the_looks_is_read(caplog: pytest.LogCaptureFixture) -> None:
    store = Late()
    url = f"{opened(store)}/{layout.step_folder(7)}"

    def save_anew(number: int) -> None:
        for info in store.list(""):
            store.delete(info.key)
        dcp.save(state(number), storage_writer=ShardWriter(url), no_dist=True)

    save_anew(1)
    store.meanwhile = lambda: save_anew(2)
    found = state(0)
    dcp.load(found, storage_reader=ShardReader(url, no_dist=True), no_dist=True)
    assert found["n"] == 2
    assert (found["w"] == 2).all()
    assert "is whole; the first time" in caplog.text


def test_a_run_without_a_checkpoint_is_told_as_one(memory_url: str) -> None:
    with pytest.raises(NoCheckpoint, match=r"there is no \.metadata, nor is it a run that has one"):
        ShardReader(memory_url, no_dist=True).read_metadata()


class Retained(MemoryStore):
    """Another job commits a step, and removes the one before, just before somebody looks at that, so many times."""

    def __init__(self, num_times: int) -> None:
        super().__init__("retained")
        self.num_left = num_times
        self.newest = 1

    def info(self, key: str) -> ObjectInfo:
        if self.num_left and key == f"{layout.step_folder(self.newest)}/{layout.METADATA}":
            self.num_left -= 1
            self.newest += 1
            for info in MemoryStore.list(self, layout.step_folder(self.newest - 1) + "/"):
                MemoryStore.delete(self, info.key)
            MemoryStore.put(self, f"{layout.step_folder(self.newest)}/{layout.METADATA}", [b"x"])
        return super().info(key)


@pytest.mark.parametrize("num_times", [0, 1, 2, 5])
@pytest.mark.parametrize("is_under_way", [False, True])
def test_a_job_that_keeps_one_checkpoint_is_never_seen_without_any(num_times: int, is_under_way: bool) -> None:
    store = Retained(num_times)
    store.put("step-000000001/.metadata", [b"x"])
    if is_under_way:  # and its folder is there already
        for step in range(2, 10):
            store.put(f"{layout.step_folder(step)}/attempt/__0_0.distcp", [b"x"])
    assert next(iter(catalog.candidates(store)))[0] == 1 + num_times


def test_a_run_without_a_checkpoint_is_listed_a_few_times_at_most() -> None:
    store, listed = Asked(), list[str]()
    folders = store.folders
    store.folders = lambda prefix: listed.append(prefix) or folders(prefix)  # type: ignore[method-assign,func-returns-value]
    assert not list(catalog.candidates(store))
    assert len(listed) == 1
    store.put("step-000000001/attempt/__0_0.distcp", [b"x"])
    assert not list(catalog.candidates(store))
    assert len(listed) == 1 + 3
    save(opened(store), 2)
    listed.clear()
    assert [step for step, _ in catalog.candidates(store)] == [2]
    assert len(listed) == 2
