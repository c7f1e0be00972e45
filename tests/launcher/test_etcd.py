"""What only etcd can do wrong: members that die or freeze, history that is compacted."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_moe.cli.run import _parse
from elastic_moe.errors import UserError
from launcher.coordination.member import Member
from launcher.errors import Compacted, KVUnavailable
from launcher.kv.connect import connect
from launcher.kv.etcd.client import EtcdKV, _span, renewal_times
from launcher.kv.etcd.config import EtcdConfig
from launcher.kv.etcd.transport import etcdrpc
from launcher.kv.lease import Lease
from launcher.kv.options import StoreOptions
from launcher.node.registration import YIELD_FRACTION
from launcher.rounds.membership import Rules
from launcher.rounds.records import LEFT_AT_ONCE, Node
from tests.cluster import cluster, free_port, read_lines, until
from tests.etcd import (
    LONG_TTL_S,
    Server,
    answers_withheld,
    connected,
    etcd,
    etcd_cluster,
    etcdctl,
    gather,
    gather_in_spite,
    grpc_proxy,
    leader_of,
    put_when_possible,
    when_possible,
)

SCRIPTS = Path(__file__).parent / "scripts"
COOPERATIVE, PLAIN, FAILS = (str(SCRIPTS / name) for name in ("cooperative.py", "plain.py", "fails.py"))

pytestmark = pytest.mark.slow


class TestKeys:
    @pytest.mark.parametrize(
        ("prefix", "span"),
        [
            ("a/", (b"a/", b"a0")),
            ("", (b"\0", b"\0")),
            ("a\U0010ffff", (b"a\xf4\x8f\xbf\xbf", b"a\xf4\x8f\xbf\xc0")),
        ],
    )
    def test_the_range_of_a_prefix(self, prefix: str, span: tuple[bytes, bytes]) -> None:
        assert _span(prefix) == span

    def test_a_client_keeps_to_its_namespace(self, server: Server) -> None:
        first, second = StoreOptions(prefix="/team-a/"), StoreOptions(prefix="/team-b/")
        with connect("etcd3", server.endpoint, first) as one, connect("etcd3", server.endpoint, second) as two:
            one.kv.put("k", b"1")
            assert two.kv.get("k") is None
            assert [entry.key for entry in one.kv.list("").entries] == ["k"]
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
            pair = [nodes.start(name, *options, conf="last_call=60,lease_ttl=30") for name in ("first", "second")]
            until("steps on two nodes", lambda: read_lines(tmp_path / "steps.jsonl")[5:])
            pair[0].kill()
            nodes.wait_event("round_formed", world_size=1)
            (tmp_path / "finish").touch()
            assert pair[1].wait() == 0, pair[1].output

    def test_a_run_id_is_good_again_after_a_failure_and_not_after_success(self, server: Server, tmp_path: Path) -> None:
        with cluster(tmp_path / "nodes") as nodes:
            nodes.endpoint = server.endpoint
            options = ("--rdzv-backend", "etcd3", "--rdzv-id", uuid.uuid4().hex, "--cold-workers")
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
    def test_a_cluster_whose_leader_is_killed(self, tmp_path: Path, renewed_often: None) -> None:
        with etcd_cluster(tmp_path) as members:
            leader = leader_of(members)
            others = [m for m in members if m is not leader]
            named = ",".join(m.endpoint for m in (leader, *others))
            with connected(named) as kv:
                watch = kv.watch("w/", 1)
                lease = when_possible("a lease", lambda: kv.lease(LONG_TTL_S))
                put_when_possible(kv, "w/leased", b"1", lease)
                assert gather_in_spite(watch, 1) == [b"1"]
                leader.kill()
                renewed_s = lease.deadline_s
                put_when_possible(kv, "w/after", b"2")
                assert gather_in_spite(watch, 1) == [b"2"], "once, and the leased key is still there"
                until("the lease is renewed by another member", lambda: lease.deadline_s > renewed_s + 2)
                assert not lease.lost.is_set()
                lease.revoke()
                assert gather_in_spite(watch, 1) == [None]

    def test_a_frozen_member_is_left(self, tmp_path: Path, renewed_often: None) -> None:
        with etcd_cluster(tmp_path) as members:
            leader = leader_of(members)
            follower = next(m for m in members if m is not leader)
            named = ",".join(m.endpoint for m in sorted(members, key=lambda m: m is not follower))
            with connected(named) as kv:
                watch = kv.watch("w/", 1)
                put_when_possible(kv, "w/before", b"1")
                assert gather_in_spite(watch, 1) == [b"1"]
                lease = when_possible("a lease", lambda: kv.lease(LONG_TTL_S))
                follower.signal(signal.SIGSTOP)
                try:
                    put_when_possible(kv, "w/after", b"2")
                    assert gather_in_spite(watch, 1) == [b"2"]
                    renewed_s = lease.deadline_s
                    until("the lease is renewed", lambda: lease.deadline_s > renewed_s)
                finally:
                    follower.signal(signal.SIGCONT)

    def test_a_write_that_is_not_answered_is_done_once_if_it_names_a_revision(self, server: Server) -> None:
        key = f"{uuid.uuid4().hex}/k"
        with connected(server.endpoint) as heard:
            watch = heard.watch(key, 1)
            with first_unheard(server) as kv:
                put_when_possible(kv, key, b"1")
            with first_unheard(server) as kv:
                written = kv.put(key, b"2")
            once, *repeated = gather(watch, 3)
        assert [event.entry and event.entry.value for event in (once, *repeated)] == [b"1", b"2", b"2"]
        assert repeated[0].revision < repeated[1].revision
        assert written == repeated[1].entry

    def test_a_watch_goes_on_after_etcd_was_away(self, tmp_path: Path) -> None:
        with etcd(tmp_path) as server, connected(server.endpoint) as kv:
            watch = kv.watch("w/", 1)
            kv.put("w/1", b"1")
            gather(watch, 1)
            server.kill()
            with pytest.raises(KVUnavailable, match="interrupted before revision 3"):
                watch.next(60)
            with pytest.raises(KVUnavailable, match="etcd at 127"):
                kv.get("w/1")
            server.start()
            put_when_possible(kv, "w/2", b"2")
            assert gather_in_spite(watch, 1) == [b"2"]

    def test_a_watch_behind_a_proxy_that_ends_half_closed_streams(self, server: Server) -> None:
        """etcd's own does: it takes a client that says no more for one that is gone."""
        with grpc_proxy(server) as endpoint, connected(endpoint) as kv:
            prefix = f"{uuid.uuid4().hex}/"
            watch = kv.watch(prefix, kv.list(prefix).revision + 1)
            kv.put(f"{prefix}a", b"1")
            kv.put(f"{prefix}a", b"2")
            assert [e.entry and e.entry.value for e in gather(watch, 2)] == [b"1", b"2"]
            assert watch.next(0.1) == ()

    def test_a_lease_behind_a_proxy_that_ends_half_closed_streams(self, server: Server, renewed_often: None) -> None:
        with grpc_proxy(server) as endpoint, connected(endpoint) as kv:
            lease = kv.lease(LONG_TTL_S)
            granted_until_s = lease.deadline_s
            until("some renewals", lambda: lease.lost.is_set() or lease.deadline_s > granted_until_s + 3.0)
            assert not lease.lost.is_set()

    def test_a_cancelled_watch_says_nothing_of_its_endpoint(self, server: Server) -> None:
        with connected(f"{server.endpoint},127.0.0.1:{free_port()}") as kv:
            watch = kv.watch("", kv.list("").revision + 1)
            waiting = threading.Thread(target=watch.next, args=(60.0,))
            waiting.start()
            until("it is open", lambda: watch._stream is not None and watch._stream.opened)
            watch.cancel()
            waiting.join(60)
            assert not waiting.is_alive()
            assert kv._calls.endpoints.current == 0

    def test_the_last_word_of_a_leader_though_another_endpoint_is_down(self, server: Server) -> None:
        run_id = uuid.uuid4().hex
        with connected(f"{server.endpoint},127.0.0.1:{free_port()}") as kv, connected(server.endpoint) as other:
            leader, follower = start_member(kv, "leader", run_id), None
            try:
                until("it leads", lambda: leader._engine.leader)
                follower = start_member(other, "follower", run_id)
                until("it follows", lambda: follower._engine.board.leader == "leader")
                leader.leave()
                until("it leads", lambda: follower._engine.leader)
                assert follower._engine.leader._roster._departed == {"leader": LEFT_AT_ONCE}
            finally:
                leader.leave()
                if follower is not None:
                    follower.leave()

    def test_a_lease_of_an_etcd_that_stays_away_is_lost_in_time(self, tmp_path: Path) -> None:
        with etcd(tmp_path) as server, connected(server.endpoint) as kv:
            lease = kv.lease(2)
            server.signal(signal.SIGSTOP)
            assert lease.lost.wait(60)
            assert lease.deadline_s <= time.monotonic(), "not before it surely ended"
            server.signal(signal.SIGCONT)

    def test_compacted_history_is_told_and_a_member_goes_on(self, tmp_path: Path) -> None:
        with etcd(tmp_path) as server, connected(server.endpoint) as kv, connected(server.endpoint) as other:
            member = start_member(kv, "watcher")
            try:
                until("it follows the records", lambda: member._engine.leader and member._engine.board.nodes)
                stale = kv.watch("", 1)
                server.signal(signal.SIGSTOP)  # the member's stream hangs while history goes on without it
                server.signal(signal.SIGCONT)
                for number in range(3):
                    other.put("filler", str(number).encode())
                revision = other.list("").revision
                etcdctl(server, "compact", str(revision))
                with pytest.raises(Compacted, match=f"revision 1 is forgotten; the oldest kept is {revision}"):
                    gather(stale, 1)
                watch = member._driver._follower._watch._watch
                watch._next_revision = 1  # as if it had been cut off since then
                watch._drop()
                second = start_member(other, "second")
                try:
                    assert len(member.wait_round(60).participants) == 2
                finally:
                    second.leave()
            finally:
                member.leave()


@contextlib.contextmanager
def first_unheard(server: Server) -> Iterator[EtcdKV]:
    """A client whose first endpoint carries out what it is asked, and is not heard; the second is."""
    with answers_withheld(server) as (endpoint, withheld), connected(f"{endpoint},{server.endpoint}") as kv:
        withheld.set()
        kv._calls.endpoints.current = 0  # whichever has answered first
        yield kv


def start_member(kv: EtcdKV, name: str, run_id: str = "test") -> Member:
    node = Node(node_id=name, host=name, address="127.0.0.1", port=1, slots=1)
    rules = Rules(min_nodes=2, max_nodes=2)
    member = Member(kv, run_id, node, rules, lambda slots, previous: None, lambda *a, **k: None, lease_ttl_s=LONG_TTL_S)
    member.start()
    return member


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
                kv._calls.call(call_on, etcdrpc.RangeRequest(key=b"k"), repeatable=repeatable)  # type: ignore[arg-type]
            assert sent == expected
    finally:
        kv.close()


@pytest.mark.parametrize("ttl_s", [1.0, 2.0, 5.0])
def test_an_election_is_told_from_an_outage_before_workers_yield(ttl_s: float) -> None:
    """All endpoints hold the renewal that comes next after the last answered one."""
    timeout_s, first_share = renewal_times(ttl_s, 3)
    asked_s = ttl_s / Lease.renewals_per_ttl + timeout_s
    assert asked_s < (YIELD_FRACTION - 0.04) * ttl_s
    assert first_share * timeout_s == pytest.approx(ttl_s / 4)
