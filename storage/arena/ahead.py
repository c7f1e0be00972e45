"""A slot that is made before it is needed, piece by piece, so that a save which needs it meanwhile takes it over."""

from __future__ import annotations

import threading

from storage.arena.slot import Slot

_PIECE_BYTES = 16 * 1024 * 1024
"""A save that comes meanwhile waits for one at most: an eighth of a second where the kernel finds pages slowly."""


class SlotAhead:
    """One that is not whole yet. Thread-safe: one thread makes it, until another has taken it over.

    Raises MemoryError as `Slot.create_empty`.
    """

    def __init__(self, size_bytes: int) -> None:
        self._slot = Slot.create_empty(size_bytes)
        self._making = threading.Lock()
        self._at = 0
        self._is_left = False
        self._lack: MemoryError | None = None

    @property
    def size_bytes(self) -> int:
        """How large it will be."""
        return self._slot.size_bytes

    def make(self) -> Slot | None:
        """Make its pages; None where somebody has taken it over, or let go of it, meanwhile.

        Raises MemoryError, to who has taken it over as well; nothing is left of it then.
        """
        while True:
            with self._making:
                if self._is_left:
                    return None
                if self._at == self.size_bytes:
                    self._is_left = True
                    return self._slot
                stop = min(self._at + _PIECE_BYTES, self.size_bytes)
                try:
                    self._slot.populate(self._at, stop, is_ahead=True)
                except MemoryError as error:
                    self._lack, self._is_left = error, True
                    self._slot.close()
                    raise
                self._at = stop

    def finish(self) -> Slot:
        """Take it over: what is missing is made here, by somebody who waits for it. Raises MemoryError.

        To be called once at most, and not where `let_go` is.
        """
        self._is_left = True  # first: a thread that makes piece after piece would have the lock again before this one
        with self._making:
            if self._lack is not None:
                raise self._lack
            try:
                self._slot.populate(self._at, self.size_bytes)
            except BaseException:
                self._slot.close()
                raise
            return self._slot

    def let_go(self) -> None:
        """Nobody needs it any more."""
        self._is_left = True
        with self._making:
            self._slot.close()
