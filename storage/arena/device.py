"""CUDA tensors on their way into a slot: on a stream of their own, into memory that the device writes by itself."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from storage.arena.changes import StateChanged
from storage.arena.moves import Move
from storage.arena.slot import Slot

log = logging.getLogger(__name__)

NUM_SAMPLED_MAX = 64
_SAMPLE_BYTES = 1024


def pin(slot: Slot) -> None:
    """Lock the slot's pages for the devices' copy engines, until it is closed. Where that fails copies take longer."""
    if slot.is_pinned:
        return
    runtime = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(slot.address, slot.size_bytes, 0))
    if code:
        log.warning(
            "%d bytes cannot be locked for the GPU (CUDA error %d): saves block for longer", slot.size_bytes, code
        )
        return
    slot.is_pinned = True
    slot.before_close(functools.partial(runtime.cudaHostUnregister, slot.address))


@dataclass(frozen=True)
class _Samples:
    """Some bytes of some tensors, on their device: at the save, and once they were copied."""

    moves: tuple[Move, ...]
    before: torch.Tensor
    after: torch.Tensor

    def check(self) -> None:
        """Raise StateChanged if they differ, from each other or from what is in the slot. Blocks."""
        before, after = self.before.cpu(), self.after.cpu()
        start = 0
        for move in self.moves:
            in_slot = _sample(move.target)
            stop = start + in_slot.numel()
            if not torch.equal(before[start:stop], after[start:stop]) or not torch.equal(before[start:stop], in_slot):
                raise StateChanged(move.name)
            start = stop


@dataclass(frozen=True)
class DeviceCopy:
    """Copies that are under way on one device."""

    device: torch.device
    end: torch.cuda.Event
    samples: _Samples | None

    def hold_stream(self) -> None:
        """What is put on the device's current stream from here on begins after the copies. Does not block."""
        torch.cuda.current_stream(self.device).wait_event(self.end)

    def wait(self) -> None:
        """Block until all is in the slot. Raises StateChanged."""
        self.end.synchronize()
        if self.samples is not None:
            self.samples.check()


class SideStreams:
    """A stream beside the training's on each device. Belongs to the training's thread."""

    def __init__(self) -> None:
        self._of_device: dict[torch.device, torch.cuda.Stream] = {}

    def begin(self, now: Sequence[Move], behind: Sequence[Move]) -> list[DeviceCopy]:
        """Begin to copy. Nothing that the training does after this comes before the copies of `now`."""
        devices = {move.source.device: None for move in (*now, *behind)}
        return [self._begin(device, _of(device, now), _of(device, behind)) for device in devices]

    def _begin(self, device: torch.device, now: Sequence[Move], behind: Sequence[Move]) -> DeviceCopy:
        training = torch.cuda.current_stream(device)
        stream = self._of_device.get(device) or self._of_device.setdefault(device, torch.cuda.Stream(device))
        sampled = tuple(move for move in behind if move.source.is_contiguous())[:NUM_SAMPLED_MAX]
        with torch.no_grad():
            before = torch.cat([_sample(move.source) for move in sampled]) if sampled else None
            stream.wait_stream(training)
            with torch.cuda.stream(stream):
                for move in now:
                    move.target.copy_(move.source.detach(), non_blocking=True)
                if now:
                    training.wait_event(stream.record_event())
                for move in behind:
                    move.target.copy_(move.source.detach(), non_blocking=True)
                after = torch.cat([_sample(move.source) for move in sampled]) if sampled else None
                end = stream.record_event()
        samples = _Samples(sampled, before, after) if before is not None and after is not None else None
        return DeviceCopy(device, end, samples)


def _of(device: torch.device, moves: Sequence[Move]) -> list[Move]:
    return [move for move in moves if move.source.device == device]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """The first and the last bytes of a contiguous tensor."""
    data = tensor.detach().reshape(-1).view(torch.uint8)
    return torch.cat((data[:_SAMPLE_BYTES], data[-_SAMPLE_BYTES:]))
