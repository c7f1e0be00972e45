"""Giving the nodes of a job an order from outside."""

from __future__ import annotations

import uuid

from launcher.coordination.roster import DRAIN, run_prefix
from launcher.drain.draining import DrainOrder
from launcher.errors import KVUnavailable
from launcher.kv import KV

_TTL_S = 60.0


def give_order(kv: KV, run_id: str, order: DrainOrder) -> None:
    """Ask nodes to leave. They follow the order's key; its lease ends by itself, so nobody has to clean up.

    It names node ids, which are new for every start of an agent: no later node can take it for its own.

    Raises:
        KVUnavailable
    """
    lease = kv.lease(_TTL_S)
    try:
        key = f"{run_prefix(run_id)}{DRAIN}{uuid.uuid4().hex}"
        if kv.put(key, order.to_json(), lease=lease) is None:
            raise KVUnavailable("the lease of the order ended at once")
    finally:
        lease.stop()
