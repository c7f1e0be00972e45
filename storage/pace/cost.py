"""What a save costs the training, and how often it pays. Pure.

Where saves are rare, much is done again after a failure; where they are frequent, they cost time themselves. With a
cost C of a save and a mean time M between failures, the sum is least at an interval of sqrt(2 C M) for a C that is
small beside M (Young, CACM 17(9), 1974); Daly (FGCS 22(3), 2006, eq. 37) corrects that for larger ones.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

PRIOR_S = 3600.0
"""A job that has seen no failure yet is taken for one that will see its first after an hour, or as long again."""
_NUM_REMEMBERED = 32


def mean_time_between_failures_s(age_s: float, failures: int) -> float:
    """What is to be expected of a job that in `age_s` has seen so many failures."""
    return (PRIOR_S + max(0.0, age_s)) / (failures + 1)


def interval_s(cost_s: float, mtbf_s: float) -> float:
    """Daly's interval from the beginning of a save to that of the next, at which least time is lost."""
    if cost_s <= 0:
        return 0.0
    if cost_s >= 2 * mtbf_s:
        return mtbf_s + cost_s
    ratio = cost_s / (2 * mtbf_s)
    young_s = math.sqrt(2 * cost_s * mtbf_s)
    # Daly's is from the end of a save to the beginning of the next
    return young_s * (1 + math.sqrt(ratio) / 3 + ratio / 9)


@dataclass(frozen=True)
class Cost:
    """Of one save, in seconds of the training: `blocked_s` it stood still, `slower_s` its steps took longer by then.

    `total_s`: from the beginning of the save to its end, behind the training.
    """

    blocked_s: float = 0.0
    slower_s: float = 0.0
    total_s: float = 0.0

    @property
    def cost_s(self) -> float:
        """All that a save takes from the training."""
        return self.blocked_s + self.slower_s


class Meter:
    """Measures steps and saves by the times at which they began and ended. Not thread-safe.

    A step during a save counts apart from the others. How much longer it took is known once there were others, and of
    either the median counts, so that an evaluation between two steps is no cost of a save.
    """

    def __init__(self) -> None:
        self._quiet: deque[float] = deque(maxlen=_NUM_REMEMBERED)
        self._busy: list[float] = []
        self._last: tuple[int, float] | None = None
        self._was_saving = False
        self._blocked_s = 0.0
        self.cost = Cost()
        """Smoothed over the saves so far."""
        self.num_saves = 0

    @property
    def step_s(self) -> float | None:
        """How long a step takes, saves aside; None before two steps were seen."""
        known = self._quiet or self._busy
        return statistics.median(known) if known else None

    def step(self, step: int, now_s: float, *, is_saving: bool) -> None:
        """`step` is complete, and a save is under way or not."""
        if self._last is not None and step > self._last[0]:
            each_s = max(0.0, now_s - self._last[1]) / (step - self._last[0])
            if is_saving and self._was_saving:
                self._busy.append(each_s)
                del self._busy[: -8 * _NUM_REMEMBERED]
            elif not is_saving and not self._was_saving:
                self._quiet.append(each_s)
        self._last, self._was_saving = (step, now_s), is_saving

    def resume(self, now_s: float) -> None:
        """The training goes on at `now_s`: what has passed since the last step was no part of a step."""
        if self._last is not None:
            self._last = (self._last[0], now_s)

    def saved(self, blocked_s: float, total_s: float) -> None:
        """A save has ended, `total_s` after it began, for `blocked_s` of which the training stood still."""
        slower_s = 0.0
        if self._quiet and self._busy:
            usual_s = statistics.median(self._quiet)
            slower_s = max(0.0, statistics.median(self._busy) - usual_s) * len(self._busy)
            slower_s = min(slower_s, total_s)
        self._busy.clear()
        new = Cost(blocked_s, slower_s, total_s)
        weight = 1.0 if not self.num_saves else 0.3
        self.cost = Cost(*(weight * b + (1 - weight) * a for a, b in zip(_row(self.cost), _row(new), strict=True)))
        self.num_saves += 1


def _row(cost: Cost) -> tuple[float, float, float]:
    return cost.blocked_s, cost.slower_s, cost.total_s
