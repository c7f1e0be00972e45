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
