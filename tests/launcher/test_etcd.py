"""What only etcd can do wrong: members that die or freeze, history that is compacted, TLS, users, wrong endpoints."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_moe.cli.run import _parse
from elastic_moe.errors import UserError
from launcher.errors import Compacted, KVUnavailable, UsageError
from launcher.kv.connect import connect
from launcher.kv.etcd import EtcdKV, _span
from launcher.kv.etcd_config import EtcdConfig
from launcher.kv.etcd_transport import etcdrpc
from launcher.member import Member
from launcher.membership import Node, Rules
from tests.certificates import Authority
from tests.cluster import cluster, free_port, read_lines, until
from tests.etcd import Server, client, config, etcd, etcd_cluster, etcdctl, gather

SCRIPTS = Path(__file__).parent / "scripts"
COOPERATIVE, PLAIN, FAILS = (str(SCRIPTS / name) for name in ("cooperative.py", "plain.py", "fails.py"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with etcd(tmp_path_factory.mktemp("etcd")) as made:
        client(made.endpoint).close()
        yield made


@contextlib.contextmanager
def connected(endpoint: str, **conf: str) -> Iterator[EtcdKV]:
    kv = client(endpoint, conf)
    try:
        yield kv
    finally:
        kv.close()


def put_when_possible(kv: EtcdKV, key: str, value: bytes) -> None:
    """Write although members come and go, as a `Member` does."""

    def attempt() -> bool:
        with contextlib.suppress(KVUnavailable):
            return kv.put(key, value) is not None
        return False

    until(f"{key} is written", attempt, 30)


def gather_in_spite(watch, num: int) -> list[bytes | None]:
    """The values of the next `num` events, over as many interruptions as it takes."""
    got: list[bytes | None] = []

    def more() -> bool:
        with contextlib.suppress(KVUnavailable):
            got.extend(event.entry.value if event.entry else None for event in watch.next(1.0))
        return len(got) >= num

    until(f"{num} events", more, 30)
    return got


class TestKeys:
    @pytest.mark.parametrize(
        ("prefix", "span"),
        [
            (b"a/", (b"a/", b"a0")),
            (b"", (b"\0", b"\0")),
            (b"a\xff", (b"a\xff", b"b")),
            (b"\xff\xff", (b"\xff\xff", b"\0")),
        ],
    )
    def test_the_range_of_a_prefix(self, prefix: bytes, span: tuple[bytes, bytes]) -> None:
        assert _span(prefix) == span

    def test_a_client_keeps_to_its_namespace(self, server: Server) -> None:
        with connected(server.endpoint, prefix="/team-a/") as one, connected(server.endpoint, prefix="/team-b/") as two:
            one.put("k", b"1")
            assert two.get("k") is None
            assert [entry.key for entry in one.list("").entries] == ["k"]
            assert "/team-a/k" in etcdctl(server, "get", "--prefix", "/team-a/")

    def test_a_lease_says_what_was_granted(self, server: Server) -> None:
        with connected(server.endpoint) as kv:
            assert [kv.lease(ttl_s).ttl_s for ttl_s in (0.3, 2.0, 2.5)] == [2.0, 2.0, 3.0]


class TestRun:
    """`elastic-moe run` on it."""

    def test_a_lost_node(self, server: Server, tmp_path: Path) -> None:
        with cluster(tmp_path / "nodes") as nodes:
            nodes.endpoint = f"127.0.0.1:{free_port()},{server.endpoint}"
            options = ("--rdzv-backend", "etcd3", "--rdzv-id", uuid.uuid4().hex, COOPERATIVE, str(tmp_path))
            pair = [nodes.start(name, *options, conf="last_call=60") for name in ("first", "second")]
            until("steps on two nodes", lambda: read_lines(tmp_path / "steps.jsonl")[5:])
            pair[0].kill()
            nodes.wait_event("round_formed", world_size=1)
            (tmp_path / "finish").touch()
            assert pair[1].wait() == 0, pair[1].output

    def test_a_run_id_is_good_again_after_a_failure_and_not_after_success(self, server: Server, tmp_path: Path) -> None:
        with cluster(tmp_path / "nodes") as nodes:
            nodes.endpoint = server.endpoint
            options = ("--rdzv-backend", "etcd3", "--rdzv-id", uuid.uuid4().hex)
            (tmp_path / "finish").touch()
            assert nodes.start("fails", *options, FAILS, "2", nnodes="1").wait() == 2
            for name in ("succeeds", "comes late"):
                again = nodes.start(name, *options, PLAIN, str(tmp_path), nnodes="1")
                assert again.wait() == 0, again.output
            assert [s["GENERATION"] for s in read_lines(tmp_path / "started.jsonl")] == [1]

    def test_jobs_that_share_an_etcd_need_a_name(self) -> None:
        with pytest.raises(UserError, match="--rdzv-id"):
            _parse(["--rdzv-backend", "etcd3", "--rdzv-endpoint", "h", FAILS, "0"])
        with pytest.raises(UserError, match="--rdzv-endpoint: etcd3 needs HOST:PORT"):
            _parse(["--rdzv-backend", "etcd3", "--rdzv-id", "j", FAILS, "0"])
        with pytest.raises(UserError, match="did you mean etcd3"):
            _parse(["--rdzv-backend", "etcd", FAILS, "0"])


class TestFaults:
    def test_a_cluster_whose_leader_is_killed(self, tmp_path: Path) -> None:
        with etcd_cluster(tmp_path) as members:
            leader = next(m for m in members if "true" in leader_of(m, members))
            others = [m for m in members if m is not leader]
            named = ",".join(m.endpoint for m in (leader, *others))
            with connected(named) as kv:
                watch = kv.watch("w/", 1)
                lease = kv.lease(8)
                kv.put("w/leased", b"1", lease=lease)
                gather(watch, 1)
                leader.kill()
                renewed_s = lease.deadline_s
                put_when_possible(kv, "w/after", b"2")
                assert gather_in_spite(watch, 1) == [b"2"], "once, and the leased key is still there"
                until("the lease is renewed by another member", lambda: lease.deadline_s > renewed_s + 2, 20)
                assert not lease.lost.is_set()
                lease.revoke()
                assert gather_in_spite(watch, 1) == [None]

    def test_a_frozen_member_is_left(self, tmp_path: Path) -> None:
        with etcd_cluster(tmp_path) as members:
            follower = next(m for m in members if "true" not in leader_of(m, members))
            named = ",".join(m.endpoint for m in sorted(members, key=lambda m: m is not follower))
            with connected(named) as kv:
                watch = kv.watch("w/", 1)
                kv.put("w/before", b"1")
                gather(watch, 1)
                lease = kv.lease(5)
                follower.signal(signal.SIGSTOP)
                try:
                    put_when_possible(kv, "w/after", b"2")
                    assert gather_in_spite(watch, 1) == [b"2"]
                    renewed_s = lease.deadline_s
                    until("the lease is renewed", lambda: lease.deadline_s > renewed_s, 20)
                finally:
                    follower.signal(signal.SIGCONT)

    def test_a_watch_goes_on_after_etcd_was_away(self, tmp_path: Path) -> None:
        with etcd(tmp_path) as server, connected(server.endpoint) as kv:
            watch = kv.watch("w/", 1)
            kv.put("w/1", b"1")
            gather(watch, 1)
            server.kill()
            with pytest.raises(KVUnavailable, match="interrupted before revision 3"):
                watch.next(10)
            with pytest.raises(KVUnavailable, match="etcd at 127"):
                kv.get("w/1")
            server.start()
            put_when_possible(kv, "w/2", b"2")
            assert gather_in_spite(watch, 1) == [b"2"]

    def test_a_lease_of_an_etcd_that_stays_away_is_lost_in_time(self, tmp_path: Path) -> None:
        with etcd(tmp_path) as server, connected(server.endpoint) as kv:
            lease = kv.lease(2)
            server.signal(signal.SIGSTOP)
            assert lease.lost.wait(10)
            assert lease.deadline_s <= time.monotonic(), "not before it surely ended"
            server.signal(signal.SIGCONT)

    def test_compacted_history_is_told_and_a_member_goes_on(self, tmp_path: Path) -> None:
        with etcd(tmp_path) as server, connected(server.endpoint) as kv, connected(server.endpoint) as other:
            member = start_member(kv, "watcher")
            try:
                until("it waits for one more node", lambda: len(member.nodes()) == 1)
                stale = kv.watch("", 1)
                server.signal(signal.SIGSTOP)  # the member's stream hangs while history goes on without it
                server.signal(signal.SIGCONT)
                for number in range(3):
                    other.put("filler", str(number).encode())
                revision = other.list("").revision
                etcdctl(server, "compact", str(revision))
                with pytest.raises(Compacted, match=f"revision 1 is forgotten; the oldest kept is {revision}"):
                    gather(stale, 1)
                member._watch._next_revision = 1  # as if it had been cut off since then
                member._watch._drop()
                second = start_member(other, "second")
                try:
                    assert len(member.wait_round(20).participants) == 2
                finally:
                    second.leave()
            finally:
                member.leave()


def leader_of(member: Server, members: list[Server]) -> str:
    """The line of `etcdctl endpoint status` of a member of a cluster that has a leader."""
    for each in members:
        client(each.endpoint).close()
    columns = etcdctl(member, "endpoint", "status").split(", ")
    return columns[4]


def start_member(kv: EtcdKV, name: str) -> Member:
    node = Node(node_id=name, host=name, address="127.0.0.1", port=1, slots=1)
    rules = Rules(min_nodes=2, max_nodes=2)
    member = Member(kv, "test", node, rules, lambda slots, previous: None, lambda *a, **k: None, lease_ttl_s=2)
    member.start()
    return member


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "ours")


@pytest.fixture(scope="module")
def secure(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An etcd that wants client certificates, and a user with a password for everything but its own keys."""
    folder = tmp_path_factory.mktemp("secure")
    served, ours = authority.issue("server"), authority.issue("client")
    options = ("--cert-file", served["cert"], "--key-file", served["key"], "--client-cert-auth")
    with etcd(folder, *options, "--trusted-ca-file", served["cacert"], scheme="https") as server:
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
    def test_a_user_with_rights_on_a_prefix(self, secure: Server, conf: dict[str, str]) -> None:
        with connected(secure.endpoint, **conf, prefix="/jobs/") as kv:
            watch = kv.watch("", 1)
            lease = kv.lease(2)
            assert kv.put("k", b"1", lease=lease) is not None
            assert len(gather(watch, 1)) == 1
            deadline_s = lease.deadline_s
            until("a renewal", lambda: lease.deadline_s > deadline_s)
            lease.revoke()
            assert [event.entry for event in gather(watch, 1)] == [None]

    def test_a_token_that_etcd_forgot_is_renewed(self, secure: Server, conf: dict[str, str]) -> None:
        with connected(secure.endpoint, **conf, prefix="/jobs/") as kv:
            watch = kv.watch("", 1)
            kv.put("k", b"1")
            gather(watch, 1)
            kv._calls._token.value = "expired.1"
            assert kv.put("k", b"2") is not None
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
            connect("etcd3", secure.endpoint, given, local_addr=None, timeout_s=20)
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
            connect("etcd3", server.endpoint, given, local_addr=None, timeout_s=20)

    def test_tls_where_etcd_has_none(self, server: Server, conf: dict[str, str]) -> None:
        with pytest.raises(UsageError, match="does not speak TLS"):
            connect("etcd3", server.endpoint, {"cacert": conf["cacert"]}, local_addr=None, timeout_s=20)


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
        with pytest.raises(UsageError, match=told) as error:
            connect("etcd3", named, {}, local_addr=None, timeout_s=1.2)
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
            connect("etcd3", "localhost", conf, local_addr=None, timeout_s=1)

    def test_the_password_may_come_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ELASTIC_MOE_ETCD_PASSWORD", "from-there")
        assert config("h", user="me").password == "from-there"

    def test_endpoints_as_people_write_them(self) -> None:
        assert config("http://a, b:1,a:2379,[::1]").endpoints == (("a", 2379), ("b", 1), ("::1", 2379))
        assert config("https://a/").tls is not None
        assert config("a:1,b:2,c:3").starting_with(2).endpoints == (("c", 3), ("a", 1), ("b", 2))

    def test_one_good_endpoint_is_enough(self, server: Server, mute: str) -> None:
        connection = connect(
            "etcd3", f"127.0.0.1:{free_port()},{mute},{server.endpoint}", {}, local_addr=None, timeout_s=20
        )
        try:
            assert connection.local_address == "127.0.0.1"
            assert connection.kv.put("a", b"1") is not None
        finally:
            connection.close()

    def test_torchs_own_back_end_is_told_apart(self) -> None:
        with pytest.raises(UsageError, match="did you mean etcd3"):
            connect("etcd", "localhost", {}, local_addr=None, timeout_s=1)

    def test_loading_grpc_leaves_the_environment_as_it_was(self) -> None:
        probe = (
            "import os; before = dict(os.environ); import launcher.kv.etcd; "
            "assert dict(os.environ) == before, set(os.environ) ^ set(before)"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", probe], env=environment, capture_output=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_conditional_write_is_not_sent_twice() -> None:
    """Sent again after an answer was lost, it would find its own effect and report a lost race."""
    kv = EtcdKV(EtcdConfig(endpoints=(("127.0.0.1", free_port()), ("127.0.0.1", free_port()))))
    sent: list[int] = []

    def call_on(peer) -> object:
        def call(request: object, **options: object) -> object:
            sent.append(peer.index)
            return peer.kv.Range(request, **options)

        return call

    try:
        for repeatable, expected in ((False, [0]), (True, [1, 0])):
            sent.clear()
            with pytest.raises(KVUnavailable):
                kv._calls.call(call_on, etcdrpc.RangeRequest(key=b"k"), repeatable=repeatable)
            assert sent == expected
    finally:
        kv.close()
