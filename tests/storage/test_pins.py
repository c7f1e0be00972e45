"""What a reader has begun to read in one version of an object it reads on in that version, or not at all."""

from __future__ import annotations

import functools
import http.server
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from storage import Checkpointer, ShardReader, open_store
from storage.dcp import reader as shard_reader
from storage.errors import Cause, Corrupt, Interrupted
from storage.format.index import Index
from storage.loading.reading import read_items
from storage.stores.adaptive_limit import AdaptiveLimit
from storage.stores.buffers import Buffer
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectStore
from storage.stores.retry_policy import Retrier, RetryLog
from storage.stores.retrying_store import RetryingStore
from storage.stores.s3.bucket import Bucket
from storage.verified.source import Pins, Source
from tests.s3 import BUCKET, S3Server

NUM_ELEMENTS = 5 << 20
"""20 MiB: two parts, and of an item of stock DCP both ends before."""


class TestPins:
    def test_the_first_version_is_kept_by_object(self) -> None:
        pins = Pins()
        assert pins.of("a") is None
        for key, etag in (("a", "one"), ("b", "two"), ("a", "one")):
            pins.met(key, etag)
        assert (pins.of("a"), pins.of("b")) == ("one", "two")

    def test_what_was_asked_for_before_the_first_answer_is_compared(self) -> None:
        pins = Pins()
        pins.met("a", "one")
        with pytest.raises(Corrupt, match="a changed while it was read") as caught:
            pins.met("a", "two")
        assert caught.value.key == "a"
        assert pins.of("a") == "one"

    def test_no_etag_says_nothing(self) -> None:
        pins = Pins()
        pins.met("a", "")
        assert pins.of("a") is None
        pins.met("a", "one")
        pins.met("a", "")
        assert pins.of("a") == "one"


class Watched(MemoryStore):
    """Notes the pins that it is asked with; may tell no etags, and breaks off `num_broken` reads with nothing read."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.asked: list[str | None] = []
        self.tells = True
        self.num_broken = 0

    def read_into(self, key: str, offset: int, buffers: Any, *, if_match: str | None = None) -> str:
        self.asked.append(if_match)
        if self.num_broken:
            self.num_broken -= 1
            raise Interrupted("broke off", Cause.RESET)
        etag = super().read_into(key, offset, buffers, if_match=if_match)
        return etag if self.tells else ""


@pytest.fixture
def watched(memory_url: str) -> Watched:
    store = Watched(memory_url)
    store.put("run/k", [bytes(100)])
    return store


def reader(store: ObjectStore) -> Callable[[], memoryview]:
    """Reads ten bytes of the object, with one reader's pins."""
    patient = RetryingStore(store, Retrier(AdaptiveLimit(8), RetryLog(), sleep=lambda seconds: None))
    pins = Pins()

    def read() -> memoryview:
        memory = memoryview(bytearray(10))
        Source(patient, Index.__new__(Index), pins=pins)._read_into("run/k", 0, [memory])
        return memory

    return read


def test_the_second_read_asks_for_the_version_of_the_first(watched: Watched) -> None:
    read = reader(watched)
    read(), read()
    etag = watched.info("run/k").etag
    watched.num_broken = 2
    read()  # what is tried again asks for the same one
    assert watched.asked == [None, etag, etag, etag, etag]
    watched.put("run/k", [b"x" * 100])
    with pytest.raises(Corrupt, match="changed while it was read"):
        read()
    assert bytes(reader(watched)()) == b"x" * 10  # another reader begins with what is there


def test_where_no_etag_is_told_none_is_asked_for(watched: Watched) -> None:
    watched.tells = False
    read = reader(watched)
    read(), read()
    watched.put("run/k", [b"x" * 100])
    assert bytes(read()) == b"x" * 10
    assert watched.asked == [None, None, None]


@dataclass
class Replacer:
    """Stands in for `Bucket.read_into`; replaces the object once its first bytes were read."""

    replacement: Buffer | None = None
    asked: list[tuple[int, str | None]] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read_into = Bucket.read_into

        def seen(bucket: Bucket, key: str, offset: int, buffers: Any, *, if_match: str | None = None) -> str:
            etag = read_into(bucket, key, offset, buffers, if_match=if_match)
            if key.endswith(".distcp"):
                self.asked.append((offset, if_match))
                if self.replacement is not None:
                    bucket.put(key, [self.replacement])
                    self.replacement = None
            return etag

        monkeypatch.setattr(Bucket, "read_into", seen)
        monkeypatch.setattr(shard_reader, "read_items", functools.partial(read_items, num_threads=1))


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((NUM_ELEMENTS,), value)}


def load(url: str) -> dict[str, torch.Tensor]:
    filled = state(0.0)
    dcp.load(filled, storage_reader=ShardReader(url, no_dist=True), no_dist=True)
    return filled


def saved_by_us(url: str, value: float, folder: Path) -> str:
    with Checkpointer(url) as ckpt:
        ckpt.save(1, state(value), wait=True)
    return next(info.key for info in open_store(url).list("") if info.key.endswith(".distcp"))


def saved_by_stock(url: str, value: float, folder: Path) -> str:
    dcp.save(state(value), checkpoint_id=folder, no_dist=True)
    store = open_store(url)
    for path in folder.iterdir():
        store.put(path.name, [path.read_bytes()])
    return "__0_0.distcp"


@pytest.mark.parametrize("save", [saved_by_us, saved_by_stock])
@pytest.mark.parametrize("kind", ["juicefs", "moto"])
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_an_object_replaced_between_two_parts_is_told(
    request: pytest.FixtureRequest,
    kind: str,
    save: Callable[[str, float, Path], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server: S3Server = request.getfixturevalue(kind)
    url = server.url(f"run-{uuid.uuid4().hex}")
    key = save(url, 1.0, tmp_path / "one")
    data = open_store(url).read(key)
    replacer = Replacer()
    with monkeypatch.context() as patch:
        replacer.install(patch)
        assert torch.equal(load(url)["w"], state(1.0)["w"])
        etag = open_store(url).info(key).etag
        wanted = [etag] * (1 if save is saved_by_us else 3)
        assert [asked for _, asked in replacer.asked] == [None, *wanted]  # nothing else was asked for
        replacer.replacement = data[::-1]
        with pytest.raises(CheckpointException, match=r"distcp changed while it was read"):
            load(url)


@pytest.fixture
def weak() -> Iterator[tuple[str, list[str | None]]]:
    """A server of ten bytes with a weak etag, and the `If-Match` of each request that it got."""
    asked: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.headers.get("If-Match"))
            self.send_response(206)
            for name, value in (("ETag", 'W/"v1"'), ("Content-Range", "bytes 0-9/10"), ("Content-Length", "10")):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"0123456789")

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield f"s3://{BUCKET}/run?anonymous=true&endpoint_url=http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join(60)


def test_a_weak_etag_is_compared_and_not_sent(weak: tuple[str, list[str | None]]) -> None:
    """A server must let none match (RFC 9110, 13.1.1), so that asking would be refused though nothing has changed."""
    url, asked = weak
    store, memory = open_store(url), memoryview(bytearray(10))
    etag = store.read_into("k", 0, [memory])
    assert store.read_into("k", 0, [memory], if_match=etag) == etag
    assert asked == [None, None]
    with pytest.raises(Corrupt, match="changed while it was read"):
        store.read_into("k", 0, [memory], if_match="W/v0")
