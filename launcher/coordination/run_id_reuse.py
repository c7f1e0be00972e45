"""Tells from the store whether a run id is in use, and frees it where its job has failed and is gone."""

from __future__ import annotations

import logging

from launcher.coordination.lookup import look_up
from launcher.kv import KV, Prefixed
from launcher.node.board import NODES, ROUND, run_prefix
from launcher.rounds.records import SUCCEEDED, Round

log = logging.getLogger(__name__)


def reopen_failed(kv: KV, run_id: str) -> bool:
    """Forget a job that failed and that no node is part of any more, so that it can be launched again as it was.

    A scheduler that requeues a job starts it under the same id. A job that succeeded stays closed: a node that comes
    late must not run it once more. Returns whether there was one to forget.

    Raises:
        KVUnavailable
    """
    keys = Prefixed(kv, run_prefix(run_id))
    entries = {entry.key: entry for entry in keys.list("").entries}
    if ROUND not in entries or any(key.startswith(NODES) for key in entries):
        return False
    try:
        outcome = Round.from_json(entries[ROUND].value).outcome
    except ValueError as error:
        log.warning("run %s: its round is not of this version and is replaced: %s", run_id, error)
        outcome = "failed: unreadable"
    if outcome in ("", SUCCEEDED):
        return False
    if not keys.delete(ROUND, if_revision=entries[ROUND].revision):
        return False  # another node of the new launch was first
    log.warning("run %s ended before (%s); it starts anew", run_id, outcome)
    return True


def is_running(kv: KV, run_id: str) -> bool:
    """Tell whether nodes are at work in this run: a node that joins them has them stop their workers.

    Raises:
        KVUnavailable
    """
    found = look_up(kv, run_id)
    return bool(found.nodes) and found.round is not None and not found.round.outcome
