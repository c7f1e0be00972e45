"""Fencing: who may commit checkpoints to a run.

`RUN/owner.json` names the newest claimant. A process claims the run when it opens it, with an epoch one higher than
the recorded one, and looks again right before it commits: if another claim has replaced its own, it is fenced off.
Within one lineage (one rendezvous store) generations are comparable, so a claim by a lower generation than the
recorded one is refused at once. Another lineage is another launch; its job is asked first whether it lives (see
`storage.run.in_use`), and of two that claim all the same the newer one wins.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from pydantic import ConfigDict, Field

from storage.errors import Corrupt, Fenced, NotFound
from storage.format.layout import OWNER, heartbeat_name
from storage.format.sealed import Document, seal, unseal
from storage.stores.objects import ObjectStore, exists
from storage.verified.twice import read_document

log = logging.getLogger(__name__)

_KIND = "owner"


class Owner(Document):
    """One claim; `token` tells two claims of the same epoch apart (the last one written stands).

    `run_id` and `host` say whose it is; `run_id` is the job's name, "" if it has none. `rendezvous` is torchrun's
    `--rdzv-id`, "" if torchrun has not started the process. `failures` counts the claims before it that nobody has let
    go, `since_unix_s` is when the first one was made; 0 where that is not known.
    `adopts` are attempts of claims before this one that may still be committed: nodes' services hold all of what their
    dead workers had staged.
    """

    # a later version may say more about an owner: what fences is here already
    model_config = ConfigDict(extra="ignore", frozen=True)

    lineage: str
    generation: int = Field(ge=0)
    epoch: int = Field(ge=0)
    token: str
    run_id: str = ""
    host: str = ""
    rendezvous: str = ""
    failures: int = Field(0, ge=0)
    since_unix_s: float = Field(0.0, ge=0)
    adopts: tuple[str, ...] = ()

    @property
    def is_recognisable(self) -> bool:
        """Whether a later claim can be told to be the same job's, see `is_same_job`."""
        return bool(self.lineage) or self.rendezvous not in ("", "none")

    @property
    def who(self) -> str:
        """How messages call this owner."""
        name = f"job {self.run_id!r}" if self.run_id else "another job"
        return f"{name} (generation {self.generation}{f', on {self.host}' if self.host else ''})"


@dataclass(frozen=True)
class FailuresSeen:
    """How often the run's owners have ended without letting it go, in `age_s` since the first claim."""

    failures: int
    age_s: float


def next_owner(recorded: Owner | None, wanted: Owner) -> Owner:
    """`wanted` as the claim that follows `recorded`: with its epoch. Pure. Raises Fenced when it may not follow."""
    if recorded is None:
        return wanted.model_copy(update={"epoch": 1})
    if recorded.lineage == wanted.lineage and recorded.generation > wanted.generation:
        raise Fenced(
            f"generation {wanted.generation} may not take over from generation {recorded.generation} of the same launch"
        )
    return wanted.model_copy(update={"epoch": recorded.epoch + 1})


def is_same_job(recorded: Owner, mine: Owner) -> bool:
    """Whether `recorded` is an earlier claim of the job that claims `mine`. Pure.

    That is told by the lineage; without any, by torchrun's rendezvous, since torchrun ends its workers before it starts
    others there. Never by `run_id`: whoever gives two jobs one name says nothing about whether the first has ended.
    "none" is the rendezvous of every torchrun that was not given one.
    """
    if mine.lineage or recorded.lineage:
        return recorded.lineage == mine.lineage
    return mine.is_recognisable and recorded.rendezvous == mine.rendezvous


def read_owner(store: ObjectStore) -> Owner | None:
    """The recorded claim, None on a fresh run. Raises Corrupt."""
    try:
        return read_document(store, OWNER, lambda data: unseal(_KIND, Owner, data, OWNER))
    except NotFound:
        return None


def is_late(recorded: Owner, mine: Owner) -> bool:
    """Whether `recorded` was written by a process that `mine` has superseded. Pure.

    Claiming is a look and then a write, and the older process may have been paused between the two.
    """
    return recorded.lineage == mine.lineage and recorded.generation < mine.generation


def claim(store: ObjectStore, wanted: Owner) -> tuple[Owner, Owner | None]:
    """Record this process as the run's owner. Returns the claim, and the one that it replaces. Raises Fenced.

    The epoch of `wanted` counts for nothing: it becomes one more than the recorded one.
    """
    try:
        recorded = read_owner(store)
    except Corrupt as error:
        # tokens still fence every living owner off; only the order of generations is lost
        log.warning("taking the run over without knowing its last owner: %s", error)
        recorded = None
    return _record(store, next_owner(recorded, _with_history(store, recorded, wanted))), recorded


def _with_history(store: ObjectStore, recorded: Owner | None, wanted: Owner) -> Owner:
    """`wanted`, with what the run has seen before it: who has let go has removed the heartbeat."""
    if recorded is None:
        return wanted.model_copy(update={"since_unix_s": time.time()})
    was_cut = exists(store, heartbeat_name(recorded.token))
    since_unix_s = recorded.since_unix_s or time.time()
    return wanted.model_copy(update={"failures": recorded.failures + was_cut, "since_unix_s": since_unix_s})


def _record(store: ObjectStore, owner: Owner) -> Owner:
    store.put(OWNER, [seal(_KIND, owner)])
    recorded = read_owner(store)
    if recorded != owner:
        raise fenced(recorded, owner)
    return owner


class Claim:
    """This group's hold on a run; the coordinator asks it, from any thread."""

    def __init__(self, store: ObjectStore, owner: Owner) -> None:
        self._store = store
        self._owner = owner
        self._lock = threading.Lock()

    @property
    def failures(self) -> FailuresSeen:
        """What the run has seen of failures up to now."""
        since_unix_s = self._owner.since_unix_s  # 0: it is not recorded yet, and nothing is known
        return FailuresSeen(self._owner.failures, max(0.0, time.time() - since_unix_s) if since_unix_s else 0.0)

    @property
    def owner(self) -> Owner:
        """The claim as it is recorded."""
        return self._owner

    @property
    def token(self) -> str:
        """What tells this claim from all others."""
        return self._owner.token

    def recorded(self, owner: Owner) -> None:
        """The store has it now, as `owner`; until then it was held by its token alone."""
        with self._lock:
            if self._owner.epoch < owner.epoch:  # else a commit has recorded it once more meanwhile
                self._owner = owner

    def check(self) -> None:
        """Raise Fenced unless the run is still ours. A late claim of an older generation is claimed back."""
        self._check("")

    def of_attempt(self, attempt: str) -> AttemptClaim:
        """The hold of one attempt: it stands as well where a newer claim has adopted the attempt."""
        return AttemptClaim(self, attempt)

    def disown(self) -> None:
        """Let the attempts that were adopted be committed no more: the job goes on without them.

        Raises Fenced, Transient, Denied, Corrupt.
        """
        with self._lock:
            recorded = read_owner(self._store)
            if recorded is not None and recorded.token == self._owner.token:
                self._learn(recorded)
                self._owner = _record(self._store, self._owner.model_copy(update={"adopts": ()}))

    def _learn(self, recorded: Owner) -> None:
        """It is recorded, though whoever did so could not tell: what it has adopted, and the run has seen, is known."""
        if not self._owner.epoch:
            self._owner = recorded

    def _check(self, attempt: str) -> bool:
        """As `check`, for an attempt; whether the run is ours, and not a newer owner's who has adopted the attempt."""
        with self._lock:
            recorded = read_owner(self._store)
            if recorded is not None and recorded.token == self._owner.token:
                self._learn(recorded)
                return True  # of this very claim, perhaps recorded by another process that holds it as well
            if recorded is not None and attempt in recorded.adopts:
                return False
            if recorded is None or not is_late(recorded, self._owner):
                raise fenced(recorded, self._owner)
            log.warning("generation %d claimed the run late; it is claimed back", recorded.generation)
            mine = self._owner if self._owner.since_unix_s else _with_history(self._store, recorded, self._owner)
            self._owner = _record(self._store, next_owner(recorded, mine))
            return True


class AttemptClaim(Claim):
    """A claim in all that concerns one of its attempts."""

    def __init__(self, claim: Claim, attempt: str) -> None:
        super().__init__(claim._store, claim.owner)
        self._claim = claim
        self._attempt = attempt
        self.is_adopted = False
        """Whether a newer owner was found to have the run, which lets this attempt be committed."""

    def check(self) -> None:
        """See `Claim.check`."""
        self.is_adopted = not self._claim._check(self._attempt)


def fenced(recorded: Owner | None, mine: Owner) -> Fenced:
    """The error of the process that claimed `mine`, where `recorded` is the run's claim by now. Pure."""
    if recorded is None:
        now = f"nobody ({OWNER} is gone: somebody has removed it, or all of the run)"
    else:
        is_ours = recorded.lineage == mine.lineage
        now = f"{f'generation {recorded.generation}' if is_ours else recorded.who}, epoch {recorded.epoch}"
    return Fenced(f"the run now belongs to {now}; this process held epoch {mine.epoch}")
