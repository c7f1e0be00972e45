"""Random numbers by their place: element `i` of a parameter is the same on any mesh, whoever draws it.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), in integer operations that
every device has. A normal number is read from a table and interpolated: sums and products of IEEE numbers are the
same in a vector, in the rest that fills none, and on a GPU, which logarithms and cosines are not.
"""

from __future__ import annotations

import functools
import itertools
import statistics

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF
_NUM_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORDS = 4  # of 32 bits, that one counter gives
_TABLE_BITS = 16
_CHUNK = 1 << 18  # elements at a time, so that a shard of gigabytes takes no further ones


def philox(first: int, count: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """The words of `count` counters from `first` on, int64 (count, 4), each in [0, 2^32).

    Args:
        first: below 2^63; the counter's upper 64 bits are zero.
        key: 64 bits.
    """
    counter = torch.arange(first, first + count, device=device)
    a, b = counter & _LOW_32, counter >> 32
    c, d = torch.zeros_like(a), torch.zeros_like(a)
    low_key, high_key = key & _LOW_32, key >> 32
    for _ in range(_NUM_ROUNDS):
        # A product of two 32-bit numbers wraps into the sign of an int64: its bits are right, which is all that counts.
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = (right >> 32).bitwise_and_(_LOW_32).bitwise_xor_(b).bitwise_xor_(low_key)
        c = (left >> 32).bitwise_and_(_LOW_32).bitwise_xor_(d).bitwise_xor_(high_key)
        b, d = right.bitwise_and_(_LOW_32), left.bitwise_and_(_LOW_32)
        low_key, high_key = (low_key + _KEY_STEPS[0]) & _LOW_32, (high_key + _KEY_STEPS[1]) & _LOW_32
    return torch.stack((a, b, c, d), dim=1)


def normals(first: int, count: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """Elements `first` to `first + count` of the endless sequence of `key`, fp32 (count,), standard normal.

    The distribution ends at 4.47 standard deviations, beyond which one number in 128,000 would lie.
    """
    counter = first // _WORDS
    num_counters = -(-(first + count) // _WORDS) - counter
    skip = first - counter * _WORDS
    words = philox(counter, num_counters, key, device).flatten()[skip : skip + count]
    table = _quantiles(torch.device(device))
    at = words >> (32 - _TABLE_BITS)
    between = (words & ((1 << (32 - _TABLE_BITS)) - 1)).float() * 2.0 ** (_TABLE_BITS - 32)
    low = table[at]
    return low + (table[at + 1] - low) * between


@functools.cache
def _quantiles(device: torch.device) -> Tensor:
    """The normal distribution's quantiles at every multiple of 2^-16, fp32 (2^16 + 1,)."""
    size = 1 << _TABLE_BITS
    inverse = statistics.NormalDist().inv_cdf  # Python's own arithmetic: the same on every machine
    upper = [inverse(0.5 + k / size) for k in range(size // 2)] + [inverse(1.0 - 0.25 / size)]
    return torch.tensor([-x for x in reversed(upper[1:])] + upper, dtype=torch.float32, device=device)


@torch.no_grad()
def fill_normal(local: Tensor, starts: tuple[int, ...], shape: tuple[int, ...], key: int, std: float) -> None:
    """Fill this rank's box of a tensor with N(0, std) by each element's index in the whole tensor.

    Args:
        local: fp32, the box.
        starts: its offsets in the whole tensor.
        shape: of the whole tensor; its elements are numbered in row-major order.
    """
    if not local.numel():
        return
    # The dimensions from `cut` on make one run of consecutive numbers: all after `cut` are whole.
    cut = max((dim for dim in range(len(shape)) if local.shape[dim] != shape[dim]), default=0)
    strides = [1] * len(shape)
    for dim in reversed(range(len(shape) - 1)):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    row = strides[cut]
    step = max(1, _CHUNK // row)
    for lead in itertools.product(*map(range, local.shape[:cut])):
        run = local[lead]
        first = sum((start + at) * stride for start, at, stride in zip(starts, (*lead, 0), strides, strict=False))
        for begin in range(0, run.shape[0], step):
            part = run[begin : begin + step]
            part.copy_(normals(first + begin * row, part.numel(), key, local.device).mul_(std).view_as(part))
