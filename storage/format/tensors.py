"""A tensor's memory as bytes, bytes as a tensor's memory, and which tensors have none such."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from typing_extensions import Buffer

_LOOKED_AT_MAX = 1 << 22


STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
"""What torch's pickles call a storage, and what its elements are."""


def tensor_over(memory: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A contiguous tensor whose storage is the first bytes of `memory`, exactly as many as it needs."""
    size_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    raw = torch.frombuffer(memory[:size_bytes], dtype=torch.uint8)
    return raw.view(dtype).reshape(tuple(shape))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes."""
    # not by reshape, which keeps the stride of a single element, and that may be any
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return memoryview(cast(Buffer, flat.view(torch.uint8).numpy()))


def oddity(tensor: torch.Tensor) -> str | None:
    """Why a tensor is more, or less, than numbers in memory, and what to do; None if it is just that."""
    if torch.nn.parameter.is_lazy(tensor):
        return "that has no shape yet; run the model once before"
    if tensor.is_nested:
        return "that is nested; keep its parts in the state"
    if tensor.is_quantized:
        return "that is quantized; keep int_repr(), scale and zero point in the state, or dequantize()"
    if tensor.layout is not torch.strided:
        return f"of layout {tensor.layout}; only dense tensors are kept: to_dense(), or its parts"
    if tensor.device.type == "meta":
        return "on the meta device, without data"
    if type(tensor).__torch_dispatch__ != torch.Tensor.__torch_dispatch__:
        name = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        return f"of class {name}, which is more than its numbers; keep the tensors that it is made of in the state"
    if not _is_copied(tensor.dtype):
        return f"of dtype {tensor.dtype}, which torch cannot copy; keep its bytes as uint8"
    return None


@functools.cache
def _is_copied(dtype: torch.dtype) -> bool:
    try:
        torch.empty(2, dtype=dtype).copy_(torch.empty(2, dtype=dtype))
    except (RuntimeError, NotImplementedError):
        return False
    return True


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements of the tensor share memory with each other, as those of an expanded one do."""
    if not tensor.numel():
        return False
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return _has_twins(tensor)
        reach += (size - 1) * stride
    return False


def _has_twins(tensor: torch.Tensor) -> bool:
    """By looking at every place; of too many it is taken for granted."""
    if 0 in (stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1):
        return True
    if tensor.numel() > _LOOKED_AT_MAX:
        return True
    places = np.zeros(1, np.int64)
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        places = (places[:, None] + np.arange(size) * stride).reshape(-1)
    return len(np.unique(places)) < len(places)
