"""Fencing: who may commit checkpoints to a run.

`RUN/owner.json` names the newest claimant. A process claims the run when it opens it, with an epoch one higher than
the recorded one, and looks again right before it commits: if another claim has replaced its own, it is fenced off.
Within one lineage (one rendezvous store) generations are comparable, so a claim by a lower generation than the
recorded one is refused at once; another lineage is another launch, and the newer launch wins.
"""

from __future__ import annotations

import logging
import threading

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


def is_late(recorded: Owner, mine: Owner) -> bool:
    """Whether `recorded` was written by a process that `mine` has superseded. Pure.

    Claiming is a look and then a write, and the older process may have been paused between the two.
    """
    return recorded.lineage == mine.lineage and recorded.generation < mine.generation


def claim(store: ObjectStore, lineage: str, generation: int, token: str) -> Owner:
    """Record this process as the run's owner and return the claim. Raises Fenced."""
    try:
        recorded = read_owner(store)
    except Corrupt as error:
        # tokens still fence every living owner off; only the order of generations is lost
        log.warning("taking the run over without knowing its last owner: %s", error)
        recorded = None
    return _record(store, next_owner(recorded, lineage, generation, token))


def _record(store: ObjectStore, owner: Owner) -> Owner:
    store.put(OWNER, [seal(_KIND, owner)])
    recorded = read_owner(store)
    if recorded != owner:
        raise _fenced(recorded, owner)
    return owner


class Claim:
    """This group's hold on a run; the coordinator asks it, from any thread."""

    def __init__(self, store: ObjectStore, owner: Owner) -> None:
        self._store = store
        self._owner = owner
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise Fenced unless the run is still ours. A late claim of an older generation is claimed back."""
        with self._lock:
            recorded = read_owner(self._store)
            if recorded == self._owner:
                return
            if recorded is None or not is_late(recorded, self._owner):
                raise _fenced(recorded, self._owner)
            log.warning("generation %d claimed the run late; it is claimed back", recorded.generation)
            mine = self._owner
            self._owner = _record(self._store, next_owner(recorded, mine.lineage, mine.generation, mine.token))


def _fenced(recorded: Owner | None, mine: Owner) -> Fenced:
    who = "nobody" if recorded is None else f"generation {recorded.generation}, epoch {recorded.epoch}"
    return Fenced(f"the run now belongs to {who}; this process held epoch {mine.epoch}")
