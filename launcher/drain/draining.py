"""Keeps who has asked this node to leave, by when it must be gone, and what there is time for until then.

Three sources, one notion: a signal, `elastic-moe drain`, a preemption notice. A request's grace is cut in three parts
in advance, so that the last ones are never eaten up by the first::

    asked ── workers may reach a step boundary and save ── ask_until_s ── SIGTERM ... ── kill_at_s ── leave ── gone_by_s

Decisions take the time as an argument (monotonic seconds); only `DrainRequests` keeps something.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from dataclasses import dataclass
from enum import StrEnum

from launcher.errors import DRAINED_EXIT_CODE

_STOP_SHARE = 0.25
_LEAVE_SHARE, _LEAVE_MAX_S = 0.15, 3.0
_EXIT_SHARE, _EXIT_MAX_S = 0.03, 0.5


class DrainSource(StrEnum):
    """Who asks a node to leave."""

    SIGNAL = "signal"
    COMMAND = "command"
    NOTICE = "notice"


@dataclass(frozen=True)
class DrainRequest:
    """One request that this node leave. Times are those of the monotonic clock."""

    source: DrainSource
    detail: str
    """The name of the signal, the user, or what the notice says."""
    asked_s: float
    deadline_s: float
    """When nothing of this node may be there any more."""
    signum: int = 0
    """The number of the signal, 0 for other requests."""

    @property
    def reason(self) -> str:
        """The request in words, for workers, other nodes and people."""
        return f"drains on {self.detail}"

    @property
    def grace_s(self) -> float:
        """The seconds from the request to its deadline."""
        return max(0.0, self.deadline_s - self.asked_s)

    @property
    def exit_code(self) -> int:
        """The agent's exit code: 128 + N on signal N, else one that says "neither done nor failed"."""
        return 128 + self.signum if self.signum else DRAINED_EXIT_CODE


@dataclass(frozen=True)
class Timetable:
    """The times by which each part of a drain must be over for its deadline to be kept. Monotonic seconds."""

    ask_until_s: float
    """Workers that have not stopped at a step boundary by then get SIGTERM."""
    kill_at_s: float
    """Workers that still run get SIGKILL, and this node leaves the job."""
    gone_by_s: float
    """The agent ends, whatever it is still waiting for."""


def timetable(request: DrainRequest, stop_s: float) -> Timetable:
    """Cut a request's grace in parts. `stop_s` (--shutdown-timeout) is the most that SIGTERM is given."""
    grace_s = request.grace_s
    kill_at_s = request.deadline_s - min(_LEAVE_MAX_S, _LEAVE_SHARE * grace_s)
    return Timetable(
        ask_until_s=kill_at_s - min(stop_s, _STOP_SHARE * grace_s),
        kill_at_s=kill_at_s,
        gone_by_s=request.deadline_s - min(_EXIT_MAX_S, _EXIT_SHARE * grace_s),
    )


def settle(requests: tuple[DrainRequest, ...]) -> DrainRequest | None:
    """Make one of several requests: the earliest deadline counts, and the last signal makes the exit code."""
    if not requests:
        return None
    signums = [r.signum for r in requests if r.signum]
    tightest = min(requests, key=lambda r: r.deadline_s)
    return dataclasses.replace(tightest, signum=signums[-1] if signums else 0)


@dataclass(frozen=True)
class DrainOrder:
    """The request of `elastic-moe drain` as it lies in the store."""

    node_ids: tuple[str, ...]
    by: str
    """Who has given it: a user and a host."""
    grace_s: float | None = None
    """The time for it; None: each node has its own."""

    def to_json(self) -> bytes:
        """Write the order as the store has it."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> DrainOrder:
        """Read an order from the store.

        Raises:
            ValueError: `data` is no order of this version.
        """
        try:
            found = json.loads(data)
        except RecursionError:
            found = None
        match found:
            case {"node_ids": [*node_ids], "by": str(by), "grace_s": None | int() | float() as grace_s}:
                if grace_s is None or grace_s > 0:
                    return cls(tuple(map(str, node_ids)), by, grace_s)
        raise ValueError(f"not a drain order of this version: {data[:200]!r}")


class DrainRequests:
    """All requests to this node so far. It takes no lock, as a signal's handler may ask as well as a thread."""

    def __init__(self, *, grace_s: float, stop_s: float) -> None:
        """Begin without a request.

        Args:
            grace_s: --drain-grace, for requests that bring no time of their own.
            stop_s: --shutdown-timeout.
        """
        self._grace_s = grace_s
        self._stop_s = stop_s
        self._requests: list[DrainRequest] = []

    def ask(
        self, source: DrainSource, detail: str, now_s: float, *, within_s: float | None = None, signum: int = 0
    ) -> None:
        """Ask this node to be gone `within_s` from now."""
        grace_s = self._grace_s if within_s is None else max(0.0, within_s)
        self._requests.append(DrainRequest(source, detail, now_s, now_s + grace_s, signum))

    def ask_signal(self, signum: signal.Signals, now_s: float) -> bool:
        """Ask this node to leave because of a signal; returns False if a signal has asked before."""
        if any(r.signum for r in self._requests):
            return False
        self.ask(DrainSource.SIGNAL, signum.name, now_s, signum=signum)
        return True

    @property
    def current(self) -> DrainRequest | None:
        """All requests as one; None while there is none."""
        return settle(tuple(self._requests))

    @property
    def timetable(self) -> Timetable | None:
        """The timetable of the current request; None while there is none."""
        request = self.current
        return timetable(request, self._stop_s) if request else None

    def kill_by(self, ends_s: float) -> float:
        """When workers must be killed that would have until `ends_s` without a drain."""
        times = self.timetable
        return ends_s if times is None else min(ends_s, times.kill_at_s)
