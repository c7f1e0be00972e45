"""Who gets into an etcd, and what is told of those who do not: TLS, users, wrong endpoints, wrong options."""

from __future__ import annotations

import http.server
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.kv.connect import connect
from tests.certificates import Authority
from tests.cluster import free_port, until
from tests.etcd import LONG_TTL_S, Server, config, connected, etcd, etcdctl, gather, gather_in_spite, options
from tests.template import child_environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "ours")


@pytest.fixture(scope="module")
def secure(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An etcd that wants client certificates, and a user with a password for everything but its own keys."""
    folder = tmp_path_factory.mktemp("secure")
    served, ours = authority.issue("server"), authority.issue("client")
    files = ("--cert-file", served["cert"], "--key-file", served["key"], "--client-cert-auth")
    with etcd(folder, *files, "--trusted-ca-file", served["cacert"], scheme="https") as server:
        with connected(server.endpoint, **ours):
            pass
        (folder / "password").write_text("s3cret-words\n")
        for command in (
            "user add root:s3cret-words --interactive=false",
            "user grant-role root root",
            "user add limited:s3cret-words --interactive=false",
            "role add jobs",
            "user grant-role limited jobs",
            "role grant-permission jobs --prefix=true readwrite /jobs/",
            "auth enable",
        ):
            etcdctl(server, *command.split(), tls=ours)
        yield server


@pytest.fixture
def conf(authority: Authority, secure: Server) -> dict[str, str]:
    folder = secure._folder
    return {**authority.issue("client"), "user": "limited", "password_file": str(folder / "password")}


class TestSecurity:
    def test_a_user_with_rights_on_a_prefix(self, secure: Server, conf: dict[str, str], renewed_often: None) -> None:
        with connected(secure.endpoint, **conf, prefix="/jobs/") as kv:
            watch = kv.watch("/jobs/", 1)
            lease = kv.lease(LONG_TTL_S)
            assert kv.put("/jobs/k", b"1", lease=lease) is not None
            assert len(gather(watch, 1)) == 1
            deadline_s = lease.deadline_s
            until("a renewal", lambda: lease.deadline_s > deadline_s)
            lease.revoke()
            assert [event.entry for event in gather(watch, 1)] == [None]

    def test_authorities_of_the_machine(
        self, secure: Server, conf: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", conf.pop("cacert"))
        with connected(secure.endpoint, **conf, prefix="/jobs/") as kv:
            assert kv.put("/jobs/k", b"1") is not None

    def test_a_token_that_etcd_forgot_is_renewed(self, secure: Server, conf: dict[str, str]) -> None:
        with connected(secure.endpoint, **conf, prefix="/jobs/") as kv:
            watch = kv.watch("/jobs/", 1)
            kv.put("/jobs/k", b"1")
            gather(watch, 1)
            kv._calls._token.value = "expired.1"
            assert kv.put("/jobs/k", b"2") is not None
            kv._calls._token.value = "expired.2"
            watch._drop()
            assert gather_in_spite(watch, 1) == [b"2"]

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"prefix": ""}, r"user limited may not read 'elastic-moe/'"),
            ({"user": "nobody"}, "--rdzv-conf user=nobody: etcd refuses user or password"),
            ({"password_file": "WRONG"}, "--rdzv-conf user=limited: etcd refuses user or password"),
            ({"user": ""}, "may not read|wants one"),
            ({"cacert": "OTHER"}, "its certificate is not accepted: .*self-signed certificate|its certificate"),
            ({"cert": "OTHER", "key": "OTHER"}, "it refuses this client's certificate"),
            ({"cert": "", "key": ""}, "it wants a client certificate; add --rdzv-conf cert=PATH,key=PATH"),
            ({"cert": "", "key": "", "cacert": "", "protocol": "http"}, "it wants TLS; add --rdzv-conf protocol=https"),
        ],
    )
    def test_mistakes(
        self,
        change: dict[str, str],
        told: str,
        secure: Server,
        conf: dict[str, str],
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "wrong").write_text("something else")
        other = Authority(tmp_path, "theirs").issue("client")
        given = {"prefix": "/jobs/", **conf, **change}
        given = {name: other[name] if value == "OTHER" else value for name, value in given.items()}
        given = {name: str(tmp_path / "wrong") if value == "WRONG" else value for name, value in given.items() if value}
        with pytest.raises(UsageError, match=told) as error:
            connect("etcd3", secure.endpoint, options(given), timeout_s=20)
        assert "\n" not in str(error.value)
        assert "s3cret" not in str(error.value) + repr(error.value.__cause__)
        assert capfd.readouterr().err == "", "gRPC says nothing of its own"

    def test_a_password_is_in_no_text_of_a_configuration(self, conf: dict[str, str]) -> None:
        made = config("localhost", **conf)
        assert made.password == "s3cret-words"
        assert "s3cret" not in repr(made)
        assert "PRIVATE KEY" not in repr(made)

    def test_users_where_etcd_has_none(self, server: Server, conf: dict[str, str]) -> None:
        given = {name: conf[name] for name in ("user", "password_file")}
        with pytest.raises(UsageError, match="switched off; leave user out"):
            connect("etcd3", server.endpoint, options(given), timeout_s=20)

    def test_tls_where_etcd_has_none(self, server: Server, conf: dict[str, str]) -> None:
        with pytest.raises(UsageError, match="does not speak TLS"):
            connect("etcd3", server.endpoint, options({"cacert": conf["cacert"]}), timeout_s=20)


class Silent(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """A web server."""
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def mute() -> Iterator[str]:
    """Something that accepts and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


class TestEndpoints:
    @pytest.mark.parametrize(
        ("endpoint", "told"),
        [
            ("127.0.0.1:{free}", "cannot be used: connection refused"),
            ("no-such-host.invalid:2379", "cannot be used: host 'no-such-host.invalid' is unknown"),
            ("{web}", "something else listens there, not an etcd"),
            ("{mute}", "something listens there, but it does not answer as an etcd does"),
            ("127.0.0.1:{free},{web}", "something else listens there, not an etcd"),
            ("", "expected HOST:PORT, such as node-1.example:2379"),
            ("a:1,,b:2", "expected HOST:PORT"),
            ("ftp://a:1", "http:// or https:// only"),
            ("http://a:1,https://b:1", "http and https are mixed"),
        ],
    )
    def test_mistakes(self, endpoint: str, told: str, web: str, mute: str) -> None:
        named = endpoint.format(free=free_port(), web=web, mute=mute)
        waits_in_vain = re.search("refused|unknown|does not answer", told)  # else it is told as soon as it is known
        with pytest.raises(UsageError, match=told) as error:
            connect("etcd3", named, timeout_s=1.2 if waits_in_vain else 60.0)
        assert str(error.value).startswith("--rdzv-endpoint")
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("conf", "told"),
        [
            ({"cacert": "/none"}, "--rdzv-conf cacert=/none: No such file"),
            ({"cacert": __file__}, r"--rdzv-conf cacert=.*: not usable PEM files"),
            ({"protocol": "https", "cert": __file__}, "--rdzv-conf key: a client certificate needs both"),
            ({"protocol": "http", "cacert": __file__}, "has no use without TLS; set protocol=https"),
            ({"user": "me"}, "--rdzv-conf user=me: its password is missing; set ELASTIC_MOE_ETCD_PASSWORD"),
            ({"user": "me", "password_file": "/none"}, "--rdzv-conf password_file=/none: No such file"),
        ],
    )
    def test_options(self, conf: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("ELASTIC_MOE_ETCD_PASSWORD", raising=False)
        with pytest.raises(UsageError, match=told):
            connect("etcd3", "localhost", options(conf), timeout_s=1)

    def test_the_password_may_come_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ELASTIC_MOE_ETCD_PASSWORD", "from-there")
        assert config("h", user="me").password == "from-there"

    def test_endpoints_as_people_write_them(self) -> None:
        assert config("http://a, b:1,a:2379,[::1]").endpoints == (("a", 2379), ("b", 1), ("::1", 2379))
        assert config("https://a/").tls is not None
        assert config("a:1,b:2,c:3").starting_with(2).endpoints == (("c", 3), ("a", 1), ("b", 2))

    def test_one_good_endpoint_is_enough(self, server: Server, mute: str) -> None:
        connection = connect("etcd3", f"127.0.0.1:{free_port()},{mute},{server.endpoint}", timeout_s=20)
        try:
            assert connection.local_address == "127.0.0.1"
            assert connection.kv.put("a", b"1") is not None
        finally:
            connection.close()

    def test_torchs_own_back_end_is_told_apart(self) -> None:
        with pytest.raises(UsageError, match="did you mean etcd3"):
            connect("etcd", "localhost", timeout_s=1)

    def test_loading_grpc_leaves_the_environment_as_it_was(self) -> None:
        probe = (
            "import os; before = dict(os.environ); import launcher.kv.etcd.client; "
            "assert dict(os.environ) == before, set(os.environ) ^ set(before)"
        )
        environment = child_environment()
        done = subprocess.run(
            [sys.executable, "-c", probe], env=environment, capture_output=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
