"""Has the store gone with the node that hosts it? When that is known, and in which words it is told. Pure."""

from __future__ import annotations

import logging
import math

from launcher.events import EventName
from launcher.node.effects import Report
from launcher.node.events import LeaseSeen

log = logging.getLogger(__name__)

SURE_AFTER_S = 5.0
"""A host that has refused for so long is told of though the lease is longer: the store has gone with its process, lease
or not. An agent that is started again at once is there before."""
_ELSEWHERE = (
    "to do without a node that must not die, meet in a folder or a bucket that all nodes reach "
    "(--rdzv-endpoint /shared/meet or s3://bucket/meet) or in etcd (--rdzv-backend etcd3)"
)


class StoreHost:
    """What this node knows of the one that hosts the store, from how its own lease stands."""

    def __init__(self) -> None:
        self.lost = ""
        """How the store was lost with its host, "" while it was not: what a node waits for, and its last words."""

    def due_s(self, seen: LeaseSeen) -> float:
        """When time alone makes a loss known."""
        if self.lost or not seen.refused or seen.silent_since_s is None:
            return math.inf
        return seen.silent_since_s + SURE_AFTER_S

    def look(self, seen: LeaseSeen, generation: int, now_s: float, *, is_over: bool) -> list[Report]:
        """Find out whether the store is lost; told once. `is_over`: this node's lease, so the host's as well."""
        if self.lost or not seen.host or seen.silent_since_s is None:
            return []
        if not is_over and now_s < self.due_s(seen):
            return []
        how = "is gone (it refuses connections)" if seen.refused else "does not answer"
        self.lost = (
            f"node {seen.host}, which hosted the store, {how}: the job goes on once it is started again as it was; "
            f"{_ELSEWHERE}"
        )
        log.error("%s", self.lost)
        fields = {
            "node_lost": seen.host,
            "reason": seen.silence,
            "refused": seen.refused,
            "seconds": round(now_s - seen.silent_since_s, 3),
        }
        return [Report(EventName.STORE_HOST_LOST, generation, fields)]

    def back(self) -> None:
        """The store answers again."""
        self.lost = ""
