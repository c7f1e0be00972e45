"""What a job under faults wrote down, and what must hold of it whatever the fault was. Pure but for `read`.

All processes of a test share one machine, so their monotonic times can be compared.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import read_lines


@dataclass(frozen=True)
class Step:
    """One rank's part in one step. Times in monotonic seconds."""

    step: int
    generation: int
    rank: int
    world_size: int
    node: str
    pid: int
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Life:
    """When a worker was last seen alive, give or take the ten milliseconds between two signs of it."""

    generation: int
    rank: int
    node: str
    last_s: float


@dataclass(frozen=True)
class History:
    """What all workers of a job wrote down."""

    steps: tuple[Step, ...]
    lives: tuple[Life, ...]

    def generations(self) -> list[int]:
        """Those that did a step, by number."""
        return sorted({s.generation for s in self.steps})

    def pause(self, generation: int) -> tuple[float, float]:
        """When the last step of a generation ended that was in time, and when the first one of the next began."""
        later_s = min(s.begin_s for s in self.steps if s.generation > generation)
        return max(s.end_s for s in self.steps if s.generation == generation and s.end_s <= later_s), later_s

    def done(self, generation: int | None = None) -> list[int]:
        """The steps that a generation (or any) has done, by number."""
        return sorted({s.step for s in self.steps if generation in (None, s.generation)})


def read(folder: Path) -> History:
    """What was written down so far."""
    steps = [Step(**line) for path in folder.glob("steps-*.jsonl") for line in read_lines(path)]
    lives = []
    for path in folder.glob("lives/*"):
        generation, rank, _, node = path.name.split("-", 3)
        data = path.read_bytes()
        if len(data) == 8:
            lives.append(Life(int(generation), int(rank), node, struct.unpack("<d", data)[0]))
    return History(tuple(steps), tuple(lives))


def violations(history: History, *, thawed: Collection[str] = (), redone: int = 1) -> list[str]:
    """What should never be seen, in words; [] if all is well.

    `thawed`: names of nodes that were frozen as a whole. Their agent cannot act while it is frozen, so a worker may
    live, and end the step that it was in, after others went on; it must not begin another. `redone`: how many steps a
    generation may do again (the job saves each, so one: that which was done and not yet saved).
    """
    steps = [s for s in history.steps if not _of(s.node, thawed)]
    found = [*_skipped(history), *_order(history), *_worlds(history), *_redone(history, redone)]
    generations = sorted({s.generation for s in steps})
    for generation, following in itertools.pairwise(generations):
        ended_s = max(s.end_s for s in steps if s.generation == generation)
        began_s = min(s.begin_s for s in steps if s.generation == following)
        if ended_s > began_s:
            found.append(f"generation {generation} ends a step {ended_s - began_s:.3f} s after {following} began one")
    for life in history.lives:
        later = [s.begin_s for s in history.steps if s.generation > life.generation]
        if later and life.last_s > min(later) and not _of(life.node, thawed):
            found.append(
                f"a worker of generation {life.generation} on {life.node} lives "
                f"{life.last_s - min(later):.3f} s after a later generation began a step"
            )
    found += [
        f"thawed {late.node} began step {late.step} of generation {late.generation} after a later one"
        for late in (s for s in history.steps if _of(s.node, thawed))
        if any(s.generation > late.generation and s.begin_s < late.begin_s for s in history.steps)
    ]
    return found


def _of(node_id: str, names: Iterable[str]) -> bool:
    return any(node_id.startswith(f"{name}-") for name in names)


def _skipped(history: History) -> list[str]:
    done = history.done()
    missing = sorted(set(range(1, done[-1] + 1)) - set(done)) if done else []
    return [f"steps skipped: {missing}"] if missing else []


def _order(history: History) -> list[str]:
    """Each worker does one step after the other, and each generation begins at most one behind what is done."""
    found = []
    for pid in sorted({(s.generation, s.pid) for s in history.steps}):
        own = [s.step for s in history.steps if (s.generation, s.pid) == pid]
        if sorted(own) != list(range(min(own), min(own) + len(own))):
            found.append(f"worker {pid[1]} of generation {pid[0]} did steps {sorted(own)}")
    return found


def _worlds(history: History) -> list[str]:
    """A generation has one world size, and one worker for each of its ranks."""
    found = []
    for generation in history.generations():
        own = [s for s in history.steps if s.generation == generation]
        sizes = {s.world_size for s in own}
        workers = {(s.rank, s.pid) for s in own}
        if len(sizes) != 1 or len({rank for rank, _ in workers}) != len(workers):
            found.append(f"generation {generation}: world sizes {sizes}, workers {sorted(workers)}")
    return found


def _redone(history: History, allowed: int) -> list[str]:
    found = []
    generations = history.generations()
    for generation, following in itertools.pairwise(generations):
        again = history.done(generation)[-1] - history.done(following)[0] + 1
        if again > allowed:
            found.append(f"generation {following} did {again} steps of generation {generation} again")
    return found
