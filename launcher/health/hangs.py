"""Decides when workers that make no progress count as hung, and which rank is behind it. No thread, I/O or clock.

How long a worker may be silent is learnt from the job itself::

    step limit     = max(300 s, 10 x the median interval, min(3 x the longest interval, 1 h)) x 2^alarms
    start-up limit = max(30 min, 5 x the longest start-up)                                    x 2^alarms

The median of the last 1024 intervals between heartbeats knows the step, the longest one knows what comes every so many
steps (an evaluation, a checkpoint); the hour keeps one stall that was survived from disarming the watch. Before a
generation's ninth beat the start-up limit holds, since first steps compile and fill caches; before any start-up was
seen it is an hour. Each alarm doubles both: what looks like a hang at the same place each time may be slow work.

A false alarm is worse than a late one. So time counts only while the agent itself runs: a node that was frozen as a
whole, or whose workers have been asked to stop, ages nobody.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from launcher.workers.channel import Progress, WorkerPhase

_STEP_FLOOR_S = 300.0
_STARTUP_FLOOR_S = 1800.0
_STARTUP_UNKNOWN_S = 3600.0
_LONGEST_CEILING_S = 3600.0
_MEDIAN_FACTOR, _LONGEST_FACTOR, _STARTUP_FACTOR = 10.0, 3.0, 5.0
_WINDOW = 1024
_NUM_WARM_UP = 8
_LOOK_S_MAX = 1.0


class Auto(StrEnum):
    """What a limit may be instead of a number of seconds."""

    AUTO = "auto"  # learnt
    OFF = "off"


HangLimit = float | Auto


@dataclass(frozen=True)
class HangRules:
    """The limits that the user asked for, in seconds or as `Auto`."""

    step: HangLimit = Auto.AUTO
    """Between two heartbeats."""
    startup: HangLimit = Auto.AUTO
    """From a worker's start to its first heartbeat."""
    silence_s: float | None = None
    """Without a byte of output from the workers of rank 0's node, once they have written one; None: not watched."""


class HangKind(StrEnum):
    """Which limit was exceeded."""

    START_UP = "start-up"
    STEP = "step"
    SILENCE = "silence"


_MISSED = {
    HangKind.START_UP: "no first heartbeat",
    HangKind.STEP: "no heartbeat",
    HangKind.SILENCE: "no output",
}


@dataclass(frozen=True)
class Hang:
    """Workers that have made no progress for too long."""

    kind: HangKind
    ranks: tuple[int, ...]
    """Their local ranks."""
    step: int
    """The lowest step that one of them has completed last, -1 before the first."""
    seconds: float
    """For how long there was no progress."""
    limit_s: float

    def __str__(self) -> str:
        what = _MISSED[self.kind]
        where = f" after step {self.step}" if self.step >= 0 else ""
        return f"{what} for {self.seconds:.0f} s{where} (limit {self.limit_s:.0f} s)"


def step_limit_s(intervals_s: Sequence[float], num_alarms: int = 0) -> float:
    """Learn the limit of a step from the intervals between heartbeats."""
    learnt_s = 0.0
    if intervals_s:
        longest_s = min(_LONGEST_FACTOR * max(intervals_s), _LONGEST_CEILING_S)
        learnt_s = max(_MEDIAN_FACTOR * statistics.median(intervals_s), longest_s)
    return max(_STEP_FLOOR_S, learnt_s) * 2.0**num_alarms


def startup_limit_s(startups_s: Sequence[float], num_alarms: int = 0) -> float:
    """Learn the limit of a start from the starts of earlier generations."""
    learnt_s = max(_STARTUP_FLOOR_S, _STARTUP_FACTOR * max(startups_s)) if startups_s else _STARTUP_UNKNOWN_S
    return learnt_s * 2.0**num_alarms


@dataclass
class _Seen:
    """What was last seen of a worker; times are those of the watch's own clock."""

    progress: Progress
    changed_s: float
    beat_s: float | None = None
    num_beats: int = 0
    was_untimed: bool = False


class HangWatch:
    """Watches the workers of one node, generation after generation, and remembers how fast they are."""

    def __init__(self, rules: HangRules) -> None:
        self.rules = rules
        self._intervals_s: deque[float] = deque(maxlen=_WINDOW)
        self._startups_s: deque[float] = deque(maxlen=_WINDOW)
        self._num_alarms = 0
        self._beats = False  # whether the script ever said that it reports progress
        self._limit_s: tuple[int, float] = (-1, 0.0)
        self._num_intervals = 0
        self.begin()

    def begin(self) -> None:
        """Begin anew: the workers of another generation have just been started."""
        self._clock_s = 0.0  # runs only while somebody looks
        self._looked_s: float | None = None
        self._seen: dict[int, _Seen] = {}
        self._output: Hashable = None
        self._output_s = 0.0
        self._wrote = False

    def look(
        self,
        progress: Mapping[int, Progress],
        now_s: float,
        *,
        exited: Collection[int] = (),
        output: Hashable = None,
        paused: bool = False,
    ) -> Hang | None:
        """Compare what the workers say with what they said at the last call.

        Args:
            progress: by local rank.
            now_s: the monotonic clock.
            exited: local ranks that have ended.
            output: anything that changes when workers write output; None where that is not watched here.
            paused: the workers have been asked to stop, and have a limit of their own for that: nobody ages.

        Returns:
            The hang, once a worker has made no progress for longer than its limit.
        """
        if self._looked_s is not None and not paused:
            self._clock_s += min(max(0.0, now_s - self._looked_s), _LOOK_S_MAX)
        self._looked_s = now_s
        moved = [rank for rank, now in progress.items() if self._take(rank, now)]
        self._wrote = self._wrote or (self._output is not None and output != self._output)
        if moved or output != self._output:
            self._output, self._output_s = output, self._clock_s
        if paused:
            return None
        hang = self._judge({rank: seen for rank, seen in self._seen.items() if rank not in exited}, output)
        if hang is not None:
            self._num_alarms += 1
            self._limit_s = (-1, 0.0)
        return hang

    def _take(self, rank: int, now: Progress) -> bool:
        """Learn from what a worker says; returns whether it has said anything new."""
        seen = self._seen.setdefault(rank, _Seen(Progress(WorkerPhase.STARTING, -1, 0.0), 0.0))
        if now == seen.progress:
            return False
        self._beats = self._beats or now.phase is not WorkerPhase.STARTING
        seen.was_untimed = seen.was_untimed or now.untimed
        if now.beat_s != seen.progress.beat_s:
            seen.num_beats += 1
            if seen.beat_s is None:
                self._startups_s.append(self._clock_s)
            elif not seen.was_untimed:
                self._intervals_s.append(self._clock_s - seen.beat_s)
                self._num_intervals += 1
            seen.beat_s, seen.was_untimed = self._clock_s, now.untimed
        seen.progress, seen.changed_s = now, self._clock_s
        return True

    def _judge(self, live: Mapping[int, _Seen], output: Hashable) -> Hang | None:
        # One that never says a word while others make steps is no late starter: its script has only some ranks tell.
        steps = any(seen.num_beats for seen in self._seen.values())
        telling = {
            rank: seen for rank, seen in live.items() if not steps or seen.progress.phase is not WorkerPhase.STARTING
        }
        ages_s = {rank: self._clock_s - seen.changed_s for rank, seen in telling.items()}
        limits = {rank: self._limit_of(seen) for rank, seen in telling.items()}
        late = [rank for rank, (_, limit_s) in limits.items() if limit_s is not None and ages_s[rank] > limit_s]
        if late:
            first = max(late, key=ages_s.__getitem__)
            kind, limit_s = limits[first]
            assert limit_s is not None
            # The others stand still for nearly as long: one cannot make progress without the rest.
            ranks = tuple(sorted(rank for rank, age_s in ages_s.items() if age_s > limit_s / 2))
            return Hang(kind, ranks, min(telling[r].progress.step for r in ranks), ages_s[first], limit_s)
        silent_s, silence_s = self._clock_s - self._output_s, self._silence_limit_s()
        if live and output is not None and silence_s is not None and silent_s > silence_s:
            step = min(seen.progress.step for seen in live.values())
            return Hang(HangKind.SILENCE, tuple(sorted(live)), step, silent_s, silence_s)
        return None

    def _silence_limit_s(self) -> float | None:
        """The limit of silence now: before their first byte, workers may be silent for as long as a start may last."""
        if self.rules.silence_s is None or self._wrote:
            return self.rules.silence_s
        if isinstance(self.rules.startup, float):
            return max(self.rules.silence_s, self.rules.startup)
        return None if self.rules.startup is Auto.OFF else max(self.rules.silence_s, startup_limit_s(self._startups_s))

    def _limit_of(self, seen: _Seen) -> tuple[HangKind, float | None]:
        """Which limit holds for a worker now, and its seconds; None for a worker that may take as long as it likes."""
        if seen.progress.phase is WorkerPhase.YIELDED:
            return HangKind.STEP, None
        if seen.num_beats == 0 or seen.progress.untimed:
            return HangKind.START_UP, self._startup_limit_s()
        limit_s = self._step_limit_s()
        if self.rules.step is Auto.AUTO and seen.num_beats <= _NUM_WARM_UP and limit_s is not None:
            limit_s = max(limit_s, startup_limit_s(self._startups_s, self._num_alarms))
        return HangKind.STEP, limit_s

    def _startup_limit_s(self) -> float | None:
        if isinstance(self.rules.startup, float):
            return self.rules.startup
        if self.rules.startup is Auto.OFF or not self._beats:
            return None  # a script that has never reported progress may be one that does not know how
        return startup_limit_s(self._startups_s, self._num_alarms)

    def _step_limit_s(self) -> float | None:
        if isinstance(self.rules.step, float):
            return self.rules.step
        if self.rules.step is Auto.OFF:
            return None
        if self._limit_s[0] != self._num_intervals:  # looked at twenty times a second, learnt from once a step
            self._limit_s = (self._num_intervals, step_limit_s(self._intervals_s, self._num_alarms))
        return self._limit_s[1]


@dataclass(frozen=True)
class Evidence:
    """What is known of one rank of a hung job."""

    rank: int
    step: int
    """The last step that it has completed."""
    stopped: bool = False
    """A signal (SIGSTOP) has stopped the process."""
    frame: str = ""
    """The innermost frame of its main thread that says something; "" where no stack was written."""
    waits: bool = False
    """That frame is a collective's."""


def suspects(evidence: Sequence[Evidence]) -> tuple[int, ...]:
    """Find the ranks that the others probably wait for; none where the evidence says nothing.

    Four questions are asked in turn, and the first one counts whose answer is not the same for all ranks. Which are
    stopped? Which are steps behind? Which are not in a collective while others are? Which are elsewhere than the strict
    majority?
    """
    everyone = {e.rank for e in evidence}
    waiting = {e.rank for e in evidence if e.waits}
    places = Counter(e.frame for e in evidence if e.frame)
    common, num_common = places.most_common(1)[0] if places else ("", 0)
    lowest = min((e.step for e in evidence), default=0)
    for found in (
        {e.rank for e in evidence if e.stopped},
        {e.rank for e in evidence if e.step == lowest},
        {e.rank for e in evidence if e.frame} - waiting if waiting else set(),
        {e.rank for e in evidence if e.frame and e.frame != common} if 2 * num_common > len(evidence) else set(),
    ):
        if found and found != everyone:
            return tuple(sorted(found))
    return ()
