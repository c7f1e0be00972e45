"""What a rank asks of its own node's memory, whichever way it reaches the process that holds it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from pydantic import Field, TypeAdapter, ValidationError

from storage.errors import Corrupt
from storage.format.sealed import Document
from storage.held.buddies import PeerCard
from storage.held.inventory import PartKey
from storage.held.papers import PartLabel


class LocalMemory(Protocol):
    """A node's memory of states, as its ranks have it. Every method raises a StorageError where it is out of reach."""

    def card(self) -> PeerCard:
        """How the ranks and services of other nodes reach it."""

    def meet(self, cards: Sequence[PeerCard]) -> None:
        """These are all nodes of the job, this one among them: its copies go to one of them from now on."""

    def labels(self, run: str) -> Sequence[PartLabel]:
        """What is held of the run with that URL."""

    def num_restores(self) -> dict[str, int]:
        """How often the job has gone on from each attempt that is held, and staged nothing since."""

    def descriptors(self, part: PartKey) -> Sequence[int]:
        """Descriptors of a part, the caller's to close (see `storage.held.own_memory`). Raises NotFound."""

    def restored(self, attempt: str, step: int) -> None:
        """The job goes on from that attempt."""

    def make_way(self, seconds: float) -> None:
        """A whole job waits for what is done now: nothing is to be stored or copied behind it, for at most so long."""

    def way_free(self, after_s: float = 0.0) -> None:
        """Nobody waits any more: what stands still goes on after so long."""

    def drop(self, attempts: Collection[str] | None, reason: str) -> None:
        """Hold those attempts no longer, or nothing of all that is held: they are not to be gone on from."""


class Offer(Document):
    """What one node has to offer to a restore."""

    card: PeerCard
    labels: tuple[PartLabel, ...] = ()
    num_restores: dict[str, int] = Field(default_factory=dict)


_offer = TypeAdapter(Offer)


def dump_offer(offer: Offer) -> bytes:
    """JSON for the way to the other ranks."""
    return _offer.dump_json(offer)


def load_offer(data: bytes) -> Offer:
    """Read what `dump_offer` wrote. Raises Corrupt."""
    try:
        return _offer.validate_json(data)
    except ValidationError as error:
        raise Corrupt(f"what a node offers is no offer ({error.error_count()} errors)") from None
