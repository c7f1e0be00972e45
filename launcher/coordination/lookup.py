"""What the store says of a job, for those who only look: no lease, no watch, no part in it."""

from __future__ import annotations

from launcher.kv import KV, Prefixed
from launcher.node.board import Board, run_prefix


def look_up(kv: KV, run_id: str) -> Board:
    """Return the job's records as of one moment. A board without nodes and round: there is no such job.

    Raises:
        KVUnavailable
    """
    seen = Board()
    seen.replace(Prefixed(kv, run_prefix(run_id)).list("").entries)
    return seen
