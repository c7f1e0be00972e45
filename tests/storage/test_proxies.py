"""Stores behind the proxies that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name."""

from __future__ import annotations

import base64
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import open_store
from storage.errors import BadURL, Cause, Denied, StorageError, Transient
from storage.stores import retry_policy
from storage.stores.objects import ObjectStore
from storage.stores.s3.proxies import find_proxy, tunnel_refused
from tests.certificates import Authority
from tests.cluster import free_port
from tests.s3 import BUCKET, S3Server
from tests.storage.forward_proxy import ForwardProxy
from tests.storage.proxy import FaultProxy

PASSWORD = "p@ss:w%rd/hunter2"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def prefix() -> str:
    return f"run-{uuid.uuid4().hex}"


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried again."""
    for cause in Cause:
        monkeypatch.setitem(retry_policy.RULES, cause, retry_policy.Rule(1, 0.0, 0.0, 1.0))  # type: ignore[arg-type]


@pytest.fixture
def tls(juicefs: S3Server, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The gateway behind TLS: its host with port, and the query of its URLs."""
    issued = Authority(tmp_path, "ours").issue("store")
    with FaultProxy(juicefs, issued) as server:
        yield (
            server.endpoint_url.removeprefix("https://"),
            f"endpoint_url={server.endpoint_url}&ca_bundle={issued['cacert']}&part_size_mib=5",
        )


def use(store: ObjectStore) -> None:
    """Put, list, read and delete: requests of ours, those of boto3, and those of an upload in parts."""
    data = memoryview(bytes(range(256)) * (6 << 12))
    for key, content in (("a small one", data[:9]), ("large", data)):
        info = store.put(key, [content[:4], content[4:]], if_absent=True)
        memory = memoryview(bytearray(content.nbytes))
        store.read_into(key, 0, [memory[:5], memory[5:]], if_match=info.etag)
        assert memory == content
    assert [info.key for info in store.list("")] == ["a small one", "large"]
    assert store.info("large").size_bytes == data.nbytes
    for key in ("a small one", "large"):
        store.delete(key)
    assert not store.list("")


@pytest.mark.parametrize("user", ["", "some one"])
def test_http_goes_by_absolute_uri(juicefs: S3Server, prefix: str, user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ForwardProxy(user, PASSWORD if user else "") as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        store = open_store(juicefs.url(prefix) + "&part_size_mib=5")
        use(store)
        assert not store.retries.snapshot().num_by_cause
        seen = list(proxy.seen)
    assert {url.partition("?")[0].startswith(f"{juicefs.endpoint_url}/{BUCKET}") for _, url in seen} == {True}
    methods = [method for method, _ in seen]
    assert {"GET", "PUT", "POST", "HEAD", "DELETE"} == set(methods)
    assert methods.count("PUT") >= 3  # the small one and the parts: nothing went past the proxy


@pytest.mark.parametrize("user", ["", "some one"])
def test_https_goes_through_a_tunnel(
    tls: tuple[str, str], prefix: str, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    netloc, query = tls
    with ForwardProxy(user, PASSWORD if user else "") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        store = open_store(f"s3://{BUCKET}/{prefix}?{query}")
        use(store)
        assert not store.retries.snapshot().num_by_cause
        assert len(proxy.seen) >= 2  # boto3's and ours
        assert set(proxy.seen) == {("CONNECT", netloc)}


@pytest.mark.parametrize("named", ["other.example,127.0.0.1", "*", "{netloc}"])
def test_who_is_in_no_proxy_is_reached_without(
    juicefs: S3Server, prefix: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", named.format(netloc=juicefs.endpoint_url.removeprefix("http://")))
    use(open_store(juicefs.url(prefix) + "&part_size_mib=5"))


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("user", ["someone", "h"])
@pytest.mark.usefixtures("once")
def test_a_proxy_that_is_down_is_named_without_its_password(
    juicefs: S3Server, scheme: str, user: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "storage")
    place = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://{user}:hunter2@{place}")
    endpoint = juicefs.endpoint_url.replace("http:", f"{scheme}:")
    store = open_store(f"s3://{BUCKET}/run?endpoint_url={endpoint}")
    for call in (lambda: store.read("k"), lambda: store.list("")):
        with pytest.raises(Transient, match=f"the proxy http://{place} of {endpoint} cannot be reached") as caught:
            call()
        assert caught.value.cause is Cause.UNREACHABLE
        assert f"check {scheme.upper()}_PROXY and NO_PROXY" in str(caught.value)
        check_secrets(str(caught.value))
    check_secrets(" ".join(record.getMessage() for record in caplog.records))


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.usefixtures("once")
def test_a_wrong_password_is_told_in_one_line(juicefs: S3Server, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ForwardProxy("someone", "another") as proxy:
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", proxy.url.replace("another", "hunter2"))
        store = open_store(juicefs.url("run").replace("http:", f"{scheme}:"))
        for call in (lambda: store.read("k"), lambda: store.info("k"), lambda: store.list("")):
            with pytest.raises(Denied, match=r"wants another user and password \(HTTP 407\)") as caught:
                call()
            assert f"{scheme.upper()}_PROXY" in str(caught.value)
            check_secrets(str(caught.value))
        assert not proxy.seen


@pytest.mark.parametrize(("status", "kind"), [(403, Denied), (502, Transient)])
@pytest.mark.usefixtures("once")
def test_a_proxy_that_makes_no_tunnel_is_named(
    juicefs: S3Server, status: int, kind: type[StorageError], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ForwardProxy(refuse_status=status) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        store = open_store(juicefs.url("run").replace("http:", "https:"))
        for call in (lambda: store.read("k"), lambda: store.list("")):
            with pytest.raises(kind, match=rf"the proxy http://{proxy.netloc} .*HTTP {status}"):
                call()


def check_secrets(text: str) -> None:
    assert "\n" not in text
    assert "hunter2" not in text
    assert base64.b64encode(b"hunter2").decode()[:8] not in text
    assert "Basic" not in text


def found(url: str, scheme: str = "https", bypassed: bool = False) -> object:
    return find_proxy(scheme, "bucket.s3.example:443", {scheme: url}, lambda netloc: bypassed)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("http://proxy:3128", ("proxy", 3128)),
        ("proxy:3128", ("proxy", 3128)),
        ("//proxy", ("proxy", 80)),
        ("http://someone:hunter2@[::1]:3128/", ("::1", 3128)),
    ],
)
def test_the_url_of_a_proxy(url: str, place: tuple[str, int]) -> None:
    proxy = find_proxy("http", "s3.example", {"http": url}, lambda netloc: False)
    assert proxy is not None
    assert (proxy.host, proxy.port, proxy.variable) == (*place, "HTTP_PROXY")
    expected = {"Proxy-Authorization": "Basic c29tZW9uZTpodW50ZXIy"} if "@" in url else {}
    assert proxy.headers == expected
    for text in (str(proxy), repr(proxy), str(tunnel_refused(proxy, "https://s3.example:443", 407))):
        check_secrets(text)


def test_no_proxy_of_the_scheme_or_none_for_the_host() -> None:
    assert find_proxy("https", "s3.example", {"http": "http://proxy"}, lambda netloc: False) is None
    assert found("") is None
    assert found("socks5://proxy", bypassed=True) is None  # what is not used need not be right


@pytest.mark.parametrize(
    "url", ["http://someone:hun/ter2@proxy:3128", "http://someone:hunter2@", "http://:hunter2@proxy:x", "http://[proxy"]
)
def test_what_is_no_url_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(
        BadURL, match=r"HTTPS_PROXY is no URL of a proxy.*http://\[user:password@\]host\[:port\]"
    ) as caught:
        found(url)
    check_secrets(str(caught.value))
    assert "ter2" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("scheme", ["https", "socks5"])
def test_other_proxies_are_refused(scheme: str) -> None:
    with pytest.raises(BadURL, match=f"HTTPS_PROXY names a proxy by {scheme}://, but only http://") as caught:
        found(f"{scheme}://someone:hunter2@proxy:3128")
    check_secrets(str(caught.value))
