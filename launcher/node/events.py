"""What a node's engine is told: answers of the store, what was followed, news of peers, and the agent's wishes."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.kv.base import Entry, WatchEvent
from launcher.node.effects import Task
from launcher.rounds.membership import Action
from launcher.rounds.records import Failure, Status

# --- the store


@dataclass(frozen=True)
class Answered:
    """A task was carried out. `entry`: what was read or written; None where nothing was (a lost race, say)."""

    task: Task
    entry: Entry | None = None


@dataclass(frozen=True)
class Unanswered:
    """A task came to nothing that is known: a write may still be carried out."""

    task: Task
    why: str


@dataclass(frozen=True)
class LeaseSeen:
    """How a lease of this node's stands: surely until `deadline_s`, or it is `lost`.

    `silent_since_s`: since when renewals are not answered, None while they are; `silence` says how, and `stands`
    whether the store is known to end no lease meanwhile. Where a node hosts the store, `host` is its id, and `refused`
    says that it refuses connections.
    """

    lease_id: int
    deadline_s: float
    lost: bool = False
    silent_since_s: float | None = None
    silence: str = ""
    stands: bool = False
    host: str = ""
    refused: bool = False


@dataclass(frozen=True)
class LeasesSeen:
    """How leases of this node's stand, of those for which that has changed. All at once: nothing is judged before each
    is known."""

    leases: tuple[LeaseSeen, ...]


@dataclass(frozen=True)
class Granted:
    """A `Grant` was answered: with a lease of `ttl_s`, and how it stands."""

    task: Task
    ttl_s: float
    seen: LeaseSeen


@dataclass(frozen=True)
class Listed:
    """Every key under the prefix of `Follow` number `number`."""

    number: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Changed:
    """What became of those keys since the last news, in the order of the writes."""

    number: int
    changes: tuple[WatchEvent, ...]


@dataclass(frozen=True)
class Unheard:
    """The keys cannot be followed now; no news is lost."""

    why: str


@dataclass(frozen=True)
class Decided:
    """What `decide` says. `took_s`: of a processor's time; `epoch_s`: now, for people."""

    task: Task
    action: Action
    took_s: float = 0.0
    epoch_s: float = 0.0


# --- the peers


@dataclass(frozen=True)
class PeerDead:
    """A peer's agent is known to be gone: its host refuses a connection."""

    node_id: str
    reason: str


@dataclass(frozen=True)
class PeerSilent:
    """A peer that was reached before answers this node no more."""

    node_id: str


@dataclass(frozen=True)
class PeerAlive:
    """A peer that was asked has answered."""

    node_id: str


# --- the agent's wishes


@dataclass(frozen=True)
class Started:
    """Take part from now on. `unfit`: as of `HeldBack`."""

    unfit: str = ""


@dataclass(frozen=True)
class Announced:
    """What this node does now. Reason, failure and `yielded` stay on its record until it runs again."""

    status: Status
    reason: str = ""
    failure: Failure | None = None
    yielded: bool = False


@dataclass(frozen=True)
class Joining:
    """This node joins a generation; `worker_store` is where its workers meet, if this node hosts that."""

    generation: int
    worker_store: str = ""


@dataclass(frozen=True)
class HeldBack:
    """This node is not fit to take part, and why; "" once it is."""

    unfit: str


@dataclass(frozen=True)
class Draining:
    """This node is to be let go."""

    reason: str


@dataclass(frozen=True)
class PeersDoubted:
    """A worker failed in a way that a peer's death explains."""


@dataclass(frozen=True)
class Leaving:
    """This node goes, at once."""


@dataclass(frozen=True)
class Tick:
    """Nothing but time has passed."""


Event = (
    Granted
    | Answered
    | Unanswered
    | LeasesSeen
    | Listed
    | Changed
    | Unheard
    | Decided
    | PeerDead
    | PeerSilent
    | PeerAlive
    | Started
    | Announced
    | Joining
    | HeldBack
    | Draining
    | PeersDoubted
    | Leaving
    | Tick
)
