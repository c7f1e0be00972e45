"""What workers and the service say to each other about states in memory."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from storage.held.buddies import PeerCard
from storage.held.papers import PartLabel
from storage.service.messages import ServiceMessage


class AskCard(ServiceMessage):
    """How others reach this node's memory; answered by `NodeCard`.

    The first who asks says who the node is: `node` as its agent calls it, `zone` where it has one, and under which
    `address` the others reach it.
    """

    node: str = Field(min_length=1, max_length=256)
    zone: str = Field(default="", max_length=256)
    address: str = Field(default="127.0.0.1", max_length=256)


class NodeCard(ServiceMessage):
    """The answer to `AskCard`."""

    card: PeerCard


class MeetNodes(ServiceMessage):
    """These are all nodes of the job; answered by `Noted`."""

    cards: tuple[PeerCard, ...]


class AskHeld(ServiceMessage):
    """What is held in memory of a run; answered by `HeldHere`."""

    run: str


class HeldHere(ServiceMessage):
    """The answer to `AskHeld`: labels, and how often the job has gone on from each attempt."""

    labels: tuple[PartLabel, ...]
    num_restores: dict[str, int]


class AskPart(ServiceMessage):
    """The memory of a part; answered by `PartHere` with descriptors (see `storage.held.own_memory`), or `NotHeld`."""

    attempt: str
    rank: int = Field(ge=0)


class PartHere(ServiceMessage):
    """The answer to `AskPart`, descriptors with it."""


class NotHeld(ServiceMessage):
    """The other answer to `AskPart`."""

    reason: str


class NoteRestored(ServiceMessage):
    """The job goes on from that attempt in memory; answered by `Noted`."""

    attempt: str
    step: int = Field(ge=0)


class DropHeld(ServiceMessage):
    """Hold those attempts no longer, or (None) nothing of all that is held; answered by `Noted`."""

    attempts: tuple[str, ...] | None
    reason: str


class MakeWay(ServiceMessage):
    """A whole job waits for what is done now: for so long nothing is to be stored or copied behind it. Answered by
    `Noted`.
    """

    seconds: float = Field(ge=0)


class WayFree(ServiceMessage):
    """Nobody waits any more: what stands still goes on after so many seconds. Answered by `Noted`."""

    after_s: float = Field(default=0.0, ge=0)


class Noted(ServiceMessage):
    """It was done."""


class GuardSlot(ServiceMessage):
    """A worker has a slot: the service holds it as well, until the connection ends or `UnguardSlots` names it, and
    frees it then behind the training. It comes with the descriptor. No answer.
    """

    has_descriptors: ClassVar[bool] = True


class UnguardSlots(ServiceMessage):
    """The worker has let go of slots, which it calls by the numbers of their inodes. No answer."""

    inodes: tuple[int, ...]
