"""What looks like damage and is none: nothing may be set aside on one reader's word."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage import Checkpointer, JobIdentity, open_store
from storage.errors import Disputed, Fenced, Transient
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectInfo
from tests.storage.small_runs import Events, opened, save, state, states

_names = itertools.count()


class BadMemory(MemoryStore):
    """Flips a bit of what is read, `num_bad` times."""

    num_bad = 0

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        etag = super().read_into(key, offset, buffers, if_match=if_match)
        if self.num_bad:
            self.num_bad -= 1
            buffers[-1][-1] ^= 1
        return etag


def test_damage_that_is_not_there_when_looked_for_again_sets_nothing_aside(memory_url: str, events: Events) -> None:
    store = BadMemory(memory_url)
    url = opened(store)
    save(url, 1, 2)
    store.num_bad = 2
    with Checkpointer(url, on_event=events[1]) as ckpt:
        with pytest.raises(Disputed, match=r"step 2 reads as damaged \(rank 0 on .*checksum"):
            ckpt.restore(state(0))
        assert states(url) == [(2, "committed"), (1, "committed")]
        assert ckpt.restore(state(0)) == 2
    assert [name for name, _ in events[0]] == ["restored"]


def test_a_bit_that_flipped_on_the_way_is_read_again_and_told(memory_url: str, events: Events) -> None:
    store = BadMemory(memory_url)
    url = opened(store)
    save(url, 1, 2)
    store.num_bad = 1
    found = state(0)
    with Checkpointer(url, on_event=events[1]) as ckpt:
        assert ckpt.restore(found) == 2
    assert (found["w"] == 2).all()
    assert [name for name, _ in events[0]] == ["checkpoint_retried", "restored"]
    assert events[0][0][1]["retries"] == {"damaged": 1}


class BadIndexOnce(MemoryStore):
    """Flips a byte of the first manifest that is read once `bad` is set; both copies of it."""

    num_bad = 0

    def read(self, key: str) -> bytes:
        data = super().read(key)
        if self.num_bad and key.endswith("manifest.json"):
            self.num_bad -= 1
            return data[:-9] + b"?" + data[-8:]
        return data


def test_a_damaged_index_is_read_twice(memory_url: str, events: Events, caplog: pytest.LogCaptureFixture) -> None:
    store = BadIndexOnce(memory_url)
    url = opened(store)
    save(url, 1, 2)
    store.num_bad = 2
    with Checkpointer(url, on_event=events[1]) as ckpt:
        assert ckpt.restore(state(0)) == 2
    assert [name for name, _ in events[0]] == ["checkpoint_retried", "restored"]
    assert "step-000000002 is whole; the first time: step-000000002/manifest.json is damaged" in caplog.text


class StaleListing(MemoryStore):
    """A listing as an old cache of a folder shows it: without what came later."""

    stale = False

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        return [info for info in super().list(prefix) if not self.stale or info.key.endswith(".metadata")]


def test_a_stale_listing_is_not_taken_for_loss(memory_url: str) -> None:
    store = StaleListing(memory_url)
    url = opened(store)
    save(url, 1, 2)
    store.stale = True
    with Checkpointer(url) as ckpt:
        assert ckpt.restore(state(0)) == 2


class EtagsOfAClient(MemoryStore):
    """Every look at an object gives another etag, as from two clients of one mounted file system."""

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        return [replace(info, etag=f"{info.etag}-{next(_names)}") for info in super().list(prefix)]


def test_etags_need_not_be_equal_between_clients(memory_url: str) -> None:
    url = opened(EtagsOfAClient(memory_url))
    save(url, 1)
    with Checkpointer(url) as ckpt:
        assert ckpt.restore(state(0)) == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_folder_that_cannot_be_read_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    save(str(tmp_path), 1, 2)
    scandir = os.scandir

    def failing(path: Any) -> Any:
        if "attempt-" in str(path):
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    store = open_store(str(tmp_path))
    with pytest.raises(Transient, match=os.strerror(number)):
        store.list("step-000000002/")
    (tmp_path / "alone/attempt-0").mkdir(parents=True)
    assert "alone" in store.folders("")  # nobody can tell that it is empty
    with Checkpointer(str(tmp_path)) as ckpt, pytest.raises(Transient):
        ckpt.restore(state(0))
    monkeypatch.undo()
    assert states(str(tmp_path)) == [(2, "committed"), (1, "committed")]


@pytest.mark.usefixtures("no_look_at_claims")
def test_a_stale_restorer_sets_nothing_aside(tmp_path: Path, events: Events) -> None:
    save(str(tmp_path), 1, 2)
    (data,) = tmp_path.glob("step-000000002/attempt-*/*.distcp")
    data.write_bytes(bytes(data.stat().st_size))
    with Checkpointer(str(tmp_path), job=JobIdentity(lineage="a", generation=1), on_event=events[1]) as old:
        Checkpointer(str(tmp_path), job=JobIdentity(lineage="a", generation=2)).start().close()
        with pytest.raises(Fenced, match="generation 2"):
            old.restore(state(0))
        data.unlink()  # damage that shows in the listing takes another way
        with pytest.raises(Fenced, match="generation 2"):
            old.restore(state(0))
    assert (tmp_path / "step-000000002/.metadata").exists()
    assert not events[0]
