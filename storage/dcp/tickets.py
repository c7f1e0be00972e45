"""What the coordinator of a `dcp.save` tells each rank, by way of the rank's plan."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

_last = threading.local()
"""`ticket`: of the save that this thread is in. DCP plans and writes in one thread."""


@dataclass(frozen=True)
class Ticket:
    """The attempt of this save, and the rank's number in it.

    It goes with the rank's plan, but where DCP keeps plans from save to save (`enable_plan_caching`) the planner puts
    an earlier one, with an earlier ticket, in its place. So a rank goes by the last that has reached it.
    """

    attempt_id: str
    rank: int

    def __reduce__(self) -> tuple[Callable[..., Ticket], tuple[str, int]]:
        return receive, (self.attempt_id, self.rank)


def receive(attempt_id: str, rank: int) -> Ticket:
    """A ticket that has reached this thread: `take` gives it out."""
    ticket = Ticket(attempt_id, rank)
    _last.ticket = ticket
    return ticket


def take(planned: Ticket) -> Ticket:
    """The ticket that has reached this thread last, once; else the one in its plan."""
    ticket: Ticket = _last.__dict__.pop("ticket", planned)
    return ticket
