"""A job's hold on a run: the claim of its ranks, and the heartbeat that tells other jobs of it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection
from typing import Self

from storage.errors import Corrupt, Fenced, StorageError, Transient, UsageError
from storage.events import CheckpointEvent, Reporter
from storage.format import layout
from storage.ranks.agreement import AgreeingGroup
from storage.run import heartbeat, in_use, owner
from storage.run.attempt import Attempt
from storage.run.heartbeat import Heartbeat
from storage.run.owner import Claim, Owner
from storage.saving.adoption import FindHeld, UnfinishedPart, adoptable, dump_parts, load_parts, settle
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
        can_wait: the job goes on from memory if the store is away: then its claim is recorded with its first commit,
            unless a job of another lineage has the run by then. All ranks say the same.
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
        """Claim the run. A collective. Raises InUse, Fenced, UsageError, Transient, Denied."""
        try:
            held = load_parts(self._group.gather(dump_parts(self._find_held)) or [])
            claimed = self._group.on_coordinator(lambda: self._claim_run(held).model_dump())
            self._claim = Claim(self._store, Owner(**claimed))
            if self._claim.owner.epoch == _NOT_RECORDED:
                return self
            self._group.everywhere(self._check_shared)
            self._group.on_coordinator(self._check_conditions)
        except BaseException:
            self.close()
            raise
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def adopted_step(self) -> int:
        """The newest step that was adopted, and not waited for yet; -1 if there is none (coordinator)."""
        return max((attempt.step for attempt in self._adopted), default=-1)

    def settle(self) -> None:
        """Wait for what was adopted: it is newer than what is committed (coordinator). Raises nothing."""
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
        if self._heartbeat is not None:
            self._heartbeat.close()

    def _claim_run(self, held: Collection[UnfinishedPart]) -> Owner:
        """Claim the run (coordinator), and what services `held` hold of it. Raises InUse, Fenced."""
        if self._can_wait and (why := self._why_away()) is not None:
            self._report(CheckpointEvent.CLAIMED_LATER, url=self._store.url, reason=why)
            mine = self._claimant.model_copy(update={"epoch": _NOT_RECORDED})
            self._beat(mine, None)
            return mine
        find = in_use.find_other if self._take_over else in_use.await_free
        other = find(self._store, self._claimant)
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

    def _why_away(self) -> str | None:
        """Why the store cannot be asked for its owner now; None if it can."""
        try:
            owner.read_owner(self._store.impatient(_AWAY_S))
        except Transient as error:
            return str(error)
        except Corrupt:
            pass
        return None

    def _beat(self, mine: Owner, replaced_token: str | None) -> None:
        self._heartbeat = Heartbeat(self._store, mine, replaced_token, self._report).start()
        # who forgets to close must not keep the run from others, and from itself; at exit it closes by itself
        weakref.finalize(self, self._heartbeat.stop).atexit = False

    def _check_shared(self) -> None:
        """A folder of each node's own would let every save wait for receipts that can never be seen."""
        if owner.read_owner(self._store) is None:
            raise UsageError(
                f"rank {self._group.rank} does not see in {self._store.url} what rank 0 wrote there; the checkpoint URL"
                " must be storage that all nodes share"
            )

    def _check_conditions(self) -> None:
        """A degraded store is told at once: a race between two owners is found by reading back only."""
        if not self._store.can(Capability.CONDITIONAL_PUTS):
            self._report(CheckpointEvent.UNCONDITIONAL, url=self._store.url)
