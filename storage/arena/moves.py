"""Tensors on their way into a slot, in pieces that several threads may copy at once."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from storage.agent import num_local_ranks
from storage.torch_private import copy_all, is_without_memory

PIECE_BYTES = 16 * 1024 * 1024
_SMALL_BYTES = 32 * 1024
"""Of a tensor that torch copies on the thread that asks for it, whatever its dtype."""
_NUM_AT_ONCE = 1024
"""Of small ones: a call for each takes Python longer than the copy, and threads wait for one another in between."""
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
NUM_THREADS_MAX = 8


@dataclass(frozen=True)
class Move:
    """One tensor: `source` is the training's, `target` contiguous, of the same dtype and shape, in the slot."""

    name: str
    source: torch.Tensor
    target: torch.Tensor


def lies_plainly(tensor: torch.Tensor) -> bool:
    """Whether the tensor's bytes lie in CPU memory as those of a contiguous copy would."""
    plain = tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return plain and not is_without_memory(tensor)


def pieces_of(moves: Collection[Move]) -> Iterator[Callable[[], None]]:
    """Calls that together copy all of them, none of more than 32 MiB where that can be told from outside."""
    small: list[Move] = []
    for move in moves:
        if not (size_bytes := move.source.nbytes):
            continue
        if not lies_plainly(move.source):
            yield functools.partial(_copy, move)
        elif size_bytes <= _SMALL_BYTES and type(move.source) in _PLAIN:
            small.append(move)
        else:
            for start in range(0, size_bytes, PIECE_BYTES):
                yield functools.partial(_copy_bytes, move, start)
    for start in range(0, len(small), _NUM_AT_ONCE):
        yield functools.partial(_copy_small, small[start : start + _NUM_AT_ONCE])


def _copy_small(moves: Sequence[Move]) -> None:
    if moves[0].target.is_inference():  # laid out in a block of that mode, which other threads are not in
        for move in moves:
            _copy_bytes(move, 0)
    else:
        copy_all([move.target for move in moves], [move.source for move in moves])


def _copy_bytes(move: Move, start: int) -> None:
    length = min(PIECE_BYTES, move.source.nbytes - start)
    # one memmove on this thread, without the GIL; torch's copy would take the compute threads of a step
    ctypes.memmove(move.target.data_ptr() + start, move.source.data_ptr() + start, length)


def _copy(move: Move) -> None:
    with torch.no_grad():
        move.target.copy_(move.source.detach())


def num_copy_threads() -> int:
    """How many threads a rank copies with: its share of the host's processors. One seldom fills the memory's bus."""
    return max(1, min(NUM_THREADS_MAX, len(os.sched_getaffinity(0)) // num_local_ranks(os.environ)))


class SharedWork:
    """Calls that are made once each, by as many threads as come to `help`. Thread-safe.

    Args:
        at_end: made once, after the last call has ended, by whoever made that; before `wait` returns.

    Of several failures, those of `at_end` included, the first is kept, and what has not begun is left out.
    """

    def __init__(self, calls: Sequence[Callable[[], None]], at_end: Callable[[], None] = lambda: None) -> None:
        self._calls = deque([*calls, None])
        self._num_left = len(self._calls)
        self._at_end = at_end
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._then: list[Callable[[], object]] = []
        self._failure: BaseException | None = None

    @property
    def has_ended(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._ended.is_set()

    def help(self) -> None:
        """Make calls until none is left that nobody has begun."""
        while True:
            try:
                call = self._calls.popleft()
            except IndexError:
                return
            if call is not None and self._failure is None:
                self._make(call)
            with self._lock:
                self._num_left -= 1
                if self._num_left:
                    continue
            self._make(self._at_end)
            with self._lock:
                self._ended.set()
                then, self._then = self._then, []
            for told in then:
                told()

    def then(self, call: Callable[[], object]) -> None:
        """Have `call`, which must neither fail nor take long, made once all has ended: here, if that is so."""
        with self._lock:
            if not self._ended.is_set():
                self._then.append(call)
                return
        call()

    def wait(self, *, helps: bool = True) -> None:
        """Help, and block until all has ended. Raises the first failure, to each that waits."""
        if helps:
            self.help()
        self._ended.wait()
        if self._failure is not None:
            raise self._failure

    def leave_out(self, why: BaseException) -> None:
        """Begin no further call: that is a failure as others are. `wait` then ends it."""
        with self._lock:
            self._failure = self._failure or why

    def _make(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised to all that wait
            with self._lock:
                self._failure = self._failure or error
