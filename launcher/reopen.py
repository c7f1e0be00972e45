"""A store that outlives jobs remembers how the last job of a run id ended. May its name be used again?"""

from __future__ import annotations

import logging

from launcher.kv import KV
from launcher.membership import SUCCEEDED, Round

log = logging.getLogger(__name__)


def reopen_failed(kv: KV, run_id: str) -> bool:
    """Forget a job that failed and that no node is part of any more, so that it can be launched again as it was.

    A scheduler that requeues a job starts it under the same id. A job that succeeded stays closed: a node that comes
    late must not run it once more. Whether there was one to forget.

    Raises:
        KVUnavailable
    """
    prefix = f"elastic-moe/{run_id}/"
    entries = {entry.key.removeprefix(prefix): entry for entry in kv.list(prefix).entries}
    if "round" not in entries or any(key.startswith("nodes/") for key in entries):
        return False
    try:
        outcome = Round.from_json(entries["round"].value).outcome
    except (ValueError, TypeError, KeyError) as error:
        log.warning("run %s: its round is not of this version and is replaced: %s", run_id, error)
        outcome = "failed: unreadable"
    if outcome in ("", SUCCEEDED):
        return False
    if not kv.delete(f"{prefix}round", if_revision=entries["round"].revision):
        return False  # another node of the new launch was first
    log.warning("run %s ended before (%s); it starts anew", run_id, outcome)
    return True
