"""A running job from outside: who is in it, what becomes of it, and asking its nodes to leave.

A client of the job's store, which takes no part in the job and never hosts the store.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.coordination.lookup import look_up
from launcher.coordination.vitals_publisher import vitals_prefix
from launcher.drain.draining import DrainOrder
from launcher.elastic.rdzv_conf import RendezvousConf
from launcher.errors import KVUnavailable
from launcher.health.liveness import is_refused
from launcher.kv import KV, Changes, Follower, Prefixed, Snapshot
from launcher.kv.aside import told
from launcher.kv.connect import OUTLIVING, connect
from launcher.kv.endpoint import parse_endpoint
from launcher.node.board import DRAIN, run_prefix
from launcher.node.roster import Roster
from launcher.reports.job_status import JobStatus, job_status
from launcher.rounds.records import Node
from launcher.rounds.vitals import Vitals

_WAIT_S = 1.0
_VITALS_S = 5.0
_ORDER_TTL_S = 60.0


@contextlib.contextmanager
def open_job(backend: str, endpoint: str, run_id: str, conf: str = "") -> Iterator[JobClient]:
    """Open the store in which a job's nodes meet; the arguments are the texts of `--rdzv-backend` and so on.

    Raises:
        UsageError: one of them is wrong, or nothing answers at the endpoint.
    """
    parsed = RendezvousConf.parse_text(conf)
    options = parsed.model_copy(update={"is_host": False})  # a client only, whatever the endpoint's name
    with connect(backend, endpoint, options, timeout_s=parsed.connect_timeout) as connection:
        yield JobClient(connection.kv, run_id, endpoint, store_outlives_nodes=backend in OUTLIVING)


@dataclass(frozen=True)
class JobClient:
    """One job, by its name, in an open store. Every method may raise KVUnavailable: the store does not answer."""

    kv: KV
    run_id: str
    endpoint: str = ""
    store_outlives_nodes: bool = True
    """Whether the store is there when the job's last node has left; an embedded one is not."""

    def nodes(self) -> list[Node]:
        """The live nodes; none if there is no such job."""
        return list(look_up(self.kv, self.run_id).nodes.values())

    def follow(self) -> Iterator[tuple[JobStatus, str]]:
        """The job's state now, then whenever something changed and each second; and why the store does not answer, or
        "". Only the first question may raise; later the store is waited for.
        """
        roster = Roster("", time.monotonic())
        vitals = _VitalsReader(self.kv, self.run_id)
        found: JobStatus | None = None
        with Follower(Prefixed(self.kv, run_prefix(self.run_id))) as follower:
            while True:
                try:
                    _learn(roster, follower.next(_WAIT_S))
                    found = job_status(self.run_id, roster.view(), vitals.read(time.monotonic()))
                    trouble = ""
                except KVUnavailable as error:
                    if found is None:
                        raise
                    trouble = str(error)
                yield found, trouble
                if trouble:
                    time.sleep(_WAIT_S)

    def drain(self, order: DrainOrder) -> None:
        """Ask nodes to leave. They follow the order's key; its lease ends by itself, so nobody has to clean up.

        It names node ids, which are new for every start of an agent: no later node can take it for its own.
        """
        lease = self.kv.lease(_ORDER_TTL_S)
        try:
            key = f"{run_prefix(self.run_id)}{DRAIN}{uuid.uuid4().hex}"
            if self.kv.put(key, order.to_json(), lease=lease) is None:
                raise KVUnavailable("the lease of the order ended at once")
        finally:
            lease.stop()

    def has_gone_with_its_store(self) -> bool:
        """Whether a store that does not answer has ended with the node that hosted it, the job's last."""
        return not self.store_outlives_nodes and is_refused(*parse_endpoint(self.endpoint))


class _VitalsReader:
    """What the nodes have told of their workers, asked for now and then: nobody needs to hear each of it."""

    def __init__(self, kv: KV, run_id: str) -> None:
        self._kv = kv
        self._prefix = vitals_prefix(run_id)
        self._known: dict[str, Vitals] = {}
        self._read_s = -math.inf

    def read(self, now_s: float) -> Mapping[str, Vitals]:
        """By node."""
        if now_s >= self._read_s + _VITALS_S:
            self._known = {}
            for key, value in told(self._kv, self._prefix).items():
                with contextlib.suppress(ValueError, TypeError):  # of a version that tells it in another way
                    self._known[key.removeprefix(self._prefix)] = Vitals.from_json(value)
            self._read_s = now_s
        return self._known


def _learn(roster: Roster, news: Snapshot | Changes) -> None:
    match news:
        case Snapshot(entries):
            roster.replace(entries, time.monotonic())
        case Changes(events):
            roster.apply(events, time.monotonic())
