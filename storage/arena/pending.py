"""What of a save is still being copied while the training goes on, and what waits for it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Protocol

from storage.arena.changes import StateChanged, Witness, check_samples, check_versions
from storage.arena.device import DeviceCopy
from storage.arena.moves import SharedWork, pieces_of

_TOLD_S_MIN = 0.01  # a shorter wait holds nobody up
_BEGINS_S = 0.1
"""For so long who waits for a copy leaves it to the save that is about to begin it."""
_PAUSE_S = 0.003
"""So much later threads begin: else they take the processor of a rank of this host that has not ended its save yet."""


class StagingListener(Protocol):
    """Hears, on any thread, of a save that is copied behind the training's back."""

    def held(self, seconds: float) -> None:
        """An optimizer's step has waited for the copy."""

    def changed(self, error: StateChanged) -> None:
        """A tensor was changed too early: the copy is of no use."""


class Unwanted(Exception):
    """Nobody wants the copy."""


class PendingCopy:
    """Copies that are under way. Thread-safe.

    Args:
        on_host: the tensors in CPU memory, `on_devices` the others, as they were at the save.
        copies: of the latter, one for each device, begun already.
    """

    def __init__(
        self,
        on_host: Sequence[Witness],
        on_devices: Sequence[Witness],
        copies: Sequence[DeviceCopy],
        listener: StagingListener,
    ) -> None:
        self._on_host = on_host
        self._on_devices = on_devices
        self._copies = copies
        self._listener = listener
        self._lock = threading.Lock()
        self._change: StateChanged | None = None
        self._has_settled = self._is_unwanted = False
        self._begun = threading.Event()
        self.work = SharedWork(list(pieces_of([witness.move for witness in on_host])), self._check_host)
        """The copies within CPU memory, for any thread to help with."""

    def begin(self, pool: Executor, num_threads: int) -> None:
        """Have threads of the pool copy what is in CPU memory; who waits leaves it to them then."""
        self._begun.set()
        for _ in range(num_threads):
            pool.submit(self._help)

    def _help(self) -> None:
        time.sleep(_PAUSE_S)
        self.work.help()

    def then(self, call: Callable[[], object]) -> None:
        """Have `call`, which must not take long, made once all in CPU memory is copied, or will not be."""
        self.work.then(call)

    def cancel(self) -> None:
        """Nobody wants the copy: what has not begun of it is left out, and no change of the state is told."""
        self._is_unwanted = True
        self.work.leave_out(Unwanted())
        self.drain()

    def hold_step(self) -> None:
        """Before an optimizer changes what it owns: block until that is copied; devices wait by themselves."""
        began_s = time.monotonic()
        with contextlib.suppress(Exception):  # `wait` tells it, where the save is stored
            self.work.wait()
        self._settle_devices()
        for copy in self._copies:
            copy.hold_stream()
        if (held_s := time.monotonic() - began_s) >= _TOLD_S_MIN:
            self._listener.held(held_s)

    def wait(self) -> None:
        """Block until all is copied. Raises StateChanged if that is not the state of the save."""
        # one more thread beside the training would slow that down
        self.work.wait(helps=not self.work.has_ended and not self._begun.wait(_BEGINS_S))
        for copy in self._copies:
            try:
                copy.wait()
            except StateChanged as error:
                self._note(error)
        self._settle_devices()
        if self._change is not None:
            raise self._change

    def drain(self) -> None:
        """Block until nothing is written any more, whatever became of it."""
        with contextlib.suppress(Exception):
            self.work.wait()
        for copy in self._copies:
            with contextlib.suppress(Exception):
                copy.wait()

    def _check_host(self) -> None:
        try:
            check_versions(self._on_host)
            check_samples(self._on_host)
        except StateChanged as error:
            self._note(error)
            raise

    def _settle_devices(self) -> None:
        """Look once at what torch has counted: from then on an optimizer may, whose device waits for the copy."""
        with self._lock:
            if self._has_settled:
                return
            self._has_settled = True
        try:
            check_versions(self._on_devices)
        except StateChanged as error:
            self._note(error)

    def _note(self, error: StateChanged) -> None:
        with self._lock:
            is_first, self._change = self._change is None, self._change or error
        if is_first and not self._is_unwanted:
            self._listener.changed(error)
