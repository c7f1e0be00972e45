"""When the ranks of a group save: the schedule of `storage.pace`, with a clock, and one answer on all ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from storage.events import CheckpointEvent, Reporter
from storage.format.layout import as_step
from storage.pace.cost import Meter, interval_s, mean_time_between_failures_s
from storage.pace.rules import Continuously, Tier
from storage.pace.schedule import Answer, Schedule, Seen
from storage.ranks.agreement import AgreeingGroup
from storage.run.owner import FailuresSeen
from storage.saving.options import SavingPlan

_TOLD_RATIO = 1.25
"""The pace is told anew once it has changed by this factor."""


@dataclass(frozen=True)
class _Saving:
    """The save into the store that is under way (coordinator)."""

    step: int
    began_s: float
    blocked_s: float = 0.0


class Pacer:
    """Says which steps are saved. Its methods belong to the training's thread, but for `hear`.

    `due` is a collective at those steps only at which a rule that goes by time wants to be asked; all ranks know these.

    Args:
        failures: what the run has seen of them (coordinator).
        give_up_s: a save that has not ended after so long counts as ended.
    """

    def __init__(
        self,
        group: AgreeingGroup,
        plan: SavingPlan,
        report: Reporter,
        failures: Callable[[], FailuresSeen],
        *,
        give_up_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group = group
        self._schedule = Schedule(plan.every, plan.ram_every)
        self._saves_each = plan.every is None
        self._report = report
        self._failures = failures
        self._give_up_s = give_up_s
        self._clock = clock
        self._meter = Meter()
        self._began_s = dict.fromkeys(Tier, clock())
        self._saving: _Saving | None = None
        self._answered: tuple[int, Tier | None] | None = None
        self._told_s: float | None = None
        self._lock = threading.Lock()  # guards the meter and what is being saved: `hear` is called from any thread
        report.also(self.hear)

    def due(self, step: int) -> Tier | None:
        """Where the state after `step` is to be saved, None for nowhere; the same on all ranks, however often asked."""
        if self._saves_each:
            return Tier.STORE
        step = as_step(step)
        if self._answered is not None and self._answered[0] == step:
            return self._answered[1]
        self._count(step)
        asking = self._schedule.asking(step)
        if any(timer.goes_by_time for timer in asking.values()):
            answer = _load(self._group.on_coordinator(lambda: _dump(self._schedule.decide(step, self._seen()))))
        else:
            answer = self._schedule.decide(step, {})
        self._schedule.follow(step, answer)
        self._answered = (step, answer.tier)
        return answer.tier

    def resume(self, step: int) -> None:
        """The training goes on from `step`, which was restored."""
        self._schedule.resume(step)
        self._began_s = dict.fromkeys(Tier, self._clock())

    def began(self, step: int, tier: Tier) -> None:
        """A save of `step` begins."""
        now_s = self._clock()
        self._began_s[Tier.RAM] = now_s
        if tier is Tier.STORE:
            self._began_s[Tier.STORE] = now_s
            with self._lock:
                self._saving = _Saving(step, now_s)

    def returned(self, *, is_saving: bool) -> None:
        """The training goes on after a call of `save`, which has begun a save or not."""
        now_s = self._clock()
        with self._lock:
            self._meter.resume(now_s)
            if self._saving is not None:
                saving = _Saving(self._saving.step, self._saving.began_s, now_s - self._saving.began_s)
                self._saving = saving if is_saving else None

    def hear(self, event: CheckpointEvent, fields: Mapping[str, Any]) -> None:
        """What becomes of saves. From any thread."""
        with self._lock:
            saving = self._saving
            ends = event in (CheckpointEvent.COMMITTED, CheckpointEvent.FAILED)
            if saving is None or not ends or fields.get("step") != saving.step:
                return
            self._saving = None
            if event == CheckpointEvent.FAILED:
                return
            total_s = self._clock() - saving.began_s
            # one that has ended before `save` returned has held the training up all the time
            self._meter.saved(saving.blocked_s or total_s, total_s)
        self._tell(saving.step)

    def _count(self, step: int) -> None:
        now_s = self._clock()
        with self._lock:
            if self._saving is not None and now_s - self._saving.began_s > self._give_up_s:
                self._saving = None
            self._meter.step(step, now_s, is_saving=self._saving is not None)

    def _seen(self) -> dict[Tier, Seen]:
        floor_s = self._floor_s()
        with self._lock:
            cost, step_s, is_saving = self._meter.cost, self._meter.step_s, self._saving is not None
        now_s = self._clock()
        return {
            tier: Seen(now_s, self._began_s[tier], step_s, is_saving, cost.total_s, floor_s)
            if tier is Tier.STORE
            else Seen(now_s, self._began_s[tier], step_s)
            for tier in Tier
        }

    def _floor_s(self) -> float:
        """How far apart saves are at least that go by themselves."""
        seen = self._failures()
        with self._lock:
            cost_s = self._meter.cost.cost_s
        return interval_s(cost_s, mean_time_between_failures_s(seen.age_s, seen.failures))

    def _tell(self, step: int) -> None:
        """Tell of the pace, where it goes by itself and has changed."""
        timer = self._schedule.timers.get(Tier.STORE)
        if timer is None or not isinstance(timer.rule, Continuously) or not self._group.is_coordinator:
            return
        floor_s = self._floor_s()
        if self._told_s is not None and self._told_s / _TOLD_RATIO <= floor_s <= self._told_s * _TOLD_RATIO:
            return
        self._told_s = floor_s
        seen = self._failures()
        with self._lock:
            cost = self._meter.cost
        self._report(
            CheckpointEvent.PACE,
            step=step,
            seconds=round(floor_s, 3),
            cost_s=round(cost.cost_s, 4),
            save_s=round(cost.total_s, 3),
            failures=seen.failures,
            mtbf_s=round(mean_time_between_failures_s(seen.age_s, seen.failures), 1),
        )


def _dump(answer: Answer) -> dict[str, Any]:
    return {"tier": answer.tier, "next_steps": answer.next_steps}


def _load(told: Mapping[str, Any]) -> Answer:
    tier = told["tier"]
    return Answer(None if tier is None else Tier(tier), {Tier(name): step for name, step in told["next_steps"].items()})
