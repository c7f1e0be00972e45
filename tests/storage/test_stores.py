"""The object store contract, over every back end."""

from __future__ import annotations

import errno
import functools
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.errors import AlreadyExists, BadURL, Corrupt, Denied, NotFound
from storage.parallel import run_concurrently
from storage.stores import fsspec_store
from storage.stores.objects import Capability, ObjectStore
from storage.stores.registry import open_store
from tests.storage.refused_calls import refuse

EVERY = ("local", "file-url", "no-links", "memory", "fsspec-file", "fsspec-memory", "juicefs", "moto", "fsspec-s3")
CONDITIONAL = ("local", "file-url", "no-links", "memory", "moto")
"""Where of two puts with `if_absent` at once only one gets through."""
VERSIONED = ("local", "file-url", "no-links", "memory")
"""Where an object that is written anew with the same bytes gets a new etag."""


@pytest.fixture(params=EVERY)
def store(
    request: pytest.FixtureRequest, make_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> ObjectStore:
    if request.param == "no-links":
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    return open_store(make_url(request.param))


only = functools.partial(pytest.mark.parametrize, "store", indirect=True)


def read_range(store: ObjectStore, key: str, offset: int, *lengths: int, if_match: str | None = None) -> list[bytes]:
    buffers = [bytearray(length) for length in lengths]
    store.read_into(key, offset, [memoryview(buffer) for buffer in buffers], if_match=if_match)
    return [bytes(buffer) for buffer in buffers]


def test_a_read_tells_the_version_that_the_bytes_are_of(store: ObjectStore) -> None:
    """Or nothing: a folder and what goes through fsspec cannot say it for sure."""
    tells = store.url.startswith(("s3://", "memory://"))
    for content in (b"one", b"other"):
        info = store.put("k", [content])
        etag = store.read_into("k", 1, [memoryview(bytearray(2))])
        assert etag == (info.etag if tells else "")


def test_put_joins_buffers_of_any_kind(store: ObjectStore) -> None:
    info = store.put("a/b", [b"one", bytearray(b"two"), memoryview(b""), memoryview(b"three")])
    assert store.read("a/b") == b"onetwothree"
    assert info.size_bytes == 11
    assert store.info("a/b") == info


@pytest.mark.parametrize("kind", EVERY)
def test_capabilities(kind: str, make_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "no-links":
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    store = open_store(make_url(kind))
    expected = {
        Capability.CONDITIONAL_PUTS: kind in CONDITIONAL,
        Capability.CONDITIONAL_DELETES: kind in CONDITIONAL,
        Capability.HOST_LOCKS: kind == "no-links",
        Capability.GUARDED_READS: not kind.startswith("fsspec"),
        Capability.HOST_CACHE: kind in ("local", "file-url", "no-links"),
        Capability.ON_EVERY_HOST: False,
    }
    assert {capability: store.can(capability) for capability in Capability} == expected
    assert store.list("") == []


def test_one_version_is_removed_and_no_other(store: ObjectStore) -> None:
    if not store.can(Capability.CONDITIONAL_DELETES):
        return
    first = store.put("a/b", [b"first"])
    second = store.put("a/b", [b"second"])
    assert not store.delete_version("a/b", first.etag)
    assert store.read("a/b") == b"second"
    assert store.delete_version("a/b", second.etag)
    assert store.list("") == []
    assert store.delete_version("a/b", second.etag), "what is gone already"


def test_large_objects(store: ObjectStore) -> None:
    """Larger than one part, in buffers whose borders are not the parts'."""
    data = memoryview(random.Random(1).randbytes(1 << 20) * 34)
    buffers = [data[:7], data[7 : 20 << 20], data[20 << 20 :]]
    info = store.put("large", buffers, if_absent=True)
    assert (info.size_bytes, store.info("large")) == (data.nbytes, info)
    with pytest.raises(AlreadyExists):
        store.put("large", buffers, if_absent=True)
    memory = bytearray(data.nbytes)
    store.read_into("large", 0, [memoryview(memory)[:11], memoryview(memory)[11:]], if_match=info.etag)
    assert memory == data
    assert read_range(store, "large", (16 << 20) - 5, 10) == [bytes(data[(16 << 20) - 5 : (16 << 20) + 5])]


@pytest.mark.parametrize("size_bytes", [0, 5, (32 << 20) + 5])
def test_large_objects_are_taken_in_parts(store: ObjectStore, size_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, from any thread."""
    monkeypatch.setattr(fsspec_store, "_STREAMED_SIZE_BYTES", 17 << 20)
    data = memoryview(random.Random(2).randbytes(1 << 20) * 33)[:size_bytes]
    fetched = set()

    def fetch(offset: int, length: int) -> list[memoryview]:
        assert length <= 16 << 20
        fetched.add((offset, length))
        part = data[offset : offset + length]
        return [part[:3], part[3:]]

    store.put("streamed", [b"another object that is there already"])
    with ThreadPoolExecutor(3) as pool:
        info = store.put_from("streamed", size_bytes, fetch, pool)
    assert sum(length for _, length in fetched) == size_bytes
    assert (info.size_bytes, store.info("streamed")) == (size_bytes, info)
    memory = bytearray(size_bytes)
    store.read_into("streamed", 0, [memoryview(memory)])
    assert memory == data


@only([kind for kind in EVERY if kind != "fsspec-memory"])  # whose files are there while they are written
def test_what_cannot_be_fetched_leaves_nothing(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec_store, "_STREAMED_SIZE_BYTES", 17 << 20)

    def fetch(offset: int, length: int) -> list[memoryview]:
        if offset:
            raise Corrupt("the second part is damaged")
        return [memoryview(bytes(length))]

    with ThreadPoolExecutor(3) as pool, pytest.raises(Corrupt, match="second part"):
        store.put_from("streamed", 18 << 20, fetch, pool)
    assert store.list("") == []
    assert store.uploads() == []


def test_names_of_all_sorts(store: ObjectStore) -> None:
    names = ["plain", "two words", "a+b", "per%20cent", "ümlaut", "a=b&c", "#hash", "q?x=1", "~tilde", "'quoted'"]
    for name in names:
        store.put(f"names/{name}", [name.encode()])
    assert [info.key for info in store.list("names/")] == sorted(f"names/{name}" for name in names)
    for name in names:
        assert store.read(f"names/{name}") == name.encode()
        assert store.info(f"names/{name}").size_bytes == len(name.encode())
        store.delete(f"names/{name}")
    assert store.list("names/") == []


def test_many_buffers(store: ObjectStore) -> None:
    pieces = [bytes([index % 256]) * (index % 7) for index in range(3000)]
    store.put("many", pieces)
    assert store.read("many") == b"".join(pieces)
    assert b"".join(read_range(store, "many", 0, *[len(piece) for piece in pieces])) == b"".join(pieces)


def test_empty_object(store: ObjectStore) -> None:
    store.put("empty", [])
    assert store.read("empty") == b""
    assert store.info("empty").size_bytes == 0


def test_read_into_fills_buffers_in_order(store: ObjectStore) -> None:
    store.put("k", [b"0123456789"])
    assert read_range(store, "k", 2, 3, 0, 4) == [b"234", b"", b"5678"]


def test_read_past_the_end_is_corrupt(store: ObjectStore) -> None:
    store.put("k", [b"0123456789"])
    with pytest.raises(Corrupt):
        read_range(store, "k", 8, 1, 2)
    with pytest.raises(Corrupt):
        read_range(store, "k", 20, 1)


def test_etag_changes_with_the_bytes(store: ObjectStore) -> None:
    etags = [store.put("k", [text]).etag for text in (b"same", b"samf", b"same size no more")]
    assert len(set(etags)) == 3
    assert read_range(store, "k", 0, 4, if_match=etags[-1]) == [b"same"]
    for etag in (*etags[:2], "nothing-like-it"):
        with pytest.raises(Corrupt, match="changed"):
            read_range(store, "k", 0, 4, if_match=etag)


@only(VERSIONED)
def test_etag_changes_with_every_rewrite(store: ObjectStore) -> None:
    etags = [store.put("k", [b"same"]).etag for _ in range(20)]
    assert len(set(etags)) == 20
    assert read_range(store, "k", 0, 4, if_match=etags[-1]) == [b"same"]
    with pytest.raises(Corrupt, match="changed"):
        read_range(store, "k", 0, 4, if_match=etags[0])


def test_if_absent_keeps_the_first(store: ObjectStore) -> None:
    store.put("k", [b"first"], if_absent=True)
    with pytest.raises(AlreadyExists):
        store.put("k", [b"second"], if_absent=True)
    assert store.read("k") == b"first"
    store.put("k", [b"third"])
    assert store.read("k") == b"third"


@only(CONDITIONAL)
def test_if_absent_has_one_winner(store: ObjectStore) -> None:
    start, won = threading.Barrier(8), []

    def race(index: int) -> None:
        start.wait()
        try:
            store.put("prize", [bytes([index]) * 1000], if_absent=True)
        except AlreadyExists:
            return
        won.append(index)

    run_concurrently([functools.partial(race, index) for index in range(8)])
    assert len(won) == 1
    assert store.read("prize") == bytes(won) * 1000


def test_missing_objects(store: ObjectStore) -> None:
    store.put("folder/k", [b"x"])
    for key in ("nothing", "folder", "folder/k/below", "no/folder"):
        with pytest.raises(NotFound):
            store.read(key)
        with pytest.raises(NotFound):
            store.info(key)
        with pytest.raises(NotFound):
            read_range(store, key, 0, 1)
        store.delete(key)
    assert store.read("folder/k") == b"x"


def test_list_is_by_prefix_and_sorted(store: ObjectStore) -> None:
    assert store.list("") == []
    assert store.list("step-1/") == []
    for key in ("step-1/b", "step-1/a/x", "step-10/c", "owner.json", "step-1/.metadata"):
        store.put(key, [key.encode()])
    assert [info.key for info in store.list("step-1/")] == ["step-1/.metadata", "step-1/a/x", "step-1/b"]
    assert [info.key for info in store.list("step-1")] == [
        *("step-1/.metadata", "step-1/a/x", "step-1/b"),
        "step-10/c",
    ]
    assert [info.key for info in store.list("step-1/a")] == ["step-1/a/x"]
    assert len(store.list("")) == 5
    assert store.list("step-1/")[0] == store.info("step-1/.metadata")
    assert all((info.modified_unix_s or 0) > 1_700_000_000 for info in store.list(""))


def test_folders(store: ObjectStore) -> None:
    assert store.folders("") == []
    for key in ("b/x", "a/y/z", "a/w", "top"):
        store.put(key, [b""])
    assert store.folders("") == ["a", "b"]
    assert store.folders("a/") == ["y"]
    assert store.folders("nothing/") == []


def test_delete_takes_empty_folders_along(store: ObjectStore) -> None:
    store.put("a/b/c", [b"x"])
    store.delete("a/b/c")
    assert store.folders("") == []
    store.put("a/b/c", [b"y"], if_absent=True)
    assert store.read("a/b/c") == b"y"


def test_concurrent_puts_and_deletes_in_one_folder(store: ObjectStore) -> None:
    def work(index: int) -> None:
        for _ in range(30):
            store.put(f"shared/{index}", [b"x" * 100])
            store.delete(f"shared/{index}")

    run_concurrently([functools.partial(work, index) for index in range(4)])


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\\b", "a\nb", "a/.."])
def test_keys_never_leave_the_root(store: ObjectStore, key: str) -> None:
    for call in (store.read, store.info, store.delete):
        with pytest.raises(Denied):
            call(key)
    with pytest.raises(Denied):
        store.put(key, [b"x"])
    with pytest.raises(Denied):
        read_range(store, key, 0, 1)


@pytest.mark.parametrize("prefix", ["/etc/", "../", "a/../b", ".."])
def test_prefixes_never_leave_the_root(store: ObjectStore, prefix: str) -> None:
    with pytest.raises(Denied):
        store.list(prefix)
    with pytest.raises(Denied):
        store.folders(prefix)


def test_url_opens_the_same_store(store: ObjectStore) -> None:
    store.put("k", [b"x"])
    assert open_store(store.url).read("k") == b"x"


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadURL, match="is a file"):
        open_store(str(tmp_path / "file"))
