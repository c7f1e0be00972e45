"""Who carries a Checkpointer's saves out: the agent's service, one of its own, or its own process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from storage.agent import AgentEnvironment
from storage.events import CheckpointEvent, Reporter
from storage.run.job import Origin
from storage.saving.adoption import UnfinishedPart
from storage.saving.committer import Backend, InProcess
from storage.saving.ownership import Ownership
from storage.service.channel import connect
from storage.service.client import ServiceBackend
from storage.service.handed import Saves
from storage.service.held_messages import AskCard
from storage.service.local_memory import ServiceMemory
from storage.service.messages import AskUnfinished, Hello, ProtocolError, Unfinished
from storage.service.ways import OwnService, ServiceAt
from storage.stores.registry import is_everywhere

_ANSWER_S = 30.0


def held_by(url: str, origin: Origin, wanted: bool | None) -> Sequence[UnfinishedPart]:
    """What the service of this node, if there is one, still has to store of a run. Raises OSError, ProtocolError."""
    if (path := _path(url, origin, wanted)) is None or not path.exists():
        return ()
    channel, _ = connect(path, Hello(pid=os.getpid()))
    try:
        channel.limit_receive(_ANSWER_S)  # all ranks wait for this one
        channel.send(AskUnfinished(url=url))
        received = channel.receive()
    finally:
        channel.close()
    if received is None or not isinstance(received[0], Unfinished):
        raise ProtocolError("the service does not answer what it has to do")
    return [UnfinishedPart(**dict(part)) for part in received[0].attempts]


def _path(url: str, origin: Origin, wanted: bool | None) -> Path | None:
    """Where the service for the saves to `url` listens, or would; None where none is wanted."""
    told = AgentEnvironment.from_env(os.environ).service
    if wanted is False or (wanted is None and not told) or not is_everywhere(url):
        return None
    return Path(told) if told else OwnService(_name(url, origin)).path


def _name(url: str, origin: Origin) -> str:
    """Of the service that processes of one job share where there is no agent."""
    return "\n".join((url, origin.lineage, origin.rendezvous, origin.run_id))


def memory_of(url: str, origin: Origin, wanted: bool | None) -> ServiceMemory | None:
    """The states in memory of this node's service; None where there is no agent, so no service that outlives a job."""
    told = AgentEnvironment.from_env(os.environ)
    path = _path(url, origin, wanted)
    if path is None or not told.service or not told.node:
        return None
    who = AskCard(node=told.node, zone=told.zone, **({"address": told.address} if told.address else {}))
    return ServiceMemory(ServiceAt(path), who)


def backend_for(
    saves: Saves, direct: InProcess, ownership: Ownership, report: Reporter, wanted: bool | None
) -> Backend:
    """The backend for `saves`; `direct` is the one of this process, and the fall-back of the others.

    `wanted` is `service` of `Checkpointer`.
    """
    told = AgentEnvironment.from_env(os.environ)
    path = told.service
    if wanted is False or (wanted is None and not path):
        return direct
    if not is_everywhere(saves.url):
        reason = "what is at this URL can be opened by this process only"
        report(CheckpointEvent.DIRECT, url=saves.url, reason=reason)
        return direct
    if path:
        saves = replace(saves, holds=bool(told.node))
        backend = ServiceBackend(ServiceAt(Path(path)), direct, ownership, saves, report)
        backend.start()
        return backend
    return ServiceBackend(OwnService(_name(saves.url, saves.origin)), direct, ownership, saves, report)
