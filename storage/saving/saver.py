"""The way of a save: what the ranks agree on, a copy of this rank's part, and the rest behind the training's back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from storage.arena.arena import Arena, Guard
from storage.arena.changes import StateChanged
from storage.arena.stager import Stager
from storage.events import CheckpointEvent, Reporter
from storage.pace.rules import Backlog, EverySteps, Tier
from storage.pace.schedule import Timer
from storage.ranks.agreement import AgreeingGroup
from storage.run.attempt import Attempt
from storage.saving.backlog import SaveQueue
from storage.saving.committer import Committer
from storage.saving.consensus import Agreed, Consensus, CopiedPart, Proposed
from storage.saving.options import SavingPlan
from storage.saving.proposal import Decision, Fate, Proposal, as_step
from storage.saving.replicas import ReplicaCheck
from storage.saving.uploads import SaveJob

_NUM_SLOTS = 2
_NUM_SLOTS_PARKED = 3
"""What waits in the service gives its memory up only when the next one has taken its place."""
_NUM_SLOTS_HELD = 5
"""Two states stay in memory while one is stored and the next is staged, and where copies to other nodes are slow one
more. A slot is made when it is first needed."""
_TOLD_S_MIN = 0.01  # a shorter wait holds nobody up


class Saver:
    """Saves for one group of ranks. `save` is a collective; all methods belong to the training's thread."""

    def __init__(
        self,
        group: AgreeingGroup,
        committer: Committer,
        report: Reporter,
        plan: SavingPlan,
        *,
        timeout_s: float,
        guard: Guard | None = None,
    ) -> None:
        self._group = group
        self._committer = committer
        self._report = report
        self._plan = plan
        self._timeout_s = timeout_s
        self._queue = SaveQueue(committer, report, plan.backlog, timeout_s)
        self._is_ram_away = False
        self._has_skipped = False
        self._replicas = ReplicaCheck(group, report)
        self._compared = Timer(EverySteps(plan.check_replicas)) if plan.check_replicas is not None else None
        self._consensus = Consensus(group, committer)
        self._arena = Arena(_num_slots(committer, plan), guard)
        self._stager = Stager(self._arena, plan.staging, keeps_spare=plan.backlog is Backlog.WAIT or committer.holds)

    def save(
        self,
        step: object,
        state: Mapping[str, Any],
        tier: Tier,
        *,
        healthy: bool,
        compare_ranks: bool,
        wait: bool | Literal["held"],
        asks: bool = False,
    ) -> Decision | None:
        """Return once the state is copied; the rest goes on in the background. What the ranks have decided, all alike.

        None where no save has begun: the step is committed already, or the memory for copies is full: then it is waited
        for, with `wait` whatever is said of a backlog, but not for ever.

        Args:
            wait: see `Checkpointer.save`; it is for the caller to wait.
            asks: see `Proposal`.

        Raises:
            Fenced, UsageError, StorageError: as `Checkpointer.save` says.
        """
        self._group.check_world()
        self._committer.confirm()
        started_s = time.monotonic()
        why_not = self._why_not(tier, must=bool(wait))
        waits = self._queue.waiting if tier is Tier.STORE else ""
        copying = self._committer.is_copying
        mine = Proposal(*as_step(step), why_not, waits, bool(healthy), asks=asks, is_copying=copying)
        proposed = self._consensus.propose(mine, state, compare_ranks=compare_ranks)
        with contextlib.ExitStack() as unless_saved:
            if (part := self._copied_ahead(mine, proposed)) is not None:
                unless_saved.callback(part.cancel)
            decision, agreed = proposed.settle()
            self._has_skipped = bool(decision.skip)
            if decision.skip:
                self._skip(decision.step, tier, decision.skip)
                return None
            self._is_ram_away = self._is_ram_away and tier is not Tier.RAM
            if agreed is None:
                return None
            if decision.gives_way:
                self._queue.drop(by=decision.step)
            if agreed.part is not proposed.part:
                unless_saved.close()
                part = None
            part = part or agreed.part.copy(self._stager, _Told(self._report, decision.step))
            unless_saved.pop_all()
        self._report(
            CheckpointEvent.STAGED,
            step=decision.step,
            seconds=round(time.monotonic() - started_s, 4),
            bytes=part.size_bytes,
            **({"overlapped": True} if part.is_pending else {}),
        )
        job = self._job(decision.step, agreed, part, tier, started_s)
        self._queue.put(replace(job, yields=wait == "held", copies=decision.copies))
        part.go_on(is_last=wait == "held")  # at the end: from here on the copy has a share of the processor
        return decision

    def _copied_ahead(self, mine: Proposal, proposed: Proposed) -> CopiedPart | None:
        """A copy of what this rank will write, made while the others' words are on their way, if most likely it will.

        Not after a save that was left out: if that is so again, the training would be held up by a copy for nothing.
        """
        if mine.step is None or mine.busy or mine.waiting or self._has_skipped or proposed.part is None:
            return None
        if self._committer.fate_of(mine.step) is not Fate.NONE:  # as where a stop comes with a save
            return None
        return proposed.part.copy(self._stager, _Told(self._report, mine.step))

    def _job(self, step: int, agreed: Agreed, part: CopiedPart, tier: Tier, started_s: float) -> SaveJob:
        return SaveJob(
            attempt=Attempt.of_step(step, agreed.attempt, self._group.world_size),
            rank=self._group.rank,
            payloads=part.payloads,
            contents=agreed.contents,
            started_s=started_s,
            staged=part.staged,
            staging_error=part.error,
            healthy=agreed.healthy,
            tier=tier,
        )

    def _why_not(self, tier: Tier, *, must: bool) -> str:
        """Why this rank cannot begin a save, once it has waited for as long as it is to; "" if it can."""
        if tier is Tier.RAM and not self._committer.holds:
            return "no checkpoint service holds states in memory here, which ram_every asks for"
        if why := self._queue.why_full(tier, must=must, has_room=self._arena.num_made > 1):
            return why
        if tier is Tier.STORE and self._queue.gives_memory:
            return ""
        patience_s = self._timeout_s if must or self._plan.backlog is Backlog.WAIT else 0.0
        return "" if self._arena.wait_free(patience_s) else "all the memory for copies is in use"

    def _skip(self, step: int, tier: Tier, reason: str) -> None:
        """Tell that a save is left out: each one for the store, those for memory once for as long as it is away."""
        is_told = tier is Tier.RAM and self._is_ram_away
        self._is_ram_away = self._is_ram_away or tier is Tier.RAM
        if self._group.is_coordinator and not is_told:
            self._report(CheckpointEvent.SKIPPED, step=step, reason=reason)

    def have_guarded(self) -> None:
        """Have the guard told of all slots, as it may have heard of none: it was started anew, say. Any thread."""
        self._stager.have_guarded()

    def go_on(self) -> None:
        """To be called now and then: hands over what waits for the save before it."""
        self._queue.go_on()

    def compares(self, step: int) -> bool:
        """Whether replicas are to be compared at `step` though nothing is saved. No collective."""
        return self._compared is not None and self._compared.asks(step)

    def check_replicas(self, step: int, state: Mapping[str, Any], *, saves: bool) -> None:
        """Compare replicas, where that is asked for and due, as it is before each save. Raises ReplicasDiffer."""
        if self._compared is None or not (saves or self.compares(step)):
            return
        self._compared.passed(step)
        self._replicas.check(step, state)

    def wait(self, *, held: bool = False) -> bool:
        """Block until the last save has committed or failed; True if it committed, or there was none.

        With `held` it is enough that this node's memory has this rank's part of it.
        """
        began_s = time.monotonic()
        self._queue.flush()
        committed = self._committer.wait(held=held)
        if (waited_s := time.monotonic() - began_s) >= _TOLD_S_MIN:
            self._report.tell_agent(CheckpointEvent.WAITED, seconds=round(waited_s, 3))
        return committed

    def forget(self) -> None:
        """Wait for the last save, and let its step be saved again: what it committed may turn out to be damaged."""
        self._queue.flush()
        self._committer.forget()

    def close(self, *, abandon: bool) -> None:
        """End after the last save; with `abandon` it waits for no other rank any more, and what waits is given up."""
        if abandon:
            self._queue.abandon()
        else:
            self._queue.flush()
        self._committer.close(abandon=abandon)
        self._stager.close()
        self._arena.close()
        self._group.close()


def _num_slots(committer: Committer, plan: SavingPlan) -> int:
    if committer.holds:
        return _NUM_SLOTS_HELD
    return _NUM_SLOTS_PARKED if plan.backlog is Backlog.REPLACE and plan.service is not False else _NUM_SLOTS


class _Told:
    """Tells of a save what is found out while it is copied behind the training's back."""

    def __init__(self, report: Reporter, step: int) -> None:
        self._report = report
        self._step = step

    def held(self, seconds: float) -> None:
        """See `StagingListener`."""
        self._report.tell_agent(CheckpointEvent.COPY_WAITED, step=self._step, seconds=round(seconds, 4))

    def changed(self, error: StateChanged) -> None:
        """See `StagingListener`."""
        reason = f"{error}; saves block until all is copied from now on"
        self._report(CheckpointEvent.STATE_CHANGED, step=self._step, name=error.name, reason=reason)
