"""An outage of etcd: what may be concluded from what its members say, and what nodes do meanwhile."""

from __future__ import annotations

import math
import signal
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.errors import KVUnavailable
from launcher.kv.etcd import outage
from launcher.kv.etcd.outage import EtcdMembers, MemberList, MemberState, none_leads, own_endpoints
from launcher.kv.lease import Lease
from tests.cluster import Cluster, cluster, read_lines, until
from tests.etcd import ALONE, LONG_TTL_S, client, connected, etcd, etcd_cluster, get_when_possible

COOPERATIVE = str(Path(__file__).parent / "scripts" / "cooperative.py")
REFUSED, FOLLOWS, UNKNOWN = MemberState.REFUSED, MemberState.FOLLOWS, MemberState.UNKNOWN
MEMBERS = {1: frozenset({("10.0.0.1", 2379)}), 2: frozenset({("10.0.0.2", 2379)}), 3: frozenset({("10.0.0.3", 2379)})}
ENDPOINTS = {0: MEMBERS[1], 1: MEMBERS[2], 2: MEMBERS[3]}


class TestProof:
    @pytest.mark.parametrize(
        ("answers", "proven"),
        [
            ([REFUSED], True),
            ([REFUSED, REFUSED, REFUSED], True),
            ([REFUSED, REFUSED, FOLLOWS], True),
            ([REFUSED, REFUSED, UNKNOWN], False),
            ([UNKNOWN], False),
            ([], False),
        ],
    )
    def test_every_member_must_be_away_or_follow(self, answers: list[MemberState], proven: bool) -> None:
        assert none_leads(answers) is proven

    def test_every_member_must_be_known_by_an_address_of_its_own(self) -> None:
        told = {index: MemberList(index + 1, MEMBERS) for index in ENDPOINTS}
        assert own_endpoints(ENDPOINTS, told) == {1: 0, 2: 1, 3: 2}
        assert own_endpoints(ENDPOINTS, {0: told[0], 1: told[1]}) == {}, "a member that is not known may lead"

    def test_a_load_balancer_is_no_member(self) -> None:
        balancer = frozenset({("10.0.0.9", 2379)})
        assert own_endpoints({0: balancer}, {0: MemberList(1, {1: MEMBERS[1]})}) == {}
        shared = {member: addresses | balancer for member, addresses in MEMBERS.items()}
        assert own_endpoints({0: balancer}, {0: MemberList(1, shared)}) == {}

    def test_members_that_disagree_prove_nothing(self) -> None:
        told = {index: MemberList(index + 1, MEMBERS) for index in ENDPOINTS}
        told[2] = MemberList(3, {3: MEMBERS[3]})
        assert own_endpoints(ENDPOINTS, told) == {}


class Members(EtcdMembers):
    """One member, as it answers; `names`: what the name servers know."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(None, (("etcd-0", 2379),))  # type: ignore[arg-type]
        self.names = {"etcd-0": frozenset({("10.0.0.1", 2379)})}
        self.answers = True
        monkeypatch.setattr(outage, "_resolve", lambda host, port: self.names.get(host, frozenset()))
        monkeypatch.setattr(outage, "_refuses", lambda address: False)
        self._transport = SimpleNamespace(name=lambda index: "etcd-0")

    def learn(self) -> None:
        self._learnt_s = -math.inf
        super().learn()

    def _ask(self, index: int, rpc: Any, request: Any) -> Any:
        if not self.answers:
            raise KVUnavailable("silent")
        member = SimpleNamespace(ID=1, clientURLs=["http://etcd-0:2379"])
        return SimpleNamespace(header=SimpleNamespace(member_id=1), members=[member], leader=1)


def test_a_name_that_is_not_known_for_a_while_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    members = Members(monkeypatch)
    members.learn()
    assert members._own == {1: 0}
    members.names.clear()
    members.answers = False
    members.learn()
    assert not members.no_lease_ends(), "what was known before stands, and that is silent"


@pytest.mark.parametrize("now", [frozenset(), frozenset({("10.0.0.2", 2379)})])
def test_the_old_address_of_a_member_refuses_for_nobody(
    monkeypatch: pytest.MonkeyPatch, now: frozenset[tuple[str, int]]
) -> None:
    members = Members(monkeypatch)
    members.learn()
    monkeypatch.setattr(outage, "_refuses", lambda address: True)
    assert members.no_lease_ends()
    members.names["etcd-0"] = now
    assert not members.no_lease_ends(), "it may lead at another address"


class TestLease:
    def lease(self, ttl_s: float, stands: bool) -> Lease:
        def renew() -> bool:
            raise ConnectionError("refused")

        lease = Lease(1, ttl_s, granted_s=time.monotonic(), renew=renew, revoke=lambda: None, stands=lambda: stands)
        lease.renewals_per_ttl = 10 * ttl_s
        return lease.start()

    def test_a_proof_extends_it_and_silence_does_not(self) -> None:
        proven, silent = self.lease(30, stands=True), self.lease(0.4, stands=False)
        first_s = proven.deadline_s
        assert silent.lost.wait(60)
        assert silent.silence is not None
        assert not silent.silence.stands
        until("extended again and again", lambda: proven.deadline_s > first_s + 0.5)
        assert not proven.lost.is_set()
        proven.stop()

    def test_a_proof_that_comes_too_late_counts_for_nothing(self) -> None:
        def slow() -> bool:
            until("the lease may have ended", lambda: time.monotonic() > lease.deadline_s)
            return True

        def renew() -> bool:
            raise ConnectionError("refused")

        lease = Lease(1, 0.4, granted_s=time.monotonic(), renew=renew, revoke=lambda: None, stands=slow).start()
        assert lease.lost.wait(60)


@pytest.mark.slow
class TestRealEtcd:
    def test_a_killed_etcd_ends_no_lease_however_long_it_is_away(self, tmp_path: Path, renewed_often: None) -> None:
        with etcd(tmp_path, *ALONE) as server, connected(server.endpoint) as kv:
            lease = kv.lease(LONG_TTL_S)
            kv.put("k", b"1", lease=lease)
            until("its members are known", lambda: kv._members._own)
            server.kill()
            killed_s = time.monotonic()
            until("it stands by proof alone, and goes on to", lambda: lease.deadline_s > killed_s + LONG_TTL_S + 3)
            server.start()
            until("renewed", lambda: lease.silence is None)
            assert get_when_possible(kv, "k") == b"1"
            assert not lease.lost.is_set()

    def test_a_cluster_that_lost_its_quorum_ends_no_lease(self, tmp_path: Path, renewed_often: None) -> None:
        with etcd_cluster(tmp_path) as members:
            for member in members:
                client(member.endpoint).close()
            with connected(",".join(m.endpoint for m in members)) as kv:
                lease = kv.lease(LONG_TTL_S)
                kv.put("k", b"1", lease=lease)
                until("its members are known", lambda: len(kv._members._own) == 3)
                for member in members[:2]:
                    member.kill()
                killed_s = time.monotonic()
                until("known to stand", lambda: lease.silence and lease.silence.stands)
                until("it stands by proof alone, and goes on to", lambda: lease.deadline_s > killed_s + LONG_TTL_S + 3)
                members[0].start()
                until("renewed", lambda: lease.silence is None)
                assert get_when_possible(kv, "k") == b"1"
                assert not lease.lost.is_set()

    @pytest.mark.whole  # tests/chaos/test_store.py has killed and frozen ones in the suite, of three nodes
    def test_a_job_goes_on_through_outages(self, tmp_path: Path) -> None:
        """Killed: nothing is interrupted. Frozen: the workers save, yield and start again. No step is lost."""
        with etcd(tmp_path, *ALONE) as server, cluster(tmp_path / "nodes") as nodes:
            client(server.endpoint).close()
            nodes.endpoint = server.endpoint
            options = ("--rdzv-backend", "etcd3", "--rdzv-id", uuid.uuid4().hex, COOPERATIVE, str(tmp_path))
            pair = [nodes.start(name, *options, conf="last_call=60,lease_ttl=8") for name in ("first", "second")]
            steps = tmp_path / "steps.jsonl"
            until("steps on two nodes", lambda: read_lines(steps)[10:])
            until("both know etcd's members", lambda: all("members are known" in node.output for node in pair))

            server.kill()
            until_all(nodes, "store_unreachable", 1)
            killed_ts = time.time()
            until("steps after workers would have yielded", lambda: read_lines(steps)[-1]["ts"] > killed_ts + 0.7 * 8)
            server.start()
            until_all(nodes, "store_back", 1)
            assert len(nodes.events("round_formed")) == 1, "nobody was interrupted"
            assert all(e["leases_stand"] for e in nodes.events("store_unreachable"))

            server.signal(signal.SIGSTOP)
            until("the workers have yielded", lambda: len(nodes.events("workers_yielded")) == 2)
            until("and are stopped", lambda: len(nodes.events("workers_stopped")) == 2)
            server.signal(signal.SIGCONT)
            until("another round", lambda: nodes.events("round_formed")[1:])
            before = len(read_lines(steps))
            until("steps after it", lambda: read_lines(steps)[before + 10 :])
            (tmp_path / "finish").touch()
            assert [node.wait() for node in pair] == [0, 0], pair[0].output + pair[1].output
            done = [s["step"] for s in read_lines(steps)]
            assert done == list(range(1, len(done) + 1)), "none skipped, none done twice"


def until_all(nodes: Cluster, event: str, num: int) -> None:
    """Both nodes have had an event so often."""
    for name in ("first", "second"):

        def had(name: str = name) -> bool:
            return sum(e["node"].startswith(name) for e in nodes.events(event)) >= num

        until(f"{event} of {name}", had)
