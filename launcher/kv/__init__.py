"""The rendezvous store: a small key-value contract with leases and watches, and its back ends.

`memory` (one process: tests, simulation, single-node jobs), `embedded` (hosted by the first node, no server to
install) and `etcd` (a cluster that outlives any node). Every back end passes one contract suite.
"""

from launcher.kv.base import KV, Entry, Snapshot, Watch, WatchEvent
from launcher.kv.follow import Changes, Follower
from launcher.kv.lease import Lease
from launcher.kv.prefixed import Prefixed

__all__ = [
    "KV",
    "Changes",
    "Entry",
    "Follower",
    "Lease",
    "Prefixed",
    "Snapshot",
    "Watch",
    "WatchEvent",
]
