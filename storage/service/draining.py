"""A node leaves: what is under way is finished, or given up in time to say so. Pure."""

from __future__ import annotations

from enum import Enum, auto

from storage.service.messages import Drained

_RESERVE_S_MAX, _RESERVE_SHARE = 5.0, 0.2


class Draining:
    """From the first `Drain` to the answer. Times are of one clock.

    Args:
        num_ended_before: how many saves had ended when it began.
        wind_up_s: so long, at least, what was given up may take to say so.
    """

    class Word(Enum):
        """What is to be done."""

        WAIT = auto()
        GIVE_UP = auto()
        END = auto()

    def __init__(self, num_ended_before: int, wind_up_s: float) -> None:
        self._num_ended_before = num_ended_before
        self._wind_up_s = wind_up_s
        self._deadline_s = float("inf")
        self._reserve_s: float | None = None  # of the grace, kept for telling that what is not finished was given up
        self._num_abandoned = 0
        self._ends_s: float | None = None  # of that

    def ask(self, now_s: float, grace_s: float) -> None:
        """Somebody wants it to end within that time."""
        if self._reserve_s is None:
            self._reserve_s = min(_RESERVE_S_MAX, _RESERVE_SHARE * grace_s)
        self._deadline_s = min(self._deadline_s, now_s + grace_s)

    def look(self, now_s: float, num_unfinished: int) -> Word:
        """What is to be done while so many saves are under way. `GIVE_UP` comes once."""
        if not num_unfinished:
            return Draining.Word.END
        if self._ends_s is None:
            if now_s < self._deadline_s - (self._reserve_s or 0.0):
                return Draining.Word.WAIT
            self._num_abandoned = num_unfinished
            self._ends_s = max(self._deadline_s, now_s + self._wind_up_s)
            return Draining.Word.GIVE_UP
        return Draining.Word.WAIT if now_s < self._ends_s else Draining.Word.END

    def outcome(self, num_ended: int, num_unfinished: int) -> Drained:
        """What is answered in the end."""
        num_finished = num_ended - self._num_ended_before + num_unfinished - self._num_abandoned
        return Drained(num_finished=max(0, num_finished), num_abandoned=self._num_abandoned)
