"""`Arena`: a rank's few slots, used again and again."""

from __future__ import annotations

import logging
import threading

from storage.arena.free_memory import free_bytes
from storage.arena.slot import Slot

log = logging.getLogger(__name__)


class Arena:
    """Hands out slots, and takes them back from whoever has stored what is in them. Thread-safe.

    A slot is made when it is first needed and no free one is large enough, so a state that keeps its size costs its
    memory, and the time to get it, once; at most `num_slots` exist.
    """

    def __init__(self, num_slots: int = 2) -> None:
        self._num_slots = num_slots
        self._lock = threading.Condition()
        self._free: list[Slot] = []
        self._used: list[Slot] = []
        self._is_making = False
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

        Raises:
            MemoryError: there is no memory for it.
            ValueError: the arena is closed.
        """
        with self._lock:
            self._lock.wait_for(lambda: not self._is_making)
            if self._is_closed:
                raise ValueError("the arena is closed")
            if len(self._used) == self._num_slots:
                return None
            fitting = [slot for slot in self._free if slot.size_bytes >= size_bytes]
            if fitting:
                slot = min(fitting, key=lambda slot: slot.size_bytes)
                self._free.remove(slot)
            else:
                for small in self._free:  # what was too small once would be so again: their room is needed
                    small.close()
                self._free.clear()
                slot = Slot.create(size_bytes)
            self._used.append(slot)
            return slot

    def prepare(self, size_bytes: int) -> None:
        """Make a slot ahead, so that no save waits for its pages to be made; any thread.

        Where there is a spare one, or as many as may be, nothing is done; nor where memory is short: a spare slot that
        leaves less than its own size is worth none of it.
        """
        with self._lock:
            if self._is_closed or self._is_making or self._free or len(self._used) >= self._num_slots:
                return
            self._is_making = True
        slot = None
        try:
            if (free := free_bytes()) is None or free >= 2 * size_bytes:
                slot = Slot.create(size_bytes, is_ahead=True)
        except MemoryError as error:
            log.info("no slot is made ahead: %s", error)
        finally:
            self._end_making(slot)

    def _end_making(self, slot: Slot | None) -> None:
        with self._lock:
            self._is_making = False
            if slot is not None and self._is_closed:
                slot.close()
            elif slot is not None:
                self._free.append(slot)
            self._lock.notify_all()

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
        """The slot is another's for good, who has its descriptor: this process lets go of it."""
        with self._lock:
            if slot in self._used:
                self._used.remove(slot)
                slot.close()
                self._lock.notify_all()

    def close(self) -> None:
        """Let go of all slots that are free now, and of the others as they are given back."""
        with self._lock:
            self._is_closed = True
            for slot in self._free:
                slot.close()
            self._free.clear()
