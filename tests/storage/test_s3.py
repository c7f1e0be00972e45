"""Checkpoints on real S3 servers: saved and restored by several ranks, looked at, read by stock DCP and from it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import botocore
import pytest
from botocore.session import Session

from elastic_moe.cli.main import main
from storage import inspection, open_store
from storage.errors import Denied, StorageError, Transient
from storage.stores.s3 import client
from storage.stores.s3.options import S3Options
from tests.certificates import Authority
from tests.ranks import Ranks
from tests.s3 import BUCKET, S3Server
from tests.storage import s3_cases
from tests.storage.proxy import FaultProxy


@pytest.fixture
def prefix() -> str:
    return f"run-{uuid.uuid4().hex}"


@pytest.fixture(params=["juicefs", "moto"])
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(request.param)
    return found


def test_saved_by_three_ranks_restored_by_two(server: S3Server, prefix: str, ranks: Ranks) -> None:
    url = f"s3://{BUCKET}/{prefix}"  # the endpoint comes from the environment
    events = ranks.run(s3_cases.save_steps, url, server.environment, [10, 20, 30], world_size=3)
    names = [name for name, _ in events[0]]
    assert names.count("checkpoint_committed") == 3
    assert ("checkpoint_unconditional" in names) == (server.kind == "juicefs")
    assert not [fields for rank in events for name, fields in rank if name == "checkpoint_failed"]
    assert ranks.run(s3_cases.restore, url, server.environment, world_size=2) == [(30, True)] * 2
    location = inspection.locate(server.url(prefix))
    assert [row.step for row in inspection.summaries(location)] == [30, 20]
    assert not inspection.verify(location.store, "step-000000030/").problems


def test_stock_dcp_on_s3fs_reads_ours(juicefs: S3Server, prefix: str, ranks: Ranks) -> None:
    url = f"s3://{BUCKET}/{prefix}"
    ranks.run(s3_cases.save_steps, url, juicefs.environment, [10], world_size=2)
    loaded = ranks.run(s3_cases.load_with_stock, f"{url}/step-000000010", juicefs.environment, 10, world_size=2)
    assert loaded == [True, True]
    assert ranks.run(s3_cases.restore, f"fsspec+{url}", juicefs.environment, world_size=1) == [(10, True)]


def test_what_stock_dcp_writes_on_s3fs_is_read(moto: S3Server, prefix: str, ranks: Ranks) -> None:
    """Not on JuiceFS's gateway, which refuses the DeleteObjects that s3fs renames with."""
    url = f"s3://{BUCKET}/{prefix}"
    ranks.run(s3_cases.save_with_stock, f"{url}/step-000000020", moto.environment, 20, world_size=2)
    assert ranks.run(s3_cases.restore, url, moto.environment, world_size=3) == [(20, True)] * 3
    assert ranks.run(s3_cases.restore, f"fsspec+{url}", moto.environment, world_size=1) == [(20, True)]


def test_looked_at_from_the_command_line(
    juicefs: S3Server, prefix: str, ranks: Ranks, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.run(s3_cases.save_steps, juicefs.url(prefix), juicefs.environment, [10], world_size=2)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    url, options = f"s3://{BUCKET}/{prefix}", ("--endpoint-url", juicefs.endpoint_url)
    assert main(["ckpt", "ls", url, *options, "--json"]) == 0
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["committed"]
    assert main(["ckpt", "show", f"{url}/step-000000010", *options]) == 0
    assert "sharded" in capsys.readouterr().out
    assert main(["ckpt", "verify", url, *options]) == 0
    assert "good" in capsys.readouterr().out
    store = open_store(juicefs.url(prefix))
    (victim,) = (info.key for info in store.list("") if info.key.endswith("__1_0.distcp"))
    data = bytearray(store.read(victim))
    data[len(data) // 2] ^= 1
    store.put(victim, [data])
    assert main(["ckpt", "verify", url, *options]) == 1
    assert "checksum" in capsys.readouterr().out
    assert main(["ckpt", "ls", f"{url}-nothing", *options]) == 2
    assert f"no checkpoint at {url}-nothing" in capsys.readouterr().err
    assert main(["ckpt", "ls", "/tmp", "--profile", "x"]) == 2
    assert "--profile is for s3:// URLs" in capsys.readouterr().err


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(Denied) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert "wrong-secret" not in text
    assert "Signature=" not in text
    return text


OPERATIONS = ("info", "read", "list", "folders", "delete", "put")


def operate(url: str, operation: str) -> Callable[[], object]:
    store = open_store(url)
    if operation == "put":
        return lambda: store.put("k", [b"x"])
    return lambda: getattr(store, operation)("" if operation in ("list", "folders") else "k")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_refusals_are_told_in_one_line(juicefs: S3Server, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = f"s3://nowhere/run?endpoint_url={juicefs.endpoint_url}"
    assert "there is no bucket 'nowhere'" in refused(operate(nowhere, operation))
    url = juicefs.url("run")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    assert "the secret key does not fit" in refused(operate(url, operation))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert "does not know the access key" in refused(operate(url, operation))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no credentials for s3://" in refused(lambda: operate(url, operation)())
    assert "refused" in refused(operate(url + "&anonymous=true", operation))
    assert Denied.exit_code == 2, "these are the user's mistakes"


def test_options_reach_the_server(juicefs: S3Server, moto: S3Server, prefix: str) -> None:
    url = moto.url(prefix) + "&storage_class=STANDARD_IA&sse=AES256&sign_payload=always"
    store = open_store(url)
    data = bytes(17 << 20)
    for key, content in (("small", b"x"), ("large", data)):
        store.put(key, [content])
        assert store.read(key) == content
    assert _heads(moto, prefix) == {"small": ("STANDARD_IA", "AES256"), "large": ("STANDARD_IA", "AES256")}
    refusing = open_store(juicefs.url(prefix) + "&sse=AES256")
    assert "check storage_class and sse" in refused(lambda: refusing.put("small", [b"x"]))


def _heads(server: S3Server, prefix: str) -> dict[str, tuple[str, str]]:
    import boto3

    client = boto3.client("s3", endpoint_url=server.endpoint_url)
    heads = {key: client.head_object(Bucket=BUCKET, Key=f"{prefix}/{key}") for key in ("small", "large")}
    return {key: (head["StorageClass"], head["ServerSideEncryption"]) for key, head in heads.items()}


def test_nobody_there(monkeypatch: pytest.MonkeyPatch, juicefs: S3Server) -> None:
    from storage.errors import Cause
    from storage.stores import retry_policy
    from tests.cluster import free_port

    for cause in Cause:
        monkeypatch.setitem(retry_policy.RULES, cause, retry_policy.Rule(2, 0.0, 0.0, 60.0))  # type: ignore[arg-type]
    for host, says in ((f"127.0.0.1:{free_port()}", "cannot be reached"), ("no.such.host.invalid", "does not resolve")):
        store = open_store(f"s3://{BUCKET}/run?endpoint_url=http://{host}")
        with pytest.raises(Transient, match=says) as caught:
            store.read("k")
        assert caught.value.cause is Cause.UNREACHABLE
        with pytest.raises(Transient):
            store.list("")
        assert store.retries.snapshot().num_by_cause == {"unreachable": 2}


@pytest.fixture
def tls(juicefs: S3Server, tmp_path: Path) -> Iterator[tuple[FaultProxy, str]]:
    """The gateway behind TLS, and the file of the authority that it is signed by."""
    issued = Authority(tmp_path, "ours").issue("store")
    with FaultProxy(juicefs, issued) as proxy:
        yield proxy, issued["cacert"]


@pytest.mark.parametrize("way", ["option", "environment"])
def test_over_tls_with_an_authority_of_ones_own(
    tls: tuple[FaultProxy, str], prefix: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, authority = tls
    if way == "environment":
        monkeypatch.setenv("AWS_CA_BUNDLE", authority)
    store = open_store(proxy.url(prefix, **({"ca_bundle": authority} if way == "option" else {})))
    data = memoryview(bytes(range(256)) * (6 << 12))
    for key in ("small", "large"):
        content = data[:9] if key == "small" else data
        info = store.put(key, [content[:4], content[4:]], if_absent=True)
        memory = memoryview(bytearray(content.nbytes))
        store.read_into(key, 0, [memory[:5], memory[5:]], if_match=info.etag)
        assert memory == content
    assert [info.key for info in store.list("")] == ["large", "small"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_certificate_that_is_not_trusted_is_told_in_one_line(tls: tuple[FaultProxy, str], operation: str) -> None:
    text = refused(operate(tls[0].url("run"), operation))
    assert "ca_bundle" in text


def test_a_ca_bundle_that_is_not_there_is_told_in_one_line(tls: tuple[FaultProxy, str], tmp_path: Path) -> None:
    url = tls[0].url("run", ca_bundle=tmp_path / "nothing.pem")
    with pytest.raises(StorageError, match=r"ca_bundle .*nothing\.pem cannot be read") as caught:
        open_store(url)
    assert "\n" not in str(caught.value)


def test_tls_where_there_is_none(juicefs: S3Server) -> None:
    url = f"s3://{BUCKET}/run?endpoint_url={juicefs.endpoint_url.replace('http:', 'https:')}"
    assert "is it http://?" in refused(operate(url, "read"))


def test_what_one_client_hears_of_its_requests_is_no_other_ones() -> None:
    """They begin with the same handlers, botocore's own, which are registered once for all."""

    def handlers(session: Session, event: str) -> list[object]:
        return list(session.get_component("event_emitter")._emitter._handlers.prefix_search(event))

    first, second, theirs = client._session(None), client._session(None), Session()
    for event in ("choose-signer.s3.GetObject", "creating-client-class.s3", "before-parameter-build.s3.GetObject"):
        assert handlers(first, event) == handlers(theirs, event)
    heard: list[object] = []
    first.register("before-send.s3", lambda **told: heard.append(told))
    for session in (first, second):
        session.get_component("event_emitter").emit("before-send.s3", request=None)
    assert len(heard) == 1


def test_what_is_told_of_each_session_hears_of_its_requests_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As plugins have it (`botocore.register_initializer`), which are not among the handlers that all begin with."""
    heard: list[str] = []
    monkeypatch.setattr(botocore, "_INITIALIZERS", [])
    botocore.register_initializer(
        lambda session: session.register("before-send.s3", lambda event_name, **told: heard.append(event_name))
    )
    client._handlers.cache_clear()
    try:
        client._session(None).get_component("event_emitter").emit("before-send.s3.GetObject", request=None)
    finally:
        client._handlers.cache_clear()
    assert heard == ["before-send.s3.GetObject"]


def test_a_profile_is_used(juicefs: S3Server, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(f"{tmp_path}/credentials", "w") as file:
        file.write(f"[ours]\naws_access_key_id = {juicefs.access_key}\naws_secret_access_key = {juicefs.secret_key}\n")
    with open(f"{tmp_path}/config", "w") as file:
        file.write(f"[profile ours]\nregion = us-east-1\nendpoint_url = {juicefs.endpoint_url}\n")
    for name in juicefs.environment:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", f"{tmp_path}/credentials")
    monkeypatch.setenv("AWS_CONFIG_FILE", f"{tmp_path}/config")
    store = open_store(f"s3://{BUCKET}/{prefix}?profile=ours")
    store.put("k", [b"x"])
    assert store.read("k") == b"x"
    assert store.url == f"s3://{BUCKET}/{prefix}?profile=ours"


def test_credentials_that_a_program_gives_are_refreshed(
    juicefs: S3Server, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`credential_process` stands for every role: the same refreshable credentials, asked for anew when they end."""
    script = f"""#!/bin/sh
echo x >> {tmp_path}/calls
echo '{{"Version": 1, "AccessKeyId": "{juicefs.access_key}", "SecretAccessKey": "{juicefs.secret_key}",\
 "Expiration": "'$(date -u -d '+60 seconds' +%Y-%m-%dT%H:%M:%SZ)'"}}'
"""
    with open(f"{tmp_path}/give", "w") as file:
        file.write(script)
    with open(f"{tmp_path}/config", "w") as file:
        file.write(f"[default]\ncredential_process = sh {tmp_path}/give\nregion = us-east-1\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", f"{tmp_path}/config")
    store = open_store(juicefs.url(prefix))
    for number in range(3):  # less than ten minutes before their end they are renewed for every request
        store.put("k", [str(number).encode()])
        assert store.read("k") == str(number).encode()
    with open(f"{tmp_path}/calls") as calls:
        assert len(calls.readlines()) >= 6


@pytest.mark.parametrize("control", [False, True])
def test_a_file_of_credentials_that_is_written_anew_is_read_once_the_old_ones_are_refused(
    juicefs: S3Server, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, control: bool
) -> None:
    def write(secret: str) -> None:
        (tmp_path / "credentials").write_text(
            f"[default]\naws_access_key_id = {juicefs.access_key}\naws_secret_access_key = {secret}\n"
        )

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    write("of-yesterday")
    store = open_store(juicefs.url(prefix))
    assert "the secret key does not fit" in refused(lambda: store.read("k"))
    write(juicefs.secret_key)
    if control:  # which botocore signs
        assert store.list("") == []
    store.put("k", [b"x"])
    assert store.read("k") == b"x"
    assert store.list("")[0].key == "k"


def test_many_pages(juicefs: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from storage.stores.s3 import client

    store = open_store(juicefs.url(prefix))
    keys = sorted(f"step-{n % 3}/x{n}" for n in range(12))
    for key in keys:
        store.put(key, [key.encode()])
    monkeypatch.setattr(client, "PAGE_SIZE", 5)
    assert [info.key for info in store.list("")] == keys
    monkeypatch.setattr(client, "PAGE_SIZE", 2)
    assert store.folders("") == ["step-0", "step-1", "step-2"]


def test_defaults_of_the_options_are_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "storage.md").read_text()
    for name, field in S3Options.model_fields.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        default = field.default
        if default is not None and not isinstance(default, bool):
            value = row.split("|")[2].split(",")[0].strip().strip("`")
            assert value == (f"{default:g}" if isinstance(default, (int, float)) else default)


def test_the_table_of_retries_is_documented() -> None:
    from storage.stores.retry_policy import RULES

    page = (Path(__file__).parents[2] / "docs" / "storage.md").read_text()
    for cause, rule in RULES.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{cause.value}` |")]
        cells = [cell.strip() for cell in row.split("|")[3:7]]
        assert cells == [str(rule.num_tries), f"{rule.wait_s:g}", f"{rule.wait_s_max:g}", f"{rule.deadline_s:g}"]
