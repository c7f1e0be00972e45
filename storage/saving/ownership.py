"""A job's hold on a run: the claim of its ranks, and the heartbeat that tells other jobs of it."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Collection
from typing import Self

from storage.errors import Corrupt, Fenced, StorageError, Transient, UsageError
from storage.events import CheckpointEvent, Reporter
from storage.format import layout
from storage.ranks.agreement import AgreeingGroup
from storage.run import heartbeat, in_use, owner
from storage.run.attempt import Attempt
from storage.run.heartbeat import Heartbeat
from storage.run.in_use import PreviousOwner
from storage.run.owner import Claim, Owner
from storage.saving.adoption import (
    FindHeld,
    UnfinishedPart,
    adoptable,
    dump_parts,
    load_parts,
    missing_ranks,
    settle,
)
from storage.saving.claiming import ClaimBehind
from storage.stores.objects import Capability, ObjectStore

log = logging.getLogger(__name__)

_AWAY_S = 5.0
_NOT_RECORDED = 0
"""The epoch of a claim that no store knows yet; those that are recorded begin with 1."""


class Ownership:
    """Claims a run for all ranks of a group, from `start` to `close`. The coordinator's heartbeat is all ranks'.

    Args:
        claimant: the job's claim, of which that of the coordinator counts.
        take_over: do not ask whether another job, which has the run, is alive.
        find_held: what this node's service still has to store for workers that are gone.
        can_wait: the job goes on from memory, so its claim is recorded behind its restore, and `confirm` waits for
            that. If the store is away it is recorded with the first commit, unless a job of another lineage has the run
            by then. All ranks say the same.
    """

    def __init__(
        self,
        store: ObjectStore,
        group: AgreeingGroup,
        claimant: Owner,
        report: Reporter,
        *,
        take_over: bool,
        find_held: FindHeld = tuple,
        can_wait: bool = False,
    ) -> None:
        self._store = store
        self._group = group
        self._claimant = claimant
        self._report = report
        self._take_over = take_over
        self._claim: Claim | None = None
        self._heartbeat: Heartbeat | None = None  # coordinator
        self._fenced: str | None = None
        self._find_held = find_held
        self._can_wait = can_wait
        self._adopted: list[Attempt] = []  # coordinator
        self._behind: ClaimBehind | None = None  # coordinator, while it is not settled
        self._is_confirmed = not can_wait
        self._is_closed = False

    @property
    def claim(self) -> Claim:
        """What the coordinator asks before it commits; there is one after `start`."""
        assert self._claim is not None, "start comes first"
        return self._claim

    @property
    def fenced(self) -> str | None:
        """Why this process can never commit again, once a save or a look every 5 s has found out (coordinator)."""
        return self._fenced or (self._heartbeat.fenced if self._heartbeat is not None else None)

    def note(self, error: Fenced) -> None:
        """A save has found that another process owns the run."""
        self._fenced = str(error)

    def start(self) -> Self:
        """Claim the run, or begin to. A collective. Raises InUse, Fenced, UsageError, Transient, Denied."""
        try:
            held = load_parts(self._group.gather(dump_parts(self._find_held)) or [])
            if self._can_wait:
                self._begin_behind(held)
                return self
            claimed = self._group.on_coordinator(lambda: self._claim_run(held).model_dump())
            self._claim = Claim(self._store, Owner(**claimed))
            self._group.everywhere(functools.partial(self._check_shared, self._store))
            self._group.on_coordinator(self._check_conditions)
        except BaseException:
            self.close()
            raise
        return self

    def confirm(self) -> None:
        """Wait until the claim stands that was begun behind a restore; to be called before a save. A collective once.

        Where the store is away by then, that all ranks see the claim is looked at with the next save.

        Raises: see `start`; but no Transient.
        """
        if self._is_confirmed:
            return
        recorded: bool = self._group.on_coordinator(self._is_recorded)
        if recorded:
            try:
                self._group.everywhere(functools.partial(self._check_shared, self._store.impatient(_AWAY_S)))
            except Transient as error:  # on all ranks; the save that comes now tells what becomes of it
                log.warning("whether all ranks see who has %s is looked at again: %s", self._store.url, error)
                return
        self._is_confirmed = True

    def await_claim(self) -> None:
        """Wait until the run is claimed, or will not be before the first commit (coordinator). Raises as `start`."""
        self._is_recorded()

    def await_look(self) -> None:
        """Wait until it is known that no other job has the run, where that is found out behind a restore (coordinator).

        Raises InUse, Fenced, Denied.
        """
        if self._behind is not None:
            self._behind.await_look()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def adopted_step(self) -> int:
        """The newest step that was adopted, or may be, and not waited for yet; -1 if there is none (coordinator)."""
        adopted = self._adopted if self._behind is None else [*self._behind.may_adopt, *self._adopted]
        return max((attempt.step for attempt in adopted), default=-1)

    def settle(self) -> None:
        """Wait for what was adopted: it is newer than what is committed (coordinator).

        Raises what the claim fails with, where that was begun behind a restore.
        """
        self._is_recorded()
        if settle(self._store, self._adopted):
            try:
                self.claim.disown()
            except StorageError as error:
                log.warning("what was adopted may yet be committed beside what is saved from here on: %s", error)
        self._adopted = []

    def announce_end(self) -> None:
        """Tell who waits for the run that it will soon be let go."""
        if self._heartbeat is not None:
            self._heartbeat.announce_end()

    def close(self) -> None:
        """Let the run go."""
        self._is_closed = True
        if self._behind is not None:
            self._behind.close()
        if self._heartbeat is not None:
            self._heartbeat.close()

    def _claim_run(self, held: Collection[UnfinishedPart]) -> Owner:
        """Claim the run (coordinator), and what services `held` hold of it. Raises InUse, Fenced."""
        find = in_use.find_other if self._take_over else in_use.await_free
        return self._record(held, find(self._store, self._claimant))

    def _begin_behind(self, held: Collection[UnfinishedPart]) -> None:
        """Have the run claimed on a thread: what is read from memory needs no claim. A collective."""
        mine = self._group.on_coordinator(self._claimant.model_copy(update={"epoch": _NOT_RECORDED}).model_dump)
        self._claim = Claim(self._store, Owner(**mine))
        if self._group.is_coordinator:
            self._behind = ClaimBehind(missing_ranks(held)).start(functools.partial(self._claim_behind, held))

    def _claim_behind(
        self, held: Collection[UnfinishedPart], looked: Callable[[], None], keep_away: Callable[[], None]
    ) -> bool:
        """As `_claim_run`, on a thread; whether it is recorded. See `storage.saving.claiming.Claims`."""
        try:
            try:
                recorded = owner.read_owner(self._store.impatient(_AWAY_S))
            except Corrupt:
                recorded = None
            other = None
            if recorded is not None and not owner.is_same_job(recorded, self._claimant):
                find = in_use.find_other if self._take_over else in_use.await_free
                other = find(self._store, self._claimant)
            looked()
            if self._is_closed:  # while nobody answered: a later Checkpointer may have the run by now
                return False
            keep_away()
            mine = self._record(held, other)
        except Transient as error:
            self._report(CheckpointEvent.CLAIMED_LATER, url=self._store.url, reason=str(error))
            self._beat(self.claim.owner, None)
            return False
        self.claim.recorded(mine)
        try:
            self._check_conditions()
        except StorageError as error:
            log.warning("whether %s honours conditions is not known: %s", self._store.url, error)
        return True

    def _is_recorded(self) -> bool:
        """Whether the run is claimed, once that is settled (coordinator). Raises as `start`."""
        if self._behind is not None:
            self._behind.settle()
            self._behind = None
        return self.claim.owner.epoch != _NOT_RECORDED

    def _record(self, held: Collection[UnfinishedPart], other: PreviousOwner | None) -> Owner:
        """Record the claim, which takes the run over from `other`. Raises Fenced."""
        heartbeat.write(self._store, self._claimant.token, 0)  # before the claim: one without a beat is free to take
        try:
            self._adopted = adoptable(self._store, held)
            adopts = tuple(attempt.id for attempt in self._adopted)
            mine, before = owner.claim(self._store, self._claimant.model_copy(update={"adopts": adopts}))
        except Fenced:
            self._store.delete(layout.heartbeat_name(self._claimant.token))
            raise
        replaced_token = None if before is None else before.token
        self._beat(mine, replaced_token)
        if adopts:
            steps = [attempt.step for attempt in self._adopted]
            self._report(CheckpointEvent.ADOPTED, url=self._store.url, steps=steps)
        if other is not None:
            of = other.owner.who
            self._report(CheckpointEvent.TAKEN_OVER, url=self._store.url, by=mine.who, of=of, reason=other.reason)
        return mine

    def _beat(self, mine: Owner, replaced_token: str | None) -> None:
        self._heartbeat = Heartbeat(self._store, mine, replaced_token, self._report).start()
        # who forgets to close must not keep the run from others, and from itself; at exit it closes by itself
        weakref.finalize(self, self._heartbeat.stop).atexit = False
        if self._is_closed:  # while the store did not answer
            self._heartbeat.close()

    def _check_shared(self, store: ObjectStore) -> None:
        """A folder of each node's own would let every save wait for receipts that can never be seen."""
        if owner.read_owner(store) is None:
            raise UsageError(
                f"rank {self._group.rank} does not see in {self._store.url} what rank 0 wrote there; the checkpoint URL"
                " must be storage that all nodes share"
            )

    def _check_conditions(self) -> None:
        """A degraded store is told at once: a race between two owners is found by reading back only."""
        if not self._store.can(Capability.CONDITIONAL_PUTS):
            self._report(CheckpointEvent.UNCONDITIONAL, url=self._store.url)
