"""Owners of a run and a clock that moves by sleeping, for the tests of what tells that they live."""

from __future__ import annotations

from collections.abc import Callable

from storage.events import Reporter
from storage.run.owner import Owner

QUIET = Reporter(None)


class Time:
    """A clock that moves by sleeping; `each_second` is called with the second."""

    def __init__(self, each_second: Callable[[int], None] = lambda second: None) -> None:
        self.now_s = 0.0
        self._each_second = each_second

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self._each_second(round(self.now_s))


def owner_of(lineage: str, token: str, generation: int = 0, run_id: str = "", rendezvous: str = "") -> Owner:
    """Who wants to claim; the token is that letter, 32 times."""
    return Owner(
        lineage=lineage,
        generation=generation,
        epoch=0,
        token=token * 32,
        run_id=run_id,
        host="node-1",
        rendezvous=rendezvous,
    )
