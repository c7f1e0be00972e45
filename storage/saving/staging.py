"""A rank's copy of the tensors of one save, in CPU memory that is reused by the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from storage.format.tensors import bytes_of, tensor_over
from storage.torch_private import is_without_memory

_ALIGNMENT_BYTES = 64


class StagingBuffer:
    """One growing block of CPU memory. Not thread-safe: fill it again only when its last content is stored."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def stage(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of `tensors`: contiguous CPU tensors, each the whole of a storage of its own in this buffer."""
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if end > self._memory.numel():
            on_gpu = any(tensor.is_cuda for tensor in tensors)
            self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=on_gpu)
        memory = bytes_of(self._memory)
        staged = []
        for tensor, start in zip(tensors, starts, strict=True):
            copy = tensor_over(memory[start:], tensor.dtype, tuple(tensor.shape))
            copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            staged.append(copy)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.current_stream().synchronize()
        return staged


def as_staged(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor as `StagingBuffer.stage` would return it, but in its own memory; None if it does not lie that way."""
    plain = tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    plain = plain and not is_without_memory(tensor)
    return tensor_over(bytes_of(tensor), tensor.dtype, tuple(tensor.shape)) if plain else None
