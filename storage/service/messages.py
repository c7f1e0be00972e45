"""What workers, the agent and the service say to each other: typed, and of one version on both sides.

A message is a JSON object with one key, the name of its class, and its fields below that. `Hello`, `Welcome` and
`Rejected` are understood by every version, so that another version is refused with a reason.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pydantic import ConfigDict, Field, ValidationError

from storage.format.sealed import Document
from storage.pace.rules import Tier
from storage.run.owner import Owner
from storage.saving.uploads import Tried

PROTOCOL_VERSION = 6
"""One more with every change after which the two sides would misunderstand each other."""


class ProtocolError(Exception):
    """What the other side has sent is no message of this version, or none that may come now."""


class ServiceMessage(Document):
    """Base of all messages."""

    classes: ClassVar[dict[str, type[ServiceMessage]]] = {}
    """By the names that they have on the wire."""
    has_descriptors: ClassVar[bool] = False
    """Whether any come with it, which are then its handler's to close."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ServiceMessage.classes[cls.__name__] = cls


class Hello(ServiceMessage):
    """The first word of who connects.

    `session` names one rank of one Checkpointer, "" for others; `environment` is a digest of what decides how its
    stores are opened (see `storage.service.surroundings`); `pid_space` is the namespace of its pid, 0 if not known.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: int = PROTOCOL_VERSION
    pid: int
    session: str = ""
    environment: str = ""
    pid_space: int = 0


class Welcome(ServiceMessage):
    """The answer to `Hello`; `environment` is the service's own digest."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: int = PROTOCOL_VERSION
    pid: int
    environment: str = ""


class Rejected(ServiceMessage):
    """The other answer to `Hello`, after which the connection is closed; or to the `Stage` of an `attempt`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    reason: str
    attempt: str = ""
    version: int = PROTOCOL_VERSION


class StagedAttempt(ServiceMessage):
    """One rank's part of an attempt, as `storage.saving.commit.Attempt` and its rank say it."""

    prefix: str
    step: int = Field(ge=0)
    id: str
    world_size: int = Field(ge=1)
    rank: int = Field(ge=0)


class Identity(ServiceMessage):
    """Who saves, as `storage.run.job.Origin` says it."""

    generation: int = 0
    lineage: str = ""
    mesh: dict[str, Any] | None = None
    run_id: str = ""
    rendezvous: str = ""


class Stage(ServiceMessage):
    """A rank has staged its part of a save: the service's from here on.

    With it come one or two descriptors of slots (`storage.arena.slot`): first the table (`storage.service.table`) of
    what is to be written, then the one that holds the tensors, where they are not in the table's as well.

    With `waits` it is not begun before `GoOn` comes, or the worker has died; it gives way to the next `Stage` of its
    session. Of `tier` RAM it stays in memory and is not stored.

    With `yields` the workers stop for others, which restore it from memory: it is stored once they have, or have not
    for a while. With `copies` it is copied to another node's memory, where it is held.

    `told` are the variables (`storage.agent`) by which the service tells the agent's file of events what becomes of it,
    if no worker is there any more to do so. `tried`: what another service, or this one before a crash, may have done.
    `pid_began` tells the worker's process from a later one of its pid (`storage.service.processes.began_at`), and
    `pid_space` from one of another namespace.
    """

    has_descriptors: ClassVar[bool] = True

    session: str
    pid: int
    pid_began: int = 0
    pid_space: int = 0
    url: str
    attempt: StagedAttempt
    owner: Owner
    origin: Identity = Identity()
    keep: int = Field(ge=1)
    timeout_s: float
    started_s: float
    created_unix_s: float
    healthy: bool = True
    tier: Tier = Tier.STORE
    waits: bool = False
    yields: bool = False
    copies: bool = True
    told: dict[str, str] = Field(default_factory=dict)
    tried: Tried = Tried.NOT_YET

    @property
    def name(self) -> str:
        """What it is known by in notes and to the keeper."""
        return name_of(self.session, self.attempt.id)


def name_of(session: str, attempt: str) -> str:
    """See `Stage.name`."""
    return f"{session}/{attempt}"


class GoOn(ServiceMessage):
    """What was staged to wait is to be stored now. Of an attempt that does not wait it says nothing."""

    attempt: str


class Accepted(ServiceMessage):
    """What was staged is safe from the worker's death, and from the service's own crash."""

    attempt: str


class Stored(ServiceMessage):
    """The rank's part of the attempt is in the store."""

    attempt: str


class KeptHere(ServiceMessage):
    """The rank's part of the attempt is in the node's memory, for whoever goes on there, stored or not."""

    attempt: str


class CopySettled(ServiceMessage):
    """Nothing of the attempt is on its way to another node's memory any more, or it never was."""

    attempt: str


class Released(ServiceMessage):
    """The service reads what was staged no more: the slot may be overwritten."""

    attempt: str


class Told(ServiceMessage):
    """An event of a save, for the worker's listeners and its agent; answered by `Heard`."""

    number: int
    event: str
    fields: dict[str, Any]


class Ended(ServiceMessage):
    """The last word about an attempt; answered by `Heard`. `fenced`: why its owner can never commit again."""

    number: int
    attempt: str
    committed: bool
    fenced: str | None = None


class Heard(ServiceMessage):
    """The worker has dealt with that `Told` or `Ended`."""

    number: int


class TakenBack(ServiceMessage):
    """The worker had lost sight of the service, and has carried those attempts out by itself, or wants them no more."""

    attempts: tuple[str, ...]


class AskUnfinished(ServiceMessage):
    """What has not ended of the saves to a run; answered by `Unfinished`."""

    url: str


class Unfinished(ServiceMessage):
    """Parts of attempts that the service holds and has not brought to an end."""

    attempts: tuple[StagedAttempt, ...] = ()


class Drain(ServiceMessage):
    """Finish what is under way, and give up what is not finished after `grace_s`; answered by `Drained`."""

    grace_s: float = Field(ge=0)


class Drained(ServiceMessage):
    """How many parts of saves came to their end since `Drain`, and how many were given up."""

    num_finished: int
    num_abandoned: int


class AskStatus(ServiceMessage):
    """How the service is; answered by `ServiceStatus`."""


class ServiceStatus(ServiceMessage):
    """What the service has to do, and what it holds."""

    pid: int
    num_unfinished: int
    staged_bytes: int
    num_ended: int
    num_restarts: int


def dump(message: ServiceMessage) -> bytes:
    """The message's bytes on the wire."""
    return b'{"%s":%s}' % (type(message).__name__.encode(), message.model_dump_json().encode())


def load(data: bytes) -> ServiceMessage:
    """The message in `data`. Raises ProtocolError."""
    try:
        ((name, body),) = json.loads(data).items()
        return ServiceMessage.classes[name].model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "message"
        raise ProtocolError(f"{name}: {where}: {first['msg']}") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ProtocolError(f"no message of version {PROTOCOL_VERSION}: {data[:60]!r}") from None
