"""Copies over what is damaged, half or set aside at the target, and beside other copies that are under way."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from elastic_moe.cli.main import main
from storage import Checkpointer, inspection, open_store, register_scheme
from storage.errors import NotFound, StorageError
from storage.run import quarantine
from storage.stores import fsspec_store
from storage.stores.memory import MemoryStore
from storage.stores.objects import Capability, Fetch, ObjectInfo, ObjectStore, Upload
from storage.stores.retrying_store import RetryingStore
from storage.stores.s3.store import S3Store
from storage.stores.wrapper import StoreWrapper
from storage.transfer import copy_jobs, copying

METADATA = "step-000000020/.metadata"
_names = itertools.count()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with step 20; nobody writes to it."""
    folder = str(tmp_path_factory.mktemp("source"))
    with Checkpointer(folder) as ckpt:
        ckpt.save(20, {"w": torch.arange(3_000_000.0), "n": 1}, wait=True)
        assert ckpt.wait()
    return folder


def url_of(store: Any) -> str:
    scheme = f"mending-{next(_names)}"
    register_scheme(scheme, lambda rest: store)
    return f"{scheme}://run"


def push(source: str, store: Any) -> int:
    return main(["ckpt", "push", source, url_of(store), "--quiet"])


def state_of(store: Any) -> str:
    (row,) = inspection.summaries(inspection.locate(url_of(store)))
    return row.state


def damage(store: ObjectStore, ending: str) -> None:
    """Flip a bit of the step's objects of that kind."""
    for info in store.list("step-000000020/"):
        if info.key.endswith(ending):
            data = bytearray(store.read(info.key))
            data[len(data) // 2] ^= 1
            store.put(info.key, [data])


class Killed(BaseException):
    """The process ends here."""


class Mortal(StoreWrapper):
    """A store whose user dies before its write number `die_at`. `is_plain`: it cannot delete one version only."""

    def __init__(self, store: MemoryStore, die_at: int, is_plain: bool) -> None:
        super().__init__(store)
        self._left = die_at
        self._is_plain = is_plain
        self.died_before = ""

    def can(self, capability: Capability) -> bool:
        return not (self._is_plain and capability is Capability.CONDITIONAL_DELETES) and super().can(capability)

    def put(self, key: str, buffers: Any, *, if_absent: bool = False) -> ObjectInfo:
        self._live_on(f"put {key}")
        return super().put(key, buffers, if_absent=if_absent)

    def put_from(self, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
        self._live_on(f"put_from {key}")
        return super().put_from(key, size_bytes, fetch, pool)

    def delete(self, key: str) -> None:
        self._live_on(f"delete {key}")
        super().delete(key)

    def delete_version(self, key: str, etag: str) -> bool:
        self._live_on(f"delete_version {key}")
        return super().delete_version(key, etag)

    def _live_on(self, call: str) -> None:
        if self._left == 0:
            self.died_before = self.died_before or call
            raise Killed
        self._left -= 1


@pytest.mark.parametrize("is_plain", [False, True])
def test_a_copy_that_dies_anywhere_over_what_is_set_aside_loses_nothing(source: str, is_plain: bool) -> None:
    """It is set aside until it is whole, and the next copy mends it."""
    seen = []
    for die_at in itertools.count():
        inner = MemoryStore("x")
        alive = Mortal(inner, -1, is_plain)
        assert push(source, alive) == 0
        damage(inner, ".distcp")
        assert quarantine.set_aside(alive, inner.info(METADATA))
        assert state_of(alive) == "quarantined"
        mortal = Mortal(inner, die_at, is_plain)
        if not is_killed(source, mortal):
            break
        seen.append(mortal.died_before)
        assert state_of(alive) == "quarantined", mortal.died_before
        assert push(source, alive) == 0
        assert state_of(alive) == "committed", mortal.died_before
        assert not inspection.verify(inner, "step-000000020/").problems
    assert not inspection.verify(inner, "step-000000020/").problems
    assert seen[-1].startswith("delete step-000000020/quarantined-")
    assert (f"put {METADATA}" in seen) == (not is_plain)  # else it is there, and counts once the marker is gone


def is_killed(source: str, store: Mortal) -> bool:
    try:
        push(source, store)
    except Killed:
        return True
    return False


@pytest.mark.parametrize("is_half", [False, True])
def test_a_manifest_of_a_dead_copy_that_is_damaged_is_put_again(source: str, is_half: bool) -> None:
    store = MemoryStore("x")
    assert push(source, store) == 0
    store.delete(METADATA)
    if is_half:
        (key,) = (info.key for info in store.list("") if "attempt-" in info.key and info.key.endswith("manifest.json"))
        store.put(key, [store.read(key)[:100]])
    else:
        damage(store, "manifest.json")
    assert push(source, store) == 0
    assert state_of(store) == "committed"
    assert not inspection.verify(store, "step-000000020/").problems


# beside other copies --------------------------------------------------------------------------------------------


class Vanishing(MemoryStore):
    """An upload in parts that somebody aborts while it is under way."""

    def put_from(self, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
        fetch(0, min(size_bytes, 1000))
        raise NotFound(f"the upload of {key} does not exist")


def test_what_lacks_at_the_target_is_no_damage(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(source, Vanishing("x")) == 1
    told = capsys.readouterr()
    assert "DAMAGED" not in told.out
    assert told.err.count("\n") == 1
    assert "step-000000020 cannot be written to memory://x" in told.err
    assert main(["ckpt", "push", source, "/proc/no-such-place", "--quiet"]) == 2  # no such folder can be made
    told = capsys.readouterr()
    assert "DAMAGED" not in told.out
    assert "/proc/no-such-place is no folder, and cannot be made one" in told.err


class Lacking(MemoryStore):
    """A store whose data objects go while they are read."""

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        raise NotFound(f"{key} is not there")


def test_what_lacks_in_the_source_is_damage(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Lacking("x")
    assert push(source, store) == 0
    capsys.readouterr()
    assert main(["ckpt", "pull", url_of(store), str(tmp_path / "lacking"), "--quiet", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["steps"]
    assert row["state"] == "damaged"
    assert row["reason"].endswith(".distcp is missing")


def test_only_uploads_of_long_ago_are_given_up(
    source: str, make_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A younger one may be of another copy, which still sends its parts. (moto says of all uploads: of 2010.)"""
    url = make_url("juicefs")
    target = open_store(url)
    assert isinstance(target, S3Store)
    name = next(info.key for info in open_store(source).list("") if info.key.endswith(".distcp"))
    begun = target._bucket.create_upload(name)

    def ids() -> list[str]:
        found: Sequence[Upload] = target.uploads()
        return [upload.id for upload in found if upload.key == name]

    assert main(["ckpt", "push", source, url, "--quiet"]) == 0
    assert ids() == [begun]
    target.delete(METADATA)
    now_unix_s = time.time()
    later = SimpleNamespace(time=lambda: now_unix_s + 25 * 3600.0, monotonic=time.monotonic)
    monkeypatch.setattr("elastic_moe.cli.transfer.time", later)
    assert main(["ckpt", "push", source, url, "--quiet"]) == 0
    assert ids() == []


def test_a_copy_sends_nothing_below_a_checkpoint_that_another_has_committed_meanwhile(source: str) -> None:
    store, ours = MemoryStore("x"), inspection.locate(source)
    (job,) = copy_jobs.plan(ours, inspection.Location(store, None))
    found = copy_jobs.look(ours.store, store, job)
    assert isinstance(found, copy_jobs.Found)
    assert push(source, store) == 0
    before = store.list("")
    assert copying.Copier(ours.store, store, 0.0).copy(found).state == "present"
    assert store.list("") == before


# file systems whose names show what is half written -------------------------------------------------------------


class Refusing(LocalFileSystem):  # type: ignore[misc]
    """Renames to no name that is taken, as HDFS and SMB do: by an error, or without a word."""

    protocol = "refusing"
    is_silent = False

    def mv(self, path1: str, path2: str, recursive: bool = True, **kwargs: Any) -> None:
        if not self.exists(path2):
            super().mv(path1, path2, recursive, **kwargs)
        elif not self.is_silent:
            raise OSError("there is such a file")


@pytest.mark.parametrize("size_bytes", [1000, 40 << 20])
def test_a_rewrite_through_fsspec_shows_no_half_and_leaves_nothing(
    size_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two copies at once write the same objects: the second must not tear what the first has committed."""
    monkeypatch.setattr(fsspec_store, "_STREAMED_SIZE_BYTES", 1 << 20)
    store = open_store(f"fsspec+file://{tmp_path}/run")
    assert isinstance(store, RetryingStore)
    first, second = b"1" * size_bytes, b"2" * size_bytes
    is_broken = [True]

    def fetch(offset: int, length: int) -> list[memoryview]:
        assert store.read("a/b") == first
        if is_broken[0] and offset + length == size_bytes:
            raise StorageError("the source is away")
        return [memoryview(second)[offset : offset + length]]

    store.put("a/b", [first])
    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(StorageError, match="the source is away"):
            store.put_from("a/b", size_bytes, fetch, pool)
        assert store.read("a/b") == first
        is_broken[0] = False
        store.put_from("a/b", size_bytes, fetch, pool)
    assert store.read("a/b") == second
    assert [info.key for info in store.list("")] == ["a/b"]
    assert store.folders("") == ["a"]
    assert list((tmp_path / "run/.tmp").iterdir()) == []


def test_a_put_through_fsspec_that_dies_half_way_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"fsspec+file://{tmp_path}/run")
    store.put("owner.json", [b"whole"])

    def half(self: LocalFileSystem, path: str, value: bytes, **kwargs: Any) -> None:
        Path(path).write_bytes(value[:2])
        raise Killed

    monkeypatch.setattr(LocalFileSystem, "pipe_file", half)
    with pytest.raises(Killed):
        store.put("owner.json", [b"another"])
    assert store.read("owner.json") == b"whole"


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_server_that_renames_to_no_taken_name(
    is_silent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Refusing, "is_silent", is_silent)
    store = fsspec_store.FsspecStore("refusing://", Refusing(), str(tmp_path))
    for content in (b"first", b"second"):
        store.put("a/b", [content])
        assert store.read("a/b") == content
    assert [info.key for info in store.list("")] == ["a/b"]


def test_what_dead_writers_have_left_is_swept_and_the_lock_stays(tmp_path: Path) -> None:
    url = f"fsspec+file://{tmp_path}/run"
    (tmp_path / "run/.tmp").mkdir(parents=True)
    old, young, lock = ((tmp_path / "run/.tmp" / name) for name in ("0" * 32, "1" * 32, ".lock"))
    for path in (old, young, lock):
        path.write_bytes(b"half")
    for path in (old, lock):
        os.utime(path, (0.0, time.time() - 25 * 3600.0))
    store = open_store(url)
    store.put("a", [b"x"])
    assert (old.exists(), young.exists(), lock.exists()) == (False, True, True)
    assert [info.key for info in store.list("")] == ["a"]
