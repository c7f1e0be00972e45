"""What the store says of a job, for those who only look: no lease, no watch, no part in it."""

from __future__ import annotations

import time

from launcher.coordination.roster import Roster, run_prefix
from launcher.kv import KV


def look_up(kv: KV, run_id: str) -> Roster:
    """The job's records as of one moment. A roster without nodes and round: there is no such job.

    Raises:
        KVUnavailable
    """
    prefix = run_prefix(run_id)
    now_s = time.monotonic()
    seen = Roster(lineage="", now_s=now_s)
    seen.replace([(entry.key.removeprefix(prefix), entry) for entry in kv.list(prefix).entries], now_s)
    return seen
