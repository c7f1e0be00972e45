"""What a node's engine wants done. Whoever drives it carries these out; the engine itself touches nothing.

A `Task` is answered by an event that names it: `Answered` or `Unanswered` (a `Grant` by `Granted`, a `Decide` by
`Decided`). Tasks of one `Lane` are carried out one after the other, those of different lanes side by side: a write
of the record that the store holds up must not hold up the leader, nor the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from launcher.events import EventName
from launcher.rounds.membership import Rules, View
from launcher.rounds.records import Participant


class Lane(Enum):
    """Who carries a task out."""

    RECORD = auto()  # this node's own record and lease
    LEAD = auto()  # the key of the leader, the round, others' records


@dataclass(frozen=True, eq=False)
class Task:
    """Something that takes time and is answered. Two are never equal: an answer belongs to one."""

    lane: Lane


@dataclass(frozen=True, eq=False)
class Grant(Task):
    """Have a lease granted that renews itself."""

    ttl_s: float


@dataclass(frozen=True, eq=False)
class Get(Task):
    """Read a key."""

    key: str


@dataclass(frozen=True, eq=False)
class Put(Task):
    """Write a key, under a lease of this node's unless `lease_id` is 0; `if_revision` as for `KV.put`."""

    key: str
    value: bytes
    if_revision: int | None
    lease_id: int = 0


@dataclass(frozen=True, eq=False)
class Delete(Task):
    """Delete a key; `if_revision` as for `KV.delete`."""

    key: str
    if_revision: int | None = None


@dataclass(frozen=True, eq=False)
class Revoke(Task):
    """End a lease of this node's, with every key under it."""

    lease_id: int


@dataclass(frozen=True, eq=False)
class Decide(Task):
    """Ask `membership.decide` about `view`. A user's planner takes part in it and may take long."""

    view: View
    rules: Rules


@dataclass(frozen=True)
class Abandon:
    """Renew a lease no more: it ends by itself."""

    lease_id: int


@dataclass(frozen=True)
class Follow:
    """Follow the keys under `prefix` from now on, from a whole listing on, and nothing else.

    `number` is to be given with everything that is heard, so that what an earlier `Follow` still brings is known.
    """

    number: int
    prefix: str


@dataclass(frozen=True)
class WatchPeers:
    """Keep connections to these participants, and no others, and tell of each that dies or cannot be reached."""

    peers: tuple[Participant, ...]


@dataclass(frozen=True)
class Ring:
    """Ask these participants whether they live; tell of those that plainly do and of those that plainly do not."""

    peers: tuple[Participant, ...]


@dataclass(frozen=True)
class Report:
    """Emit an event of the job's."""

    event: EventName
    generation: int
    fields: Mapping[str, Any]


Effect = Task | Abandon | Follow | WatchPeers | Ring | Report
