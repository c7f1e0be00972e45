"""Copies what was noted, in bounded time, while the training hangs in a collective."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from storage.errors import StorageError
from storage.format.tensors import tensor_over
from storage.live.notes import Note, NotedTensor
from storage.saving.writing import Payload

_ALIGNMENT_BYTES = 64
_DEVICE_POLL_S = 0.001


class NotCaptured(StorageError):
    """The live state could not be staged; the message says why."""


def room_for(note: Note) -> int:
    """How many bytes `stage` needs."""
    return sum(_padded(noted.chunk.size_bytes) for noted in note.tensors)


def stage(note: Note, memory: memoryview, deadline_s: float) -> list[Payload]:
    """Copy everything of the note into `memory`.

    Args:
        deadline_s: by `time.monotonic`; between two tensors it is minded.

    Raises:
        NotCaptured: a tensor was written to since the note, or the deadline has come.
    """
    payloads = [Payload(chunk, item) for chunk, item in note.values]
    start = 0
    with beside_training(note.ready, deadline_s):
        for noted in note.tensors:
            if time.monotonic() > deadline_s:
                raise NotCaptured(f"step {note.step} could not be copied in time")
            content = tensor_over(memory[start:], noted.tensor.dtype, tuple(noted.tensor.shape))
            content.copy_(noted.tensor, non_blocking=noted.tensor.is_cuda)
            payloads.append(Payload(noted.chunk, content))
            start += _padded(noted.chunk.size_bytes)
    changed = [noted for noted in note.tensors if not noted.is_as_noted()]
    if changed:
        raise NotCaptured(_tell(note, changed))
    return payloads


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _tell(note: Note, changed: list[NotedTensor]) -> str:
    largest = max(changed, key=lambda noted: noted.chunk.size_bytes)
    more = f", and {len(changed) - 1} more were" if len(changed) > 1 else ""
    return (
        f"state {largest.chunk.key!r} was written to after step {note.step} was noted{more}: what is changed outside of"
        " an optimizer's step must be small, or be changed before the note"
    )


@contextlib.contextmanager
def beside_training(ready: torch.cuda.Event | None, deadline_s: float) -> Iterator[None]:
    """On CUDA, do what follows in a stream of its own, from the moment `ready` of the training's on.

    That one may be waiting for a kernel that never ends. Raises NotCaptured: the device does not come that far in time.
    """
    if ready is None:
        yield
        return
    with torch.cuda.device(ready.device):
        _await(ready, deadline_s)
        stream = torch.cuda.Stream(ready.device)
        with torch.cuda.stream(stream):
            yield
        _await(stream.record_event(), deadline_s)


def _await(event: torch.cuda.Event, deadline_s: float) -> None:
    while not event.query():
        if time.monotonic() > deadline_s:
            raise NotCaptured("the device does not come to it in time")
        time.sleep(_DEVICE_POLL_S)
