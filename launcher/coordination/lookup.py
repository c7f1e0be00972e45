"""What the store says of a job, for those who only look: no lease, no watch, no part in it."""

from __future__ import annotations

import time

from launcher.coordination.roster import Roster, run_prefix
from launcher.kv import KV, Prefixed


def look_up(kv: KV, run_id: str) -> Roster:
    """The job's records as of one moment. A roster without nodes and round: there is no such job.

    Raises:
        KVUnavailable
    """
    now_s = time.monotonic()
    seen = Roster(lineage="", now_s=now_s)
    seen.replace([(entry.key, entry) for entry in Prefixed(kv, run_prefix(run_id)).list("").entries], now_s)
    return seen
