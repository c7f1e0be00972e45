"""Answers that lack something, or have no end: an error of our own in one line, at a bounded cost, never a guess."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from storage.errors import Cause, Corrupt, Denied, Forbidden, NotFound, StorageError, Transient
from storage.stores import objects, retry_policy
from storage.stores.fsspec_store import FsspecStore
from storage.stores.local import LocalStore
from storage.stores.objects import ObjectStore
from storage.stores.registry import open_store
from storage.stores.s3 import client, listing
from storage.stores.s3.bucket import Bucket
from storage.stores.s3.options import parse_url
from tests.storage.odd_server import Answer, Odd, answer, endless, endless_chunks, odd_server

KIB, MIB = 1024, 1024 * 1024
SENT_BYTES_MAX = 24 * MIB
"""What may have been read, twice, and what waited in the sockets of both sides."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for cause in Cause:
        monkeypatch.setitem(retry_policy.RULES, cause, retry_policy.Rule(2, 0.0, 0.0, 20.0))  # type: ignore[arg-type]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(objects, "READ_SIZE_BYTES_MAX", MIB)
    monkeypatch.setattr(client, "ANSWER_SIZE_BYTES_MAX", MIB)


def opened(odd: Odd) -> ObjectStore:
    return open_store(f"s3://bucket/run?endpoint_url={odd.url}&stall_timeout_s=5")


def bucket_of(odd: Odd) -> Bucket:
    return Bucket(*parse_url(f"bucket/run?endpoint_url={odd.url}&stall_timeout_s=5"))


def always(given: Callable[[], Answer]) -> Callable[[str, str], Answer]:
    return lambda method, target: given()


def failure(call: Callable[[], object]) -> StorageError:
    with pytest.raises(StorageError) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return caught.value


def xml(inner: str, root: str = "ListBucketResult") -> bytes:
    return answer(f'<?xml version="1.0"?><{root}>{inner}</{root}>'.encode(), "Content-Type: application/xml")


UNREADABLE = "cannot be understood|HTTP 500"  # as which botocore counts a 200 without XML
WHOLE = "<IsTruncated>false</IsTruncated>"
WHEN = "<LastModified>2026-01-01T00:00:00Z</LastModified>"


@pytest.mark.parametrize("length", [None, "many", "-5", "1_0", "\u00b2", "9" * 400, "1.5"])
def test_a_head_without_a_length_is_no_object_of_no_length(length: str | None) -> None:
    with odd_server(always(lambda: answer(b"", 'ETag: "x"', length=length))) as odd:
        error = failure(lambda: opened(odd).info("k"))
    assert "Content-Length" in str(error) and "s3://bucket/run/k" in str(error)


def test_etags_and_times_may_be_missing() -> None:
    rows = "<Contents><Key>run/k</Key><Size>3</Size></Contents>"
    respond = lambda method, target: answer(b"", length="3") if method == "HEAD" else xml(WHOLE + rows)  # noqa: E731
    with odd_server(respond) as odd:
        store = opened(odd)
        assert (store.info("k").size_bytes, store.info("k").etag) == (3, "")
        (found,) = store.list("")
    assert (found.key, found.size_bytes, found.etag, found.modified_unix_s) == ("k", 3, "", None)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (answer(b""), "no IsTruncated"),
        (answer(b"<html><body>Welcome</body></html>"), "no IsTruncated"),
        (answer(b"Welcome"), UNREADABLE),
        (answer(b'{"Contents": []}'), UNREADABLE),
        (xml(""), "no IsTruncated"),
        (xml("<IsTruncated/>"), "neither true nor false|no IsTruncated"),
        (xml("<IsTruncated>maybe</IsTruncated>"), "neither true nor false"),
        (xml("<IsTruncated>true</IsTruncated>"), "no NextContinuationToken"),
        (xml("<IsTruncated>true</IsTruncated><NextContinuationToken/>"), "no NextContinuationToken"),
        (xml(f"{WHOLE}<Contents/>"), "has no "),
        (xml(f"{WHOLE}<Contents><Size>3</Size></Contents>"), "no Key"),
        (xml(f"{WHOLE}<Contents><Key>run/k</Key></Contents>"), "no Size"),
        (xml(f"{WHOLE}<Contents><Key>run/k</Key><Size/></Contents>"), "cannot be understood"),
        (xml(f"{WHOLE}<Contents><Key>run/k</Key><Size>ten</Size></Contents>"), "ten"),
        (xml(f"{WHOLE}<Contents><Key>run/k</Key><Size>-1</Size></Contents>"), "Size of -1"),
        (xml(f"{WHOLE}<Contents><Key>other/k</Key><Size>1</Size></Contents>"), "was not asked for"),
        (
            xml(f"{WHOLE}<Contents><Key>run/k</Key><Size>1</Size><LastModified>soon</LastModified></Contents>"),
            "cannot be understood",
        ),
        (answer(b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents>"), UNREADABLE),
        (
            answer(
                b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]>'
                b"<ListBucketResult><IsTruncated>false</IsTruncated><Prefix>&b;</Prefix></ListBucketResult>"
            ),
            "defines entities",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "answer",
)
def test_a_listing_that_lacks_something_is_not_an_empty_one(body: bytes, says: str) -> None:
    with odd_server(always(lambda: body)) as odd:
        error = failure(lambda: opened(odd).list(""))
    assert isinstance(error, Transient) and "s3://bucket/run" in str(error)
    with pytest.raises(Transient, match=says):
        raise error


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (xml(f"{WHOLE}<CommonPrefixes/>"), "no Prefix"),
        (xml(f"{WHOLE}<CommonPrefixes><Prefix>elsewhere/</Prefix></CommonPrefixes>"), "was not asked for"),
    ],
)
def test_folders_without_names_are_told(body: bytes, says: str) -> None:
    with odd_server(always(lambda: body)) as odd, pytest.raises(Transient, match=says):
        opened(odd).folders("")


@pytest.mark.parametrize(
    ("inner", "says"),
    [
        ("", "no IsTruncated"),
        ("<IsTruncated>true</IsTruncated>", "no NextKeyMarker"),
        (f"{WHOLE}<Upload><Key>run/k</Key><UploadId>1</UploadId></Upload>", "no Initiated"),
        (f"{WHOLE}<Upload><Key>run/k</Key><Initiated>2026-01-01T00:00:00Z</Initiated></Upload>", "no UploadId"),
        ("<IsTruncated>true</IsTruncated><NextKeyMarker>run/k</NextKeyMarker>", "goes in a circle"),
    ],
)
def test_a_listing_of_uploads_that_lacks_something(inner: str, says: str) -> None:
    with odd_server(always(lambda: xml(inner, "ListMultipartUploadsResult"))) as odd:
        error = failure(bucket_of(odd).uploads)
    with pytest.raises(StorageError, match=says):
        raise error


@pytest.mark.parametrize(
    ("operation", "says"),
    [
        (lambda bucket: bucket.create_upload("k"), "no UploadId"),
        (lambda bucket: bucket.put_part("k", "id", 1, [memoryview(b"x")]), "no ETag"),
        (lambda bucket: bucket.complete_upload("k", "id", [], with_condition=False), "no ETag"),
    ],
)
def test_uploads_that_are_answered_with_nothing(operation: Callable[[Bucket], object], says: str) -> None:
    with odd_server(always(lambda: answer(b""))) as odd, pytest.raises(Transient, match=says):
        operation(bucket_of(odd))


def next_pages(rows: Callable[[int], str], token: Callable[[int], str]) -> Callable[[str, str], Answer]:
    numbers = itertools.count()

    def respond(method: str, target: str) -> Answer:
        number = next(numbers)
        more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token(number)}</NextContinuationToken>"
        return xml(more + rows(number))

    return respond


def test_a_listing_in_a_circle_is_left() -> None:
    with odd_server(next_pages(lambda number: "", lambda number: str(number % 3))) as odd:
        assert "goes in a circle" in str(failure(lambda: opened(odd).list("")))
    assert len(odd.requests) == 4


@pytest.mark.parametrize("bound", ["pages", "names"])
def test_a_listing_without_end_is_left(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Callable[[int], str] = lambda number: ""  # noqa: E731
    if bound == "pages":
        monkeypatch.setattr(listing, "NUM_PAGES_MAX", 20)
    else:
        monkeypatch.setattr(listing, "LISTING_SIZE_BYTES_MAX", 100 * KIB)
        rows = lambda number: "".join(  # noqa: E731
            f"<Contents><Key>run/{number}-{row}</Key><Size>1</Size></Contents>" for row in range(20)
        )
    with odd_server(next_pages(rows, str)) as odd:
        error = failure(lambda: opened(odd).list(""))
    assert isinstance(error, Denied) and "no end to it" in str(error)
    assert len(odd.requests) <= 20


ENDLESS: dict[str, Callable[[], Iterator[bytes]]] = {
    "chunks": endless_chunks,
    "no length": lambda: endless(answer(b"", length=None), bytes(64 * KIB)),
    "a large length": lambda: endless(answer(b"", length=str(7 * 1024**3)), bytes(64 * KIB)),
    "spaces": lambda: endless(answer(b"", length=None), b" " * 64 * KIB),
    "one chunk": lambda: endless(answer(b"FFFFFFFFFF\r\n", "Transfer-Encoding: chunked", length=None), bytes(64 * KIB)),
}


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("operation", ["read", "list", "folders", "uploads"])
def test_a_body_without_end_is_left(kind: str, operation: str) -> None:
    with odd_server(always(ENDLESS[kind])) as odd:
        store: Any = opened(odd)
        call = store.uploads if operation == "uploads" else lambda: getattr(store, operation)("k/")
        if operation == "read":
            call = lambda: store.read("k")  # noqa: E731
        error = failure(call)
    assert odd.sent_bytes < SENT_BYTES_MAX
    assert isinstance(error, Corrupt if operation == "read" else Transient)


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_refusal_without_end_is_a_refusal(kind: str) -> None:
    """Also one whose status is all that there is to be known."""

    def refuse() -> Iterator[bytes]:
        head, *_ = [next(ENDLESS[kind]())]
        return endless(
            head.replace(b"200 OK", b"403 Forbidden"), bytes(64 * KIB) if kind != "chunks" else b"1\r\nx\r\n"
        )

    with odd_server(always(refuse)) as odd:
        store = opened(odd)
        for call in (lambda: store.read("k"), lambda: store.info("k"), lambda: store.put("k", [b"x"])):
            assert isinstance(failure(call), (Forbidden, Transient))
    assert odd.sent_bytes < SENT_BYTES_MAX


@pytest.mark.parametrize("kind", ["chunks", "no length", "a large length"])
def test_what_follows_what_was_asked_for_is_not_read(kind: str) -> None:
    def respond(method: str, target: str) -> Answer:
        head, *_ = [next(ENDLESS[kind]())]
        if method == "PUT":
            return endless(head.replace(b"\r\n", b'\r\nETag: "x"\r\n', 1), bytes(64 * KIB))
        head = head.replace(b"200 OK", b"206 Partial Content").replace(
            b"\r\n", b"\r\nContent-Range: bytes 0-3/9\r\n", 1
        )
        return endless(head, b"10000\r\n" + bytes(0x10000) + b"\r\n" if kind == "chunks" else bytes(64 * KIB))

    with odd_server(respond) as odd:
        bucket, memory = bucket_of(odd), bytearray(b"1234")
        bucket.read_into("k", 0, [memoryview(memory)])
        assert memory == bytes(4)
        if kind != "chunks":
            assert bucket.put_object("k", [b"x"], with_condition=False).etag == "x"
    assert odd.sent_bytes < SENT_BYTES_MAX


HEADS: dict[str, Callable[[], Answer]] = {
    "many headers": lambda: answer(b"", *[f"X-{number}: {number}" for number in range(5000)]),
    "a long header": lambda: answer(b"", "X: " + "x" * MIB),
    "headers without end": lambda: endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000),
    "interim answers without end": lambda: endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "a long status": lambda: endless(b"HTTP/1.1 200 ", b"O" * 64 * KIB),
    "trailers without end": lambda: endless(
        answer(b"0\r\n", "Transfer-Encoding: chunked", length=None), b"X: y\r\n" * 1000
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_or_tail_without_end_is_left(kind: str) -> None:
    with odd_server(always(HEADS[kind])) as odd:
        store = opened(odd)
        for call in (lambda: store.read("k"), lambda: store.list("")):
            assert isinstance(failure(call), Transient)
    assert odd.sent_bytes < SENT_BYTES_MAX


# other stores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "memory", "fsspec-file", "fsspec-memory", "juicefs"])
def test_what_is_too_large_for_an_index_is_not_read_as_a_whole(kind: str, make_url: Callable[[str], str]) -> None:
    store = open_store(make_url(kind))
    store.put("large", [bytes(MIB + 1)])
    store.put("just", [bytes(MIB)])
    assert "1048576 at most" in str(failure(lambda: store.read("large")))
    assert len(store.read("just")) == MIB


def test_a_folder_may_hold_what_is_no_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(7 * 1024**3)
    for call in (lambda: store.read("pipe"), lambda: store.read_into("pipe", 0, [memoryview(bytearray(1))])):
        assert "is not a file" in str(failure(call))
    assert "bytes; what is read as a whole" in str(failure(lambda: store.read("sparse")))
    (tmp_path / "folder").mkdir()
    for call in (lambda: store.read("folder"), lambda: store.read_into("folder", 0, [memoryview(bytearray(1))])):
        assert isinstance(failure(call), NotFound)


class Told(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A file system that tells `row` of everything."""

    row: Any = None

    def info(self, path: str, **kwargs: Any) -> Any:
        return type(self).row

    def find(self, path: str, **kwargs: Any) -> Any:
        return {"/run/k": {"name": "/run/k", "type": "file", "size": None}}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        return [type(self).row]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        return bytes(100)


@pytest.mark.parametrize(
    "row",
    [
        None,
        {},
        {"type": "file"},
        {"type": "file", "size": None},
        {"type": "file", "size": "ten"},
        {"type": "file", "size": -1},
        {"type": "file", "size": [3]},
    ],
)
def test_a_file_system_that_does_not_tell_a_size(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Told, "row", row)
    store = FsspecStore("told://run", Told(), "/run")
    operations: list[Callable[[], object]] = [
        lambda: store.info("k"),
        lambda: store.read("k"),
        lambda: store.read_into("k", 0, [memoryview(bytearray(4))]),
        lambda: store.list(""),
    ]
    for call in operations:
        assert not isinstance(failure(call), (Corrupt, NotFound))  # it is not damaged, nor is it gone


@pytest.mark.parametrize("row", [None, {}, {"name": "/run/step"}, {"type": "directory"}])
def test_a_file_system_that_does_not_tell_what_is_a_folder(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Told, "row", row)
    failure(lambda: FsspecStore("told://run", Told(), "/run").folders(""))


def test_a_listing_without_sizes_is_completed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a web server: what it lists are links."""
    monkeypatch.setattr(Told, "row", {"name": "/run/k", "type": "file", "size": 100})
    store = FsspecStore("told://run", Told(), "/run")
    assert [(info.key, info.size_bytes) for info in store.list("")] == [("k", 100)]
    with pytest.raises(Transient, match="100 of 4 bytes came"):
        store.read_into("k", 0, [memoryview(bytearray(4))])
