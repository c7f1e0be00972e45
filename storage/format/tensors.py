"""A tensor's memory as bytes, and bytes as a tensor's memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from typing_extensions import Buffer


def tensor_over(memory: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A contiguous tensor whose storage is the first bytes of `memory`, exactly as many as it needs."""
    size_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    raw = torch.frombuffer(memory[:size_bytes], dtype=torch.uint8)
    return raw.view(dtype).reshape(tuple(shape))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes."""
    return memoryview(cast(Buffer, tensor.detach().reshape(-1).view(torch.uint8).numpy()))
