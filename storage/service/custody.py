"""Who has each save of a rank: the service, the worker again, or nobody, as it gave way. Pure: it sends nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from storage.saving.committer import Running
from storage.service.handed import Handed


class Custody:
    """Of one rank. Not thread-safe: who has it holds a lock.

    Attributes:
        handed: what is the service's and has not ended, by attempt, in order.
        copying: the attempt that is on its way to another node's memory, for all that is known.
    """

    def __init__(self) -> None:
        self.handed: dict[str, Handed] = {}
        self.copying: str | None = None
        self._kept: dict[str, Running] = {}  # has ended, and the service holds its slot
        self._waiting: set[str] = set()  # attempts that are not to begin yet
        self._given_way: set[str] = set()  # of these, those that are not wanted any more, before they are handed over
        self._back: dict[str, Handed | Running] = {}  # and those that wait here: no service has them
        self._unheard: list[str] = []  # what a service has, for all that it knows, and is its own no more

    def park(self, attempt: str) -> None:
        """It is not to begin yet."""
        self._waiting.add(attempt)

    def settled(self, attempt: str) -> None:
        """It is not on its way to another node's memory any more, or it never was."""
        if self.copying == attempt:
            self.copying = None

    def hand(self, handed: Handed) -> bool:
        """It is to be the service's; not if it was to wait, and is not wanted any more."""
        attempt = handed.stage.attempt.id
        if attempt in self._given_way:
            self._given_way.discard(attempt)
            handed.close(is_shared=False)
            return False
        handed.waits = attempt in self._waiting
        self.handed[attempt] = handed
        return True

    def keep_back(self, running: Running) -> bool:
        """It cannot be handed over: whether that does not matter yet, as it is to wait, or is not wanted any more."""
        attempt = running.job.attempt.id
        self.settled(attempt)
        if attempt in self._given_way:
            self._given_way.discard(attempt)
            running.free()
            return True
        if attempt in self._waiting:
            self._back[attempt] = running
        return attempt in self._waiting

    def go_on(self, attempt: str) -> Handed | Running | None:
        """It is to begin; what is to be carried out here is returned. What the service has is to be told to it."""
        self._waiting.discard(attempt)
        if (handed := self.handed.get(attempt)) is not None:
            handed.waits = False
        back = self._back.pop(attempt, None)
        if isinstance(back, Handed) and back.is_sent:
            self._unheard.append(attempt)
        return back

    def give_way(self, running: Running, *, is_connected: bool) -> None:
        """Another one takes its place; a service that `is_connected` hears of it by that one."""
        attempt = running.job.attempt.id
        self.settled(attempt)
        self._waiting.discard(attempt)
        handed, back = self.handed.pop(attempt, None), self._back.pop(attempt, None)
        if handed is not None and handed.is_sent and is_connected:
            handed.table.close()
            self._kept[attempt] = running
            return
        found = handed or back
        if found is None:
            self._given_way.add(attempt)
        elif isinstance(found, Running):
            found.free()
        else:
            self._unheard += [attempt] if found.is_sent else []
            found.close(is_shared=found.is_sent)

    def end(self, attempt: str, *, holds: bool) -> Handed | None:
        """The service has brought it to its end; where it `holds` states, its slot is free once that is released."""
        handed = self.handed.pop(attempt, None)
        if handed is not None:
            handed.table.close()
            if handed.slot is None or handed.is_released or not holds:
                handed.running.free()
            else:
                self._kept[attempt] = handed.running
        return handed

    def release(self, attempt: str) -> Running | None:
        """The service reads it no more: whose memory is free."""
        if (handed := self.handed.get(attempt)) is not None:
            handed.is_released = True
            return handed.running
        return self._kept.pop(attempt, None)

    def refuse(self, attempt: str) -> Handed | None:
        """The service has not taken it; what waits does so here."""
        self.settled(attempt)
        handed = self.handed.pop(attempt, None)
        if handed is not None and handed.waits:
            handed.is_sent, self._back[attempt] = False, handed
        return handed

    def let_go_of_kept(self) -> list[Running]:
        """No service holds their slots any more, for all that is known, nor copies anything."""
        self.copying = None
        kept, self._kept = list(self._kept.values()), {}
        return [replace(running, is_shared=True) for running in kept]

    def lose(self) -> list[Handed]:
        """The service is away: what is to be carried out here."""
        self.copying = None
        mine = [handed for handed in self.handed.values() if not handed.waits]
        self._back |= {attempt: handed for attempt, handed in self.handed.items() if handed.waits}
        self.handed = {}
        self._unheard += [handed.stage.attempt.id for handed in mine if handed.is_sent]
        return mine

    def come_back(self) -> list[str]:
        """There is a service: what waits is its own again. What it may have that is not so is to be told to it."""
        waiting = {attempt: back for attempt, back in self._back.items() if isinstance(back, Handed)}
        self._back = {attempt: back for attempt, back in self._back.items() if attempt not in waiting}
        self.handed |= waiting
        unheard, self._unheard = self._unheard, []
        return unheard

    def repeat(self, unheard: Sequence[str]) -> None:
        """The service could not be told; the next one is to be."""
        self._unheard = [*unheard, *self._unheard]
