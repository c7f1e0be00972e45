"""When a node says that the store has gone with the node that hosted it."""

from __future__ import annotations

import time

import pytest

from launcher.errors import KVUnavailable, StoreHostSilent
from launcher.events import EventName
from launcher.kv.lease import Lease
from launcher.node.events import LeaseSeen, LeasesSeen, Tick
from launcher.node.store_host import SURE_AFTER_S, StoreHost
from launcher.reports.goodput import Cause, account
from tests.cluster import until
from tests.launcher.engines import TTL_S, Driven

SILENT = LeaseSeen(1, 10.0, silent_since_s=1.0, silence="the store at h:1 does not answer", host="host-1")
REFUSED = LeaseSeen(1, 10.0, silent_since_s=1.0, silence="refused", host="host-1", refused=True)


class TestWhen:
    @pytest.mark.parametrize("seen", [SILENT, REFUSED])
    def test_the_lease_is_over(self, seen: LeaseSeen) -> None:
        host = StoreHost()
        assert not host.look(seen, 3, 2.0, is_over=False)
        (told,) = host.look(seen, 3, 2.0, is_over=True)
        assert (told.event, told.generation) == (EventName.STORE_HOST_LOST, 3)
        assert told.fields == {"node_lost": "host-1", "reason": seen.silence, "refused": seen.refused, "seconds": 1.0}
        assert ("refuses" in host.lost) is seen.refused
        assert "--rdzv-endpoint /shared/meet" in host.lost
        assert not host.look(seen, 3, 3.0, is_over=True), "once"

    def test_a_host_that_refuses_is_not_waited_for_as_long_as_a_long_lease(self) -> None:
        host = StoreHost()
        assert host.due_s(SILENT) > 1e9, "it may be slow, or cut off from this node"
        assert host.due_s(REFUSED) == 1.0 + SURE_AFTER_S
        assert not host.look(REFUSED, 0, 1.0 + SURE_AFTER_S - 0.1, is_over=False)
        assert host.look(REFUSED, 0, 1.0 + SURE_AFTER_S, is_over=False)

    def test_a_store_that_no_node_hosts_goes_with_none(self) -> None:
        assert not StoreHost().look(LeaseSeen(1, 0.0, silent_since_s=1.0, silence="no answer"), 0, 9.0, is_over=True)

    def test_a_node_knows_by_time_alone(self) -> None:
        node = Driven().started()
        node.feed(LeasesSeen((LeaseSeen(1, TTL_S, silent_since_s=1.0, silence="refused", host="h-1", refused=True),)))
        assert EventName.STORE_HOST_LOST not in node.reports()
        assert node.engine.due_s <= 1.0 + SURE_AFTER_S
        node.now_s = 1.0 + SURE_AFTER_S
        node.feed(Tick())
        assert EventName.STORE_HOST_LOST in node.reports()
        assert node.engine.why.startswith("node h-1, which hosted the store, is gone")
        node.feed(LeasesSeen((LeaseSeen(1, node.now_s + TTL_S),)))
        assert "h-1" not in node.engine.why


def test_a_lease_tells_of_a_host_that_is_gone_and_of_one_that_says_nothing_yet() -> None:
    errors = [KVUnavailable("slow"), StoreHostSilent("reset", "h-1", refused=False)]

    def renew() -> bool:
        raise errors.pop(0) if errors else StoreHostSilent("refused", "h-1", refused=True)

    lease = Lease(1, 60.0, granted_s=time.monotonic(), renew=renew, revoke=lambda: None)
    lease.renewals_per_ttl = 1000
    lease.start()
    try:
        until("known", lambda: lease.silence and lease.silence.refused)
        assert lease.silence is not None
        assert (lease.silence.host, lease.silence.reason, lease.silence.stands) == ("h-1", "refused", False)
    finally:
        lease.stop()


def test_a_report_blames_a_host_that_took_part_in_no_round() -> None:
    """It had drained, and stayed for the others; all of these have lost the store."""

    def event(ts: float, name: str, node: str, **fields: object) -> dict[str, object]:
        return {"ts": ts, "run_id": "r", "node": node, "generation": 1, "event": name, **fields}

    nodes = ("a-1", "b-1")
    gone = {"reason": "refused", "seconds": 1.0}
    events = [
        *(event(1.0, "node_joined", node, slots=1) for node in nodes),
        event(2.0, "round_formed", "a-1", participants=[{"node_id": node, "slots": 1} for node in nodes], reason="new"),
        *(event(3.0, "workers_started", node, ranks=[0], pids=[1]) for node in nodes),
        *(event(12.0, "store_unreachable", node, **gone) for node in nodes),
        event(13.0, "store_host_lost", "a-1", node_lost="host-1", **gone),
        *(event(13.1, "workers_stopped", node, reason="this node's lease ended", seconds=0.1) for node in nodes),
        *(event(20.0, "node_ended", node, reason="no round within 3 s", exit_code=75) for node in nodes),
    ]
    (stop,) = account(events).interruptions
    assert (stop.cause, stop.nodes) == (Cause.NODE_LOSS, ("host-1",))
    assert stop.root == "the store went with node host-1, which hosted it: refused"
