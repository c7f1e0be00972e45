"""What a URL may say of a store, seen at the other end: headers that arrive, and modes of files."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import Access, Checkpointer
from storage.errors import Cause, Denied
from storage.format import layout
from storage.format.checksum import crc32c
from storage.stores import retry_policy
from storage.stores.objects import exists
from storage.stores.registry import open_store
from tests.s3 import BUCKET, S3Server
from tests.storage.proxy import Fault, FaultProxy
from tests.storage.small_runs import save, state

MIB = 1024 * 1024


def through(proxy: FaultProxy, prefix: str, **options: str) -> str:
    return proxy.url(prefix, **options)


@pytest.mark.parametrize("kind", ["juicefs", "moto"])
def test_every_request_says_who_pays(kind: str, request: pytest.FixtureRequest) -> None:
    server: S3Server = request.getfixturevalue(kind)
    with FaultProxy(server) as proxy:
        url = through(proxy, f"paid-{kind}", request_payer="requester")
        save(url, 1, 2)
        store = open_store(url)
        store.put("large", [bytes(6 * MIB)])
        assert store.uploads() == []
        assert not exists(open_store(url), "nothing")
        with Checkpointer(url, access=Access.READ) as reader:
            assert reader.restore(state(0)) == 2
        assert {method for method, _ in proxy.requests} == {"GET", "HEAD", "PUT", "POST", "DELETE"}
        for (method, target), headers in zip(proxy.requests, proxy.headers, strict=True):
            assert headers.get("x-amz-request-payer") == "requester", (method, target)
            # what is not signed may be added by anybody on the way
            assert "x-amz-request-payer" in headers["authorization"], (method, target)
    assert "request_payer=requester" in store.url


def expected(checksum: str, body: bytes) -> tuple[str, str]:
    number = {"crc32": zlib.crc32, "crc32c": crc32c}.get(checksum)
    digest = hashlib.new(checksum, body).digest() if number is None else number(body).to_bytes(4, "big")
    return "content-md5" if checksum == "md5" else f"x-amz-checksum-{checksum}", base64.b64encode(digest).decode()


@pytest.mark.parametrize("checksum", ["md5", "crc32", "crc32c", "sha256"])
@pytest.mark.parametrize("kind", ["juicefs", "moto"])
def test_a_checksum_goes_along_with_every_body(kind: str, checksum: str, request: pytest.FixtureRequest) -> None:
    server: S3Server = request.getfixturevalue(kind)
    large = os.urandom(5 * MIB) + b"the rest"
    with FaultProxy(server) as proxy:
        url = through(proxy, f"sum-{checksum}", checksum=checksum)
        store = open_store(url)
        store.put("small", [b"one ", b"", b"two"])
        store.put("empty", [])
        store.put("large", [large[:100], large[100:]])
        assert (store.read("small"), store.read("empty"), store.read("large")) == (b"one two", b"", large)
        bodies = {"small": b"one two", "empty": b"", "partNumber=1": large[: 5 * MIB], "partNumber=2": b"the rest"}
        seen = set()
        for (method, target), headers in zip(proxy.requests, proxy.headers, strict=True):
            for name in (name for name in bodies if method == "PUT" and name in target):
                header, value = expected(checksum, bodies[name])
                assert headers[header] == value, target
                assert header in headers["authorization"]
                assert checksum == "md5" or headers["x-amz-sdk-checksum-algorithm"] == checksum.upper()
                seen.add(name)
        assert seen == set(bodies)
        # an upload that was begun with an algorithm is ended with the checksum of every part
        completed = next(body.decode() for body in proxy.posted if b"PartNumber" in body)
        for name in ("partNumber=1", "partNumber=2"):
            tag, value = f"Checksum{checksum.upper()}", expected(checksum, bodies[name])[1]
            assert (f"<{tag}>{value}</{tag}>" in completed) == (checksum != "md5")
        save(url, 1)
        with Checkpointer(url, access=Access.READ) as reader:
            assert reader.restore(state(0)) == 1


def test_what_was_damaged_on_the_way_is_refused_by_its_checksum_and_sent_again(
    juicefs: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(retry_policy.RULES, Cause.DAMAGED, retry_policy.Rule(3, 0.0, 0.0, 20.0))  # type: ignore[arg-type]
    for size_bytes, where in ((100, "k-100"), (6 * MIB, "partNumber=1")):
        with FaultProxy(juicefs) as proxy:
            store = open_store(through(proxy, "damaged", checksum="md5", sign_payload="never"))
            proxy.faults.append(fault := Fault("corrupt_put", method="PUT", contains=where))
            data = os.urandom(size_bytes)
            store.put(f"k-{size_bytes}", [data])
            assert store.read(f"k-{size_bytes}") == data
            assert fault.num_done == 1
            assert store.retries.snapshot().num_by_cause == {"damaged": 1}


def test_a_bucket_with_object_lock_takes_checkpoints(moto: S3Server) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=moto.endpoint_url)
    client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
    rule = {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}}
    client.put_object_lock_configuration(
        Bucket="locked", ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule}
    )
    with FaultProxy(moto) as proxy:
        url = through(proxy, "run", checksum="crc32c").replace(f"s3://{BUCKET}/", "s3://locked/")
        with pytest.raises(Denied, match="add checksum=md5 or checksum=crc32c to the URL"):
            open_store(url.replace("&checksum=crc32c", "")).put("k", [b"x"])
        proxy.requests.clear()
        proxy.headers.clear()
        with Checkpointer(url, keep=1) as ckpt:
            for step in (1, 2):
                ckpt.save(step, state(step), wait=True)
                assert ckpt.wait()
            assert ckpt.restore(state(0)) == 2
        bodies = [
            (target, headers)
            for (method, target), headers in zip(proxy.requests, proxy.headers, strict=True)
            if method == "PUT"
        ]
    assert bodies and all("x-amz-checksum-crc32c" in headers for _, headers in bodies)


# folders ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)


def modes(top: Path) -> tuple[set[int], set[int]]:
    """Of files, and of folders."""
    paths = [path for path in top.rglob("*") if path.name != ".lock"]
    found = [(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in (top, *paths)]
    return {mode for is_folder, mode in found if not is_folder}, {mode for is_folder, mode in found if is_folder}


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize(
    ("query", "mask", "files", "folders"),
    [
        ("", 0o000, 0o600, 0o700),
        ("", 0o022, 0o600, 0o700),
        ("?mode=0600", 0o022, 0o600, 0o700),
        ("?mode=0640", 0o022, 0o640, 0o750),
        ("?mode=640", 0o027, 0o640, 0o750),
        ("?mode=0644", 0o022, 0o644, 0o755),
        ("?mode=0660", 0o007, 0o660, 0o770),
        ("?mode=0664", 0o002, 0o664, 0o775),
        ("?mode=0660", 0o022, 0o640, 0o750),
        ("?mode=0640", 0o077, 0o600, 0o700),
    ],
)
def test_modes_of_files_and_folders(
    query: str, mask: int, files: int, folders: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.umask(mask)
    url = f"file://{tmp_path}/a run{query}"
    with caplog.at_level(logging.WARNING, "storage"):
        save(url, 1, 2)
    assert modes(tmp_path / "a run") == ({files}, {folders})
    is_masked = bool(query) and files != int(query.removeprefix("?mode="), 8)
    told = [record.getMessage() for record in caplog.records if "the umask" in record.getMessage()]
    assert bool(told) == is_masked
    assert not told or f"files get the mode {files:04o}" in told[0]
    store = open_store(url)
    assert open_store(store.url).url == store.url  # others open it as it was opened
    assert open_store(store.url).list("") == store.list("") != []


@pytest.mark.usefixtures("umask")
def test_folders_that_exist_keep_their_modes_and_that_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    with caplog.at_level(logging.WARNING, "storage"):
        open_store(f"file://{tmp_path}/run?mode=0640").put("a/k", [b"x"])
    assert [record.getMessage() for record in caplog.records] == [
        f"file://{tmp_path}/run?mode=0640: the folder has the mode 0700 and keeps it (chmod 0750)"
    ]
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "run/a").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "run/a/k").stat().st_mode) == 0o640


def test_steps_of_folders_with_a_mode() -> None:
    assert layout.split_step_url("file:///run/step-000000120?mode=0640") == ("file:///run?mode=0640", "step-000000120/")
