"""A node's way into a job, and out of it again: the store opened, the node within its peers' reach, its record written.

Both `elastic-moe run` and torchrun's plug-in come in here. Whatever fails on the way, what was opened before is closed.
"""

from __future__ import annotations

import contextlib
import socket
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from launcher.coordination.member import Member
from launcher.coordination.run_id_reuse import is_running, reopen_failed
from launcher.elastic.rdzv_conf import RendezvousConf
from launcher.errors import KVUnavailable, UsageError
from launcher.events import Emit
from launcher.health.liveness import LivenessListener
from launcher.kv.connect import Connection, connect
from launcher.rounds.formation import Planner
from launcher.rounds.membership import Rules
from launcher.rounds.records import Node

_NAME_BYTES_MAX = 100  # a folder for logs has two of them in its name, which may have 255


@dataclass(frozen=True)
class Meeting:
    """Where the nodes of a job meet, as the user says it."""

    backend: str
    endpoint: str
    run_id: str
    conf: RendezvousConf
    local_addr: str | None
    """Under which peers reach this node; None: the address that it has on its way to the store."""


@dataclass(frozen=True)
class Arrival:
    """A node that can join: the store is open, and peers can reach the node."""

    meeting: Meeting
    connection: Connection
    node: Node


@contextlib.contextmanager
def arrive(meeting: Meeting, *, slots: int, name: str = "") -> Iterator[Arrival]:
    """Open the store of a job, and listen for peers; both are closed at the end.

    Args:
        slots: how many workers this node can run.
        name: human part of the node's id; its host's name by default.

    Raises:
        UsageError: the store cannot be used as it was given, this node has no such address, or a name cannot be one.
    """
    conf = meeting.conf
    check_name("--node-name", name)
    check_name("--rdzv-id", meeting.run_id)
    host = socket.gethostname()
    node_id = f"{name or host}-{uuid.uuid4().hex[:8]}"
    with (
        connect(
            meeting.backend,
            meeting.endpoint,
            conf,
            local_addr=meeting.local_addr,
            timeout_s=conf.connect_timeout,
            node_id=node_id,
        ) as connection,
        contextlib.closing(_listen(connection.local_address)) as listener,
    ):
        node = Node(
            node_id=node_id,
            host=host,
            address=connection.local_address,
            port=listener.port,
            slots=slots,
            zone=conf.zone,
        )
        yield Arrival(meeting, connection, node)


def check_name(option: str, name: str) -> None:
    """Raises UsageError for what can be no part of a key in the store, of a log's line and of a folder's name."""
    if not name.isprintable():
        raise UsageError(f"{option} {name!r}: it must be text without line breaks and the like")
    if "/" in name:
        raise UsageError(f"{option} {name!r}: may not hold a '/'")
    if len(name.encode()) > _NAME_BYTES_MAX:
        raise UsageError(f"{option} {name[:40]!r}...: is too long, {_NAME_BYTES_MAX} bytes at most")


def _listen(address: str) -> LivenessListener:
    listener = LivenessListener(address)
    try:
        listener.start()
    except OSError as error:
        raise UsageError(f"--local-addr {address}: cannot listen there: {error.strerror}") from error
    return listener


@contextlib.contextmanager
def join(
    arrival: Arrival,
    rules: Rules,
    planner: Planner,
    emit: Emit,
    *,
    unfit: str = "",
    prepare: Callable[[], object] | None = None,
) -> Iterator[Member]:
    """Make a node a member of its job; it leaves at the end.

    Args:
        unfit: why the node cannot take part in rounds yet.
        prepare: called first where the nodes of the job are at work: they stop their workers for one that joins, so
            what takes long should be done before.

    Raises:
        UsageError: the store does not answer any more.
    """
    meeting, kv = arrival.meeting, arrival.connection.kv
    ttl_s = meeting.conf.lease_ttl_s(meeting.backend)
    member = Member(kv, meeting.run_id, arrival.node, rules, planner, emit, lease_ttl_s=ttl_s)
    try:
        reopen_failed(kv, meeting.run_id)
        if prepare is not None and is_running(kv, meeting.run_id):
            prepare()
        member.start(unfit)
    except KVUnavailable as error:
        raise UsageError(f"--rdzv-endpoint {meeting.endpoint}: {error}") from error
    try:
        yield member
    finally:
        member.leave()


def plan_no_mesh(slots: object, previous: object) -> None:
    """The planner of a job whose workers want no mesh: every slot gets a worker."""
