"""Fencing: who may commit checkpoints to a run.

`RUN/owner.json` names the newest claimant. A process claims the run when it opens it, with an epoch one higher than
the recorded one, and looks again right before it commits: if another claim has replaced its own, it is fenced off.
Within one lineage (one rendezvous store) generations are comparable, so a claim by a lower generation than the
recorded one is refused at once; another lineage is another launch, and the newer launch wins.
"""

from __future__ import annotations

import logging

from pydantic import ConfigDict, Field

from storage.errors import Corrupt, Fenced, NotFound
from storage.layout import OWNER
from storage.objects import ObjectStore
from storage.sealed import Document, seal, unseal

log = logging.getLogger(__name__)

_KIND = "owner"


class Owner(Document):
    """One claim; `token` tells two claims of the same epoch apart (the last one written stands)."""

    # a later version may say more about an owner: what fences is here already
    model_config = ConfigDict(extra="ignore", frozen=True)

    lineage: str
    generation: int = Field(ge=0)
    epoch: int = Field(ge=0)
    token: str


def next_owner(recorded: Owner | None, lineage: str, generation: int, token: str) -> Owner:
    """The claim that follows `recorded`. Pure. Raises Fenced when it may not follow."""
    if recorded is None:
        return Owner(lineage=lineage, generation=generation, epoch=1, token=token)
    if recorded.lineage == lineage and recorded.generation > generation:
        raise Fenced(
            f"generation {generation} may not take over from generation {recorded.generation} of the same launch"
        )
    return Owner(lineage=lineage, generation=generation, epoch=recorded.epoch + 1, token=token)


def read_owner(store: ObjectStore) -> Owner | None:
    """The recorded claim, None on a fresh run. Raises Corrupt."""
    try:
        return unseal(_KIND, Owner, store.read(OWNER), OWNER)
    except NotFound:
        return None


def claim(store: ObjectStore, lineage: str, generation: int, token: str) -> Owner:
    """Record this process as the run's owner and return the claim. Raises Fenced."""
    try:
        recorded = read_owner(store)
    except Corrupt as error:
        # tokens still fence every living owner off; only the order of generations is lost
        log.warning("taking the run over without knowing its last owner: %s", error)
        recorded = None
    owner = next_owner(recorded, lineage, generation, token)
    store.put(OWNER, [seal(_KIND, owner)])
    check(store, owner)
    return owner


def check(store: ObjectStore, mine: Owner) -> None:
    """Raise Fenced unless the recorded claim is still `mine`."""
    recorded = read_owner(store)
    if recorded != mine:
        who = "nobody" if recorded is None else f"generation {recorded.generation}, epoch {recorded.epoch}"
        raise Fenced(f"the run now belongs to {who}; this process held epoch {mine.epoch}")
