"""`Stager`: a rank's copy of the tensors of a save, made before `save` returns, or behind the training's back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from storage.arena.arena import Arena
from storage.arena.changes import StateChanged, witnesses
from storage.arena.device import DeviceCopy, SideStreams, pin
from storage.arena.moves import Move, SharedWork, num_copy_threads, pieces_of
from storage.arena.optimizers import OptimizerWatch
from storage.arena.pending import PendingCopy, StagingListener
from storage.arena.slot import Slot
from storage.arena.staging import Staging
from storage.format.tensors import bytes_of, tensor_over
from storage.parallel import Pool
from storage.priority import wait_for_turn

_ALIGNMENT_BYTES = 64


class Staged:
    """A copy in a slot. `tensors` lie there, contiguous, each the whole of a storage of its own.

    Their content stands once `wait` has returned.
    """

    def __init__(self, slot: Slot, tensors: list[torch.Tensor], pending: PendingCopy | None, stager: Stager) -> None:
        self.slot = slot
        self.tensors = tensors
        self._pending = pending
        self._stager = stager

    @property
    def is_pending(self) -> bool:
        """Whether it was not whole when `stage` returned."""
        return self._pending is not None

    def go_on(self, *, is_last: bool = False) -> None:
        """The save returns: threads do the rest of the copy from here on, and make the next slot.

        Not before: they would have the processor that the save needs. Without this, who waits does the rest.

        Args:
            is_last: none comes after this one, so no slot is made for it: a process that ends would have to free it.
        """
        self._stager.go_on(self.slot, self._pending, is_last=is_last)

    def then(self, call: Callable[[], object]) -> None:
        """Have `call`, which must not take long, made when `wait` will not block for long any more; any thread."""
        if self._pending is not None:
            self._pending.then(call)
        else:
            call()

    def wait(self) -> None:
        """Block until the copy is whole; any thread. Raises StateChanged if it is not what was to be saved."""
        if self._pending is not None:
            self._pending.wait()

    def drain(self) -> None:
        """Block until nothing is written any more, whatever became of it; what nobody copies is copied here."""
        if self._pending is not None:
            self._pending.drain()

    def release(self) -> None:
        """The slot may be overwritten: what was in it is stored, or not wanted. Waits for what still writes to it."""
        self._end(Arena.give_back)

    def abandon(self) -> None:
        """As `release`, but the slot is used no more: another process may still read it, and must find what it was."""
        self._end(Arena.drop)

    def cancel(self) -> None:
        """As `release`, of a copy that nobody wants, without waiting for what of it has not begun."""
        if self._pending is not None:
            self._pending.cancel()
        self.release()

    def _end(self, leave: Callable[[Arena, Slot], None]) -> None:
        self.drain()
        self.tensors.clear()
        self._stager.free(self.slot, self._pending, leave)


@dataclass(frozen=True)
class _Layout:
    """Where tensors of these kinds begin in a slot, one after the other."""

    kinds: list[tuple[torch.dtype, torch.Size]]
    starts: list[int]
    size_bytes: int

    @classmethod
    def of(cls, kinds: list[tuple[torch.dtype, torch.Size]]) -> _Layout:
        starts, end = [], 0
        for dtype, shape in kinds:
            starts.append(end)
            end += -(-shape.numel() * dtype.itemsize // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return cls(kinds, starts, end)

    def over(self, memory: memoryview) -> list[torch.Tensor]:
        """These tensors, in that memory."""
        pairs = zip(self.kinds, self.starts, strict=True)
        return [tensor_over(memory[start:], dtype, tuple(shape)) for (dtype, shape), start in pairs]


@dataclass(frozen=True)
class _LaidOut:
    """Tensors over a slot."""

    layout: _Layout
    tensors: list[torch.Tensor]


class Stager:
    """Copies tensors into slots of an arena. `stage` and `close` belong to one thread.

    Args:
        arena: where the slots come from; `stage` blocks until one is free.
        keeps_spare: make the next slot while this one is in use.
    """

    def __init__(self, arena: Arena, staging: Staging = Staging.SYNC, *, keeps_spare: bool = False) -> None:
        self._arena = arena
        self._keeps_spare = keeps_spare
        self._num_threads = num_copy_threads()
        self._pool = Pool(self._num_threads, "storage-copy", wait_for_turn)
        self._streams = SideStreams()
        self._pending: PendingCopy | None = None
        self._turn = 0
        self._layout = _Layout.of([])
        self._is_overlapped = staging is Staging.OVERLAPPED
        self._watch = OptimizerWatch(self._before_step) if self._is_overlapped else None

    def stage(self, tensors: Sequence[tuple[str, torch.Tensor]], listener: StagingListener | None = None) -> Staged:
        """Copy named tensors. With OVERLAPPED and a listener, what optimizers own is copied after this has returned.

        Raises:
            MemoryError: there is no memory for a slot.
        """
        kinds = [(tensor.dtype, tensor.shape) for _, tensor in tensors]
        if kinds != self._layout.kinds:  # most saves have what the one before had
            self._layout = _Layout.of(kinds)
        while (slot := self._arena.take(self._layout.size_bytes)) is None:
            self._arena.wait_free()
        try:
            moves = self._lay_out(slot, tensors)
            pending = self._begin(slot, moves, listener)
        except BaseException:
            self._arena.give_back(slot)
            raise
        return Staged(slot, [move.target for move in moves], pending, self)

    def go_on(self, slot: Slot, pending: PendingCopy | None, *, is_last: bool) -> None:
        """See `Staged.go_on`."""
        if pending is not None:
            pending.begin(self._pool, max(1, self._num_threads // 4))  # the compute has the processors meanwhile
        if is_last:
            self._arena.leave_off()
        elif self._keeps_spare:
            self._pool.submit(self._arena.prepare, slot.size_bytes)

    def close(self) -> None:
        """End its threads, and watch optimizers no more; slots are the arena's."""
        if self._watch is not None:
            self._watch.close()
        self._pool.shutdown(wait=False)

    def _lay_out(self, slot: Slot, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[Move]:
        if not isinstance(slot.laid_out, _LaidOut) or slot.laid_out.layout is not self._layout:
            slot.laid_out = _LaidOut(self._layout, self._layout.over(slot.memory))
        targets = slot.laid_out.tensors
        return [Move(name, tensor, target) for (name, tensor), target in zip(tensors, targets, strict=True)]

    def _begin(self, slot: Slot, moves: Sequence[Move], listener: StagingListener | None) -> PendingCopy | None:
        late, at_once = self._divided(moves) if listener is not None else ([], list(moves))
        copies: list[DeviceCopy] = []
        if any(move.source.is_cuda for move in moves):
            pin(slot)
            copies = self._streams.begin(_on_devices(at_once), _on_devices(late))
        try:
            self._copy_now(_on_host(at_once))
        except BaseException:
            _await_all(copies)
            raise
        if not late or listener is None:
            for copy in copies:
                copy.wait()
            return None
        if self._pending is not None:
            self._pending.drain()  # no step came in between, and the next one waits for one copy only
        self._turn += 1
        host, devices = witnesses(_on_host(late), self._turn), witnesses(_on_devices(late), self._turn)
        pending = self._pending = PendingCopy(host, devices, copies, _Listening(self, listener))
        return pending

    def _copy_now(self, moves: Sequence[Move]) -> None:
        """Copy what lies in CPU memory; nobody writes to the slot any more when this returns, or raises."""
        pieces = list(pieces_of(moves))
        work = SharedWork(pieces)
        for _ in range(min(self._num_threads, len(pieces)) - 1):
            self._pool.submit(work.help)
        try:
            work.wait()
        except BaseException as error:  # an interrupt, say, while others copy
            work.leave_out(error)
            with contextlib.suppress(Exception):
                work.wait()
            raise

    def _divided(self, moves: Iterable[Move]) -> tuple[list[Move], list[Move]]:
        """Those of what changes in an optimizer's step only, and the others."""
        owned = self._watch.storages() if self._watch is not None and self._is_overlapped else set()
        if not owned:
            return [], list(moves)
        late: list[Move] = []
        at_once: list[Move] = []
        for move in moves:
            is_late = move.source.untyped_storage().data_ptr() in owned
            (late if is_late else at_once).append(move)
        return late, at_once

    def _before_step(self) -> None:
        if (pending := self._pending) is not None:
            pending.hold_step()

    def have_guarded(self) -> None:
        """Have the arena's guard told of its slots, by a thread that no training waits for."""
        with contextlib.suppress(RuntimeError):  # it is closed
            self._pool.submit(self._arena.have_guarded)

    def free(self, slot: Slot, pending: PendingCopy | None, leave: Callable[[Arena, Slot], None]) -> None:
        """Let go of a slot in that way."""
        if pending is not None and self._pending is pending:
            self._pending = None  # with it go its references to the state
        leave(self._arena, slot)

    def give_up_overlap(self) -> None:
        """Copy all before `stage` returns from here on: something here changes the state too early."""
        self._is_overlapped = False


class _Listening:
    """Lets a stager know of a change, and passes on what it hears."""

    def __init__(self, stager: Stager, listener: StagingListener) -> None:
        self._stager = stager
        self.held = listener.held
        self._changed = listener.changed

    def changed(self, error: StateChanged) -> None:
        self._stager.give_up_overlap()
        self._changed(error)


def in_place(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that lies plainly (`lies_plainly`) as `Staged` would have it, but in its own memory."""
    return tensor_over(bytes_of(tensor), tensor.dtype, tuple(tensor.shape))


def _await_all(copies: Iterable[DeviceCopy]) -> None:
    """Block until no device writes to the slot any more, whatever it has copied."""
    for copy in copies:
        with contextlib.suppress(Exception):
            copy.wait()


def _on_host(moves: Iterable[Move]) -> list[Move]:
    return [move for move in moves if not move.source.is_cuda]


def _on_devices(moves: Iterable[Move]) -> list[Move]:
    return [move for move in moves if move.source.is_cuda]
