"""At which steps the ranks ask whether to save, and what the answer is. Pure.

A rule of steps is answered by each rank itself. Where a rule goes by time, the coordinator's clock alone counts, and
the others hear of it only at steps that were agreed on before: each answer says at which step to ask again. Half of the
time that is left is let go by in between, as long as that is more than a few steps: an interval takes some ten looks
however many steps it has, and steps that get slower make it late by what they were slower in that half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from storage.pace.rules import Continuously, EverySeconds, EverySteps, Rule, Tier

_FEW_STEPS = 4
_LOOK_AGAIN_RATIO = 0.05
"""A save that takes longer than the ones before is asked for again after this part of the time that it has taken."""


@dataclass(frozen=True)
class Seen:
    """What the coordinator knows at a look; all in seconds, `now_s` by its clock.

    `began_s`: when the last save of this tier began, or the training; `step_s`: of a step, None if not known yet;
    `save_s`: how long saves take, 0 if not known; `floor_s`: how far apart they are at least where it goes by itself.
    """

    now_s: float
    began_s: float
    step_s: float | None
    is_saving: bool = False
    save_s: float = 0.0
    floor_s: float = 0.0


@dataclass(frozen=True)
class Look:
    """The answer to a look by a rule of time: whether to save now, and at which step to look again."""

    is_due: bool
    next_step: int


def look(rule: EverySeconds | Continuously, step: int, seen: Seen) -> Look:
    """What the coordinator says at `step`."""
    gone_s = seen.now_s - seen.began_s
    half_step_s = (seen.step_s or 0.0) / 2
    if isinstance(rule, EverySeconds):
        left_s, interval_s = rule.seconds - gone_s, rule.seconds
    elif seen.is_saving:
        interval_s = max(seen.floor_s, seen.save_s)
        left_s = max(interval_s - gone_s, gone_s * _LOOK_AGAIN_RATIO)
        return Look(False, step + _steps(left_s, seen.step_s))
    else:
        left_s, interval_s = seen.floor_s - gone_s, max(seen.floor_s, seen.save_s)
    if left_s <= half_step_s:
        return Look(True, step + _steps(interval_s, seen.step_s))
    return Look(False, step + _steps(left_s, seen.step_s))


def _steps(left_s: float, step_s: float | None) -> int:
    """After how many steps to look again, with so much time left."""
    if not step_s:
        return 1
    steps = left_s / step_s
    # the longer it is, the less a guess of how long steps take is good for
    return max(1, math.floor(steps / 2) if steps > 2 * _FEW_STEPS else round(steps))


class Timer:
    """One rule's part of the schedule. Every rank has it, and is told of the same steps."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._last: int | None = None
        self._next = 0

    @property
    def goes_by_time(self) -> bool:
        """Whether the coordinator has to be asked."""
        return not isinstance(self.rule, EverySteps)

    def asks(self, step: int) -> bool:
        """Whether something is to be decided at `step`. For a rule of steps, that is the decision."""
        if not isinstance(self.rule, EverySteps):
            # steps that are counted anew, in each epoch say, never come to where the last look has pointed
            return step >= self._next or (self._last is not None and step < self._last)
        if self._last is None:
            return step % self.rule.steps == 0
        return step // self.rule.steps > self._last // self.rule.steps

    def passed(self, step: int) -> None:
        """`step` was decided on, or a training goes on from it."""
        self._last = step

    def look_at(self, step: int) -> None:
        """The next step at which to ask."""
        self._next = step


@dataclass(frozen=True)
class Answer:
    """What all ranks do at a step: `tier` of the save, None for no save; by tier, the next steps to ask at."""

    tier: Tier | None
    next_steps: dict[Tier, int]


class Schedule:
    """The rules of all tiers; a save into the store is also one into RAM."""

    def __init__(self, store: Rule | None, ram: Rule | None) -> None:
        self.timers = {tier: Timer(rule) for tier, rule in ((Tier.STORE, store), (Tier.RAM, ram)) if rule is not None}

    def asking(self, step: int) -> dict[Tier, Timer]:
        """The timers with something to decide at `step`."""
        return {tier: timer for tier, timer in self.timers.items() if timer.asks(step)}

    def decide(self, step: int, seen: dict[Tier, Seen]) -> Answer:
        """What to do at `step`; `seen` has an entry for each rule of time that asks (coordinator), or for none."""
        due, next_steps = set(), {}
        for tier, timer in self.asking(step).items():
            if isinstance(timer.rule, EverySteps):
                due.add(tier)
                continue
            found = look(timer.rule, step, seen[tier])
            next_steps[tier] = found.next_step
            if found.is_due:
                due.add(tier)
        return Answer(Tier.STORE if Tier.STORE in due else Tier.RAM if due else None, next_steps)

    def follow(self, step: int, answer: Answer) -> None:
        """Do as was decided (all ranks)."""
        for tier, next_step in answer.next_steps.items():
            self.timers[tier].look_at(next_step)
        for timer in self.timers.values():
            timer.passed(step)

    def resume(self, step: int) -> None:
        """A training goes on from `step`, which needs no save."""
        for timer in self.timers.values():
            timer.passed(step)
            timer.look_at(step + 1)
