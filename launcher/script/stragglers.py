"""Which rank keeps the others waiting. No clock, no torch: times come in, and what is exchanged goes out as numbers.

In lock-step all ranks have the same step time, so what counts is a rank's own part of it, taken in two ways:

- *arrival*: from the end of one `should_stop` to the start of the next. Whoever has no other collective in its steps
  shows every kind of slowness there: the last to arrive waits for nobody.
- *work*: what the script itself gave as `busy_s`, else the CPU time of the thread that beats. A rank that waits in a
  collective between two step boundaries waits asleep (gloo), so this shows a slow rank also where gradients are
  reduced within the step, and arrivals are all alike.

Each rank takes the median of a window of steps (an evaluation or a checkpoint now and then is no slowness), and all
exchange them in the all-reduce that `should_stop` does anyway, made a little longer once a window.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

WINDOW = 32
_FACTOR = 1.5
_SHARE = 0.1
_NUM_FIGURES = 2


class Figure(StrEnum):
    """A rank's own part of a step, in the order in which ranks exchange them."""

    ARRIVAL = "arrival"
    WORK = "work"


@dataclass(frozen=True)
class Straggler:
    """A rank that is slow: by which figure, its own seconds a step, the median of the others', and a step's length."""

    rank: int
    by: Figure
    own_s: float
    others_s: float
    step_s: float

    @property
    def factor(self) -> float:
        """How many times slower than the others it is."""
        return self.own_s / max(self.others_s, 1e-6)


def find(figures: Sequence[Sequence[float]]) -> tuple[Straggler, ...]:
    """Find the stragglers among ranks; `figures[rank]` is (arrival, work), both in seconds a step.

    A rank is one if its own time is 1.5 times the median of the others', and if what it is slower by is at least a
    tenth of the step: less costs nobody anything.
    """
    step_s = max((arrival for arrival, _ in figures), default=0.0)
    found: dict[int, Straggler] = {}
    for place, by in enumerate(Figure):
        values = [own[place] for own in figures]
        for rank, own_s in enumerate(values):
            others = values[:rank] + values[rank + 1 :]
            if not others:
                continue
            others_s = statistics.median(others)
            if own_s >= _FACTOR * others_s and own_s - others_s >= _SHARE * step_s > 0:
                found.setdefault(rank, Straggler(rank, by, own_s, others_s, step_s))
    return tuple(found[rank] for rank in sorted(found))


class Pace:
    """Measures one rank's own times, step after step. All ranks count the same steps, so their windows end together."""

    def __init__(self) -> None:
        self._left: tuple[float, float] | None = None
        self._arrivals_s: list[float] = []
        self._work_s: list[float] = []
        self._busy_s: float | None = None
        self._num_steps = 0

    def tell_busy(self, busy_s: float) -> None:
        """Take from the script how long this rank worked in the step that ends."""
        self._busy_s = busy_s

    def arrive(self, now_s: float, cpu_s: float) -> tuple[float, float] | None:
        """Note that a step boundary is reached. At the end of a window: the medians (arrival, work) of its steps."""
        if self._left is not None:
            left_s, left_cpu_s = self._left
            self._arrivals_s.append(now_s - left_s)
            self._work_s.append(cpu_s - left_cpu_s if self._busy_s is None else self._busy_s)
        self._busy_s = None
        self._num_steps += 1
        if self._num_steps % WINDOW or not self._arrivals_s:
            return None
        figures = statistics.median(self._arrivals_s), statistics.median(self._work_s)
        self._arrivals_s, self._work_s = [], []
        return figures

    def leave(self, now_s: float, cpu_s: float) -> None:
        """Note that all ranks have reached the boundary: the next step begins."""
        self._left = (now_s, cpu_s)


def pack(figures: tuple[float, float], rank: int, world_size: int) -> list[float]:
    """Put one rank's figures in their place of a vector of all ranks', which an all-reduce by maximum fills."""
    vector = [0.0] * (_NUM_FIGURES * world_size)
    vector[_NUM_FIGURES * rank : _NUM_FIGURES * (rank + 1)] = figures
    return vector


def unpack(vector: Sequence[float]) -> list[tuple[float, float]]:
    """Take the figures of all ranks from that vector, by rank."""
    return list(zip(vector[::_NUM_FIGURES], vector[1::_NUM_FIGURES], strict=True))
