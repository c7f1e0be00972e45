"""What the launcher's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.health import liveness
from launcher.kv.lease import Lease
from launcher.rounds.membership import Rules
from tests.cluster import Cluster, cluster
from tests.etcd import LONG_TTL_S, Server, client, etcd
from tests.launcher.members import Job
from tests.launcher.stores import connect, etcd_server, s3_server

__all__ = ["connect", "etcd_server", "job", "s3_server"]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    monkeypatch.setattr(liveness, "_PATIENCE_S", 0.02)  # of listeners that end, for callers that nobody makes here
    made = Job(Rules(min_nodes=1, max_nodes=4, last_call_s=0.3, join_cooldown_s=0.2, join_settle_s=0.1, max_restarts=0))
    yield made
    for member in made.members.values():
        member.leave()
    for bell in made.bells:
        bell.close()
    made.hub.close()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    """Nodes of one job on a store of its own, and their files in a folder beside the test's."""
    with cluster(tmp_path / "nodes") as made:
        yield made


@pytest.fixture
def renewed_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of `LONG_TTL_S` are renewed every second: what renewals do shows soon, and a busy machine ends none."""
    monkeypatch.setattr(Lease, "renewals_per_ttl", LONG_TTL_S)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An etcd for the tests of one file."""
    with etcd(tmp_path_factory.mktemp("etcd")) as made:
        client(made.endpoint).close()
        yield made
