"""The pure parts of `s3://`: URLs, refusals, parts."""

from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import AlreadyExists, BadURL, Cause, Corrupt, Denied, Forbidden, NotFound, StorageError, Transient
from storage.format import layout
from storage.stores.buffers import cut
from storage.stores.registry import open_store, with_options
from storage.stores.s3 import store as s3_store
from storage.stores.s3.etags import multipart_etag
from storage.stores.s3.options import S3Options, format_url, parse_url
from storage.stores.s3.refusals import Refusal, Request, parse_body, to_error
from storage.stores.s3.uploads import NUM_PARTS_MAX, part_size_bytes

REQUEST = Request("read", "s3://bucket/run/key", "bucket", "https://store.example")
PUT = Request("put", "s3://bucket/run/key", "bucket", "https://store.example", is_put=True, if_absent=True)


def refusal(status: int, code: str = "", request: Request = REQUEST, **headers: str) -> StorageError:
    body = f"<Error><Code>{code}</Code><Message>told</Message></Error>".encode() if code else b""
    return to_error(parse_body(status, headers, body), request, now_s=1_000_000_000.0)


@pytest.mark.parametrize(
    ("status", "code", "cause"),
    [
        (503, "SlowDown", Cause.THROTTLED),
        (503, "", Cause.THROTTLED),
        (429, "", Cause.THROTTLED),
        (400, "RequestTimeout", Cause.STALLED),
        (500, "InternalError", Cause.SERVER_ERROR),
        (502, "", Cause.SERVER_ERROR),
        (400, "XAmzContentSHA256Mismatch", Cause.DAMAGED),
        (409, "OperationAborted", Cause.CONFLICT),
    ],
)
def test_what_may_work_later(status: int, code: str, cause: Cause) -> None:
    error = refusal(status, code)
    assert isinstance(error, Transient)
    assert error.cause is cause


@pytest.mark.parametrize(
    ("status", "code", "kind", "says"),
    [
        (404, "NoSuchKey", NotFound, "s3://bucket/run/key"),
        (404, "", NotFound, "s3://bucket/run/key"),
        (404, "NoSuchBucket", Denied, "no bucket 'bucket' at https://store.example"),
        (412, "PreconditionFailed", Corrupt, "changed"),
        (416, "InvalidRange", Corrupt, "shorter"),
        (403, "AccessDenied", Forbidden, "refused .AccessDenied: told"),
        (403, "", Forbidden, "refused .HTTP 403"),
        (403, "InvalidAccessKeyId", Denied, "does not know the access key"),
        (403, "SignatureDoesNotMatch", Denied, "secret key"),
        (400, "ExpiredToken", Denied, "expired"),
        (501, "NotImplemented", Denied, "storage_class and sse"),
        (400, "SomethingElse", Denied, "SomethingElse"),
    ],
)
def test_what_will_not(status: int, code: str, kind: type[StorageError], says: str) -> None:
    error = refusal(status, code)
    assert type(error) is kind
    with pytest.raises(kind, match=says):
        raise error
    assert "\n" not in str(error)


def test_a_wrong_region_names_the_right_one() -> None:
    for error in (
        refusal(301, "PermanentRedirect", **{"X-Amz-Bucket-Region": "eu-west-1"}),  # type: ignore[arg-type]
        to_error(Refusal(400, "AuthorizationHeaderMalformed", "", "eu-west-1"), REQUEST, 0.0),
    ):
        assert isinstance(error, Denied)
        assert "region=eu-west-1" in str(error)


@pytest.mark.parametrize(
    ("date", "says"), [("01:36:40", "600 s ahead of"), ("02:46:40", "3600 s behind"), ("", "too far")]
)
def test_a_wrong_clock_is_measured(date: str, says: str) -> None:
    headers = {"Date": f"Sun, 09 Sep 2001 {date} GMT"} if date else {}
    error = refusal(403, "RequestTimeTooSkewed", **headers)  # type: ignore[arg-type]
    assert isinstance(error, Denied)
    assert says in str(error)


@pytest.mark.parametrize(
    ("date", "kind", "says"), [("02:46:40", Denied, "3600 s behind"), ("01:40:00", Forbidden, "refused .HTTP 403")]
)
def test_a_head_that_is_refused_for_a_wrong_clock_says_so(date: str, kind: type[StorageError], says: str) -> None:
    """Its refusal has no body, and no code."""
    error = refusal(403, "", Date=f"Sun, 09 Sep 2001 {date} GMT")
    assert type(error) is kind
    assert re.search(says, str(error))


def test_refusals_of_a_put() -> None:
    assert isinstance(refusal(412, "PreconditionFailed", PUT), AlreadyExists)
    conflict = refusal(409, "ConditionalRequestConflict", PUT)
    assert isinstance(conflict, Transient) and conflict.cause is Cause.CONFLICT
    assert isinstance(refusal(404, "NoSuchUpload", PUT), NotFound)
    assert isinstance(refusal(404, "NoSuchKey", PUT), Transient)  # a put needs no object to be there


def test_retry_after() -> None:
    error = refusal(503, "SlowDown", **{"Retry-After": "7"})  # type: ignore[arg-type]
    assert isinstance(error, Transient) and error.retry_after_s == 7.0
    error = refusal(503, "SlowDown", **{"Retry-After": "86400"})  # type: ignore[arg-type]
    assert isinstance(error, Transient) and error.retry_after_s == 60.0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html><body><h1>502 Bad Gateway</h1></body></html>",
        b"<Error><Code>Half",
        b"\xff\xfe",
        b'<!DOCTYPE x [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;">]><Error><Code>&b;</Code></Error>',
    ],
)
def test_bodies_of_any_kind(body: bytes) -> None:
    error = to_error(parse_body(502, {}, body), REQUEST, 0.0)
    assert isinstance(error, Transient)
    assert "\n" not in str(error)
    assert "aaaaaaaaaaaaaaaa" not in str(error)


def test_urls() -> None:
    location, options = parse_url(
        "bucket/a/run%201/?endpoint_url=http://127.0.0.1:9000/&part_size_mib=8&anonymous=true"
    )
    assert (location.bucket, location.prefix) == ("bucket", "a/run%201/")
    assert (options.endpoint_url, options.part_size_bytes, options.anonymous) == (
        "http://127.0.0.1:9000",
        8 << 20,
        True,
    )
    url = format_url(location, options)
    assert url == "s3://bucket/a/run%201?endpoint_url=http://127.0.0.1:9000&anonymous=true&part_size_mib=8"
    assert parse_url(url.removeprefix("s3://")) == (location, options)
    assert parse_url("bucket")[0].prefix == ""
    assert parse_url("bucket")[1] == S3Options()


@pytest.mark.parametrize(
    ("num_connections", "per_node", "num_processes", "limit"),
    [(32, 256, 1, 32), (32, 256, 8, 32), (32, 256, 16, 16), (8, 256, 16, 8), (32, 4, 8, 1)],
)
def test_processes_of_a_node_share_its_connections(
    num_connections: int, per_node: int, num_processes: int, limit: int
) -> None:
    options = S3Options(num_connections=num_connections, num_connections_per_node=per_node)
    assert options.num_requests_max(num_processes) == limit


@pytest.mark.parametrize(("told", "limit"), [("16", 16), ("", 32)])
def test_the_launcher_tells_how_many_processes_a_node_has(
    monkeypatch: pytest.MonkeyPatch, told: str, limit: int
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
    monkeypatch.setattr(s3_store, "_limits", {})
    open_store("s3://bucket/run?anonymous=true&endpoint_url=http://127.0.0.1:9")
    assert [limit.limit for limit in s3_store._limits.values()] == [limit]


def test_an_empty_region_of_the_environment_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.setenv(name, "")
    store = open_store("s3://bucket/run?anonymous=true")
    assert isinstance(store, s3_store.S3Store)
    assert store._bucket._client.endpoint.endswith("amazonaws.com")
    store.close()


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("storage.stores.s3.store", "storage.stores.s3.bucket", "storage.stores.s3.client"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.setitem(sys.modules, "boto3.session", None)
    with pytest.raises(BadURL, match="pip install boto3 s3fs, or install elastic-moe with its extra s3"):
        open_store("s3://bucket/run")


def test_steps_in_urls_with_options() -> None:
    assert layout.split_step_url("s3://b/run/step-000000120?endpoint_url=http://h:1/x") == (
        "s3://b/run?endpoint_url=http://h:1/x",
        "step-000000120/",
    )
    assert layout.split_step_url("s3://b/run?profile=step-000000120") == ("s3://b/run?profile=step-000000120", "")
    assert layout.split_step_url("/a/what?/step-000000120") == ("/a/what?", "step-000000120/")
    assert layout.join_url("s3://b/run?region=x", "step-000000120/") == "s3://b/run/step-000000120?region=x"
    assert layout.join_url("/run", "") == "/run"


def test_options_are_joined() -> None:
    assert with_options("s3://b/r", {}) == "s3://b/r"
    assert with_options("s3://b/r?region=a", {"region": "b", "profile": "p q"}) == "s3://b/r?region=b&profile=p+q"


@given(st.lists(st.binary(max_size=50), max_size=8), st.integers(1, 40))
def test_parts_are_equal_and_whole(pieces: list[bytes], size: int) -> None:
    parts = [b"".join(part) for part in cut([memoryview(piece) for piece in pieces if piece], size)]
    assert b"".join(parts) == b"".join(pieces)
    assert all(len(part) == size for part in parts[:-1])
    assert all(0 < len(part) <= size for part in parts[-1:])


def test_parts_are_never_too_many() -> None:
    assert part_size_bytes(100 << 20, 16 << 20) == 16 << 20
    size = part_size_bytes(1 << 40, 16 << 20)
    assert (1 << 40) / size <= NUM_PARTS_MAX
    assert size % (1 << 20) == 0


def test_the_etag_of_parts() -> None:
    digests = [hashlib.md5(bytes([index])) for index in range(3)]
    whole = hashlib.md5(b"".join(digest.digest() for digest in digests)).hexdigest()
    assert multipart_etag([f'"{digest.hexdigest()}"' for digest in digests]) == f'"{whole}-3"'
    assert multipart_etag(["something-else"]) is None


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"AWS_ACCESS_KEY_ID": "key\n"}, "the access key or the session's token holds a line break"),
        ({"AWS_SESSION_TOKEN": "to ken"}, "the access key or the session's token holds a line break"),
        ({"AWS_PROFILE": "nobody-has-this"}, "no profile 'nobody-has-this'"),
        ({"AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere/token", "AWS_ROLE_ARN": "arn:aws:iam::1:role/x"}, "/nowhere/token"),
        ({"AWS_CONFIG_FILE": __file__}, "Unable to parse config file"),
    ],
)
def test_credentials_that_cannot_be_used_are_told_in_one_line(
    variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "AWS_ROLE_ARN" not in variables:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "hunter2")
    else:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    for name, value in {"AWS_EC2_METADATA_DISABLED": "true", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((BadURL, Denied), match=says) as caught:
        open_store("s3://bucket/run?endpoint_url=http://127.0.0.1:9&region=us-east-1")
    assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_listing_of_what_is_no_bucket_says_where_it_was_looked_for() -> None:
    asked = Request("list", "s3://bucket/run/", "bucket", "https://store.example/bucket")
    error = refusal(404, "NoSuchKey", asked)
    assert isinstance(error, Denied)
    assert "https://store.example/bucket has no bucket 'bucket'" in str(error)
