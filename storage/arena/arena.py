"""`Arena`: a rank's few slots, used again and again."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence

from storage.arena.ahead import SlotAhead
from storage.arena.free_memory import free_bytes
from storage.arena.slot import Slot

log = logging.getLogger(__name__)


Guard = Callable[[Sequence[int]], object]
"""Has another process hold the slots behind these descriptors, copies that are its to close, and no others of those
that it was told of. So none is freed, page by page, as this process ends, which a whole job may wait for.
"""


class Arena:
    """Hands out slots, and takes them back from whoever has stored what is in them. Thread-safe.

    A slot is made when it is first needed and no free one is large enough, so a state that keeps its size costs its
    memory, and the time to get it, once; at most `num_slots` exist.
    """

    def __init__(self, num_slots: int = 2, guard: Guard | None = None) -> None:
        self._num_slots = num_slots
        self._guard = guard
        self._lock = threading.Condition()
        self._free: list[Slot] = []
        self._used: list[Slot] = []
        self._ahead: SlotAhead | None = None
        self._is_left_off = False
        self._is_closed = False

    @property
    def num_free(self) -> int:
        """How many slots could be taken now."""
        with self._lock:
            return self._num_slots - len(self._used)

    @property
    def num_made(self) -> int:
        """How many slots there are, used and free."""
        with self._lock:
            return len(self._free) + len(self._used)

    @property
    def size_bytes(self) -> int:
        """The memory of all slots that there are."""
        with self._lock:
            return sum(slot.size_bytes for slot in (*self._free, *self._used))

    def take(self, size_bytes: int) -> Slot | None:
        """A slot of at least that size, in use until it is given back; None if all are in use.

        One that is being made ahead is made whole here, without waiting for more than a piece of it.

        Raises:
            MemoryError: there is no memory for it.
            ValueError: the arena is closed.
        """
        with self._lock:
            if self._is_closed:
                raise ValueError("the arena is closed")
            self._is_left_off = False
            if len(self._used) == self._num_slots:
                return None
            fitting = [slot for slot in self._free if slot.size_bytes >= size_bytes]
            if fitting:
                slot = min(fitting, key=lambda slot: slot.size_bytes)
                self._free.remove(slot)
            else:
                self._make_room()
                ahead, self._ahead = self._ahead, None
                if ahead is not None and ahead.size_bytes < size_bytes:
                    ahead.let_go()
                    ahead = None
                slot = Slot.create(size_bytes) if ahead is None else ahead.finish()
            self._used.append(slot)
            return slot

    def prepare(self, size_bytes: int) -> None:
        """Make a slot ahead, so that no save waits for its pages to be made; any thread.

        Where there is a spare one, or as many as may be, nothing is done; nor where memory is short: a spare slot that
        leaves less than its own size is worth none of it.
        """
        try:
            if (free := free_bytes()) is None or free >= 2 * size_bytes:
                self.make_ahead(size_bytes)
        except MemoryError as error:
            log.info("no slot is made ahead: %s", error)
        self.have_guarded()

    def make_ahead(self, size_bytes: int) -> None:
        """As `prepare`, whatever it leaves of memory. Raises MemoryError where there is not so much."""
        with self._lock:
            is_full = len(self._used) >= self._num_slots
            is_off = self._is_closed or self._is_left_off or self._ahead is not None
            if is_off or is_full or any(one.size_bytes >= size_bytes for one in self._free):
                return
            self._make_room()
            ahead = self._ahead = SlotAhead(size_bytes)
        slot = None
        try:
            slot = ahead.make()
        finally:
            with self._lock:
                if self._ahead is ahead:  # else a save has it
                    self._ahead = None
                    if slot is not None:
                        self._free.append(slot)

    def have_guarded(self) -> None:
        """Tell the guard, if there is one, of the slots that there are; any thread that no training waits for."""
        told: set[Slot] | None = None
        while self._guard is not None:
            with self._lock:
                slots = {*self._free, *self._used}
                if self._is_closed or slots == told:
                    return
                copies = _copies(slots)
            self._guard(copies)
            told = slots  # what has been let go of meanwhile would be held by the guard alone: tell again

    def wait_free(self, timeout_s: float | None = None) -> bool:
        """Block until a slot could be taken, for at most that long; whether one can."""
        with self._lock:
            return self._lock.wait_for(lambda: len(self._used) < self._num_slots, timeout_s)

    def give_back(self, slot: Slot) -> None:
        """The slot may be overwritten; giving back twice is harmless."""
        with self._lock:
            if slot not in self._used:
                return
            self._used.remove(slot)
            if self._is_closed:
                slot.close()
            else:
                self._free.append(slot)
            self._lock.notify_all()

    def drop(self, slot: Slot) -> None:
        """The slot is another's for good, who has its descriptor: this process lets go of it, and so does the guard."""
        with self._lock:
            if slot not in self._used:
                return
            self._used.remove(slot)
            slot.close()
            self._lock.notify_all()
        self.have_guarded()

    def leave_off(self) -> None:
        """Whoever makes a slot ahead stops soon, and lets go of it; nobody begins to before the next is taken."""
        with self._lock:
            self._is_left_off = True
            ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.let_go()

    def close(self) -> None:
        """Let go of all slots that are free now, and of the others as they are given back."""
        with self._lock:
            self._is_closed = True
            for slot in self._free:
                slot.close()
            self._free.clear()
        self.leave_off()

    def _make_room(self) -> None:
        """Let go of what is free: it was too small once, and would be so again. Its room is needed."""
        if not self._free:
            return
        while self._free:
            self._free.pop().close()  # in this order: an interrupt between leaves no closed one to be taken
        if self._guard is not None:  # else that has their memory still
            self._guard(_copies(self._used))


def _copies(slots: Iterable[Slot]) -> list[int]:
    """Of their descriptors; none where this process can have no more."""
    copies: list[int] = []
    try:
        for slot in slots:
            copies.append(os.dup(slot.fd))  # noqa: PERF401 - those before one that fails are closed
    except OSError as error:
        for fd in copies:
            os.close(fd)
        log.info("no other process is to hold slots: %s", error)
        return []
    return copies
