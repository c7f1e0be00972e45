"""This node is asked to leave: by whom, by when it must be gone, and what there is time for until then.

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
    """One request. `deadline_s`: nothing of this node may be there any more; `detail` names the signal, the user, or
    what the notice says."""

    source: DrainSource
    detail: str
    asked_s: float
    deadline_s: float
    signum: int = 0

    @property
    def reason(self) -> str:
        """As it is told to workers, other nodes and people."""
        return f"drains on {self.detail}"

    @property
    def grace_s(self) -> float:
        """From the request to its deadline."""
        return max(0.0, self.deadline_s - self.asked_s)

    @property
    def exit_code(self) -> int:
        """What the agent ends with: 128 + N on signal N, else a code that says "neither done nor failed"."""
        return 128 + self.signum if self.signum else DRAINED_EXIT_CODE


@dataclass(frozen=True)
class Timetable:
    """When what must be over, if the request is to be honoured. Monotonic seconds."""

    ask_until_s: float
    """Workers that have not stopped at a step boundary by then get SIGTERM."""
    kill_at_s: float
    """Workers that still run get SIGKILL, and this node leaves the job."""
    gone_by_s: float
    """The agent ends, whatever it is still waiting for."""


def timetable(request: DrainRequest, stop_s: float) -> Timetable:
    """Cut the grace in parts. `stop_s` (--shutdown-timeout) is the most that SIGTERM needs to be given."""
    grace_s = request.grace_s
    kill_at_s = request.deadline_s - min(_LEAVE_MAX_S, _LEAVE_SHARE * grace_s)
    return Timetable(
        ask_until_s=kill_at_s - min(stop_s, _STOP_SHARE * grace_s),
        kill_at_s=kill_at_s,
        gone_by_s=request.deadline_s - min(_EXIT_MAX_S, _EXIT_SHARE * grace_s),
    )


def settle(requests: tuple[DrainRequest, ...]) -> DrainRequest | None:
    """Several requests as one: the earliest deadline counts, and the last signal makes the exit code."""
    if not requests:
        return None
    signums = [r.signum for r in requests if r.signum]
    tightest = min(requests, key=lambda r: r.deadline_s)
    return dataclasses.replace(tightest, signum=signums[-1] if signums else 0)


@dataclass(frozen=True)
class DrainOrder:
    """`elastic-moe drain`'s request as it lies in the store. `grace_s`: None leaves it to the nodes."""

    node_ids: tuple[str, ...]
    by: str
    grace_s: float | None = None

    def to_json(self) -> bytes:
        """The order as stored."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> DrainOrder:
        """Read an order.

        Raises:
            ValueError: it is not one of this version.
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
    """What has been asked of this node so far. Takes no lock: the handler of a signal may ask as well as a thread."""

    def __init__(self, *, grace_s: float, stop_s: float) -> None:
        """`grace_s`: --drain-grace, for requests that bring no time of their own; `stop_s`: --shutdown-timeout."""
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
        """A signal asks; False if one has asked before."""
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
        """The current request's."""
        request = self.current
        return timetable(request, self._stop_s) if request else None

    def kill_by(self, ends_s: float) -> float:
        """When workers that get until `ends_s` must be killed at the latest."""
        times = self.timetable
        return ends_s if times is None else min(ends_s, times.kill_at_s)
