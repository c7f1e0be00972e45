"""Whether ranks hold the same: a short sum of a value's content, equal for equal values of any two processes."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import hashlib
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from storage.format.checksum import crc32c
from storage.format.tensors import bytes_of
from storage.state.tree import PLAIN_TYPES

SAMPLE_SIZE_BYTES = 1024 * 1024
_DEPTH_MAX = 64
_IN_WORDS = (
    *(datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, decimal.Decimal, uuid.UUID, pathlib.PurePath),
    *(slice, type, torch.dtype, torch.device, torch.layout, np.dtype),
)
"""Types whose `repr` is the same in every process."""


def fingerprint(value: Any, sample_size_bytes: int = SAMPLE_SIZE_BYTES) -> str:
    """A short sum of a plain value, a container or a tensor, of which the first bytes count.

    Pickles would not do: equal values have different ones, by which of their parts are the same object. Of what is
    not known here only the type counts, so that two may be taken for equal that are not, but not the other way round.
    """
    return hashlib.blake2b(_told(value, sample_size_bytes), digest_size=8).hexdigest()


def combined(sums: Mapping[str, str]) -> str:
    """One sum for many, by name."""
    return fingerprint(dict(sums))


def differing(sums_of_rank: Sequence[Mapping[str, str]]) -> list[tuple[str, int, int]]:
    """The names under which ranks hold different things, each with two ranks that do, in the order of the names."""
    first: dict[str, tuple[int, str]] = {}
    found: dict[str, tuple[int, int]] = {}
    for rank, sums in enumerate(sums_of_rank):
        for name, total in sums.items():
            other, known = first.setdefault(name, (rank, total))
            if known != total:
                found.setdefault(name, (other, rank))
    return [(name, *found[name]) for name in first if name in found]


def _told(value: Any, sample_size_bytes: int, depth: int = 0) -> bytes:
    kind = type(value).__qualname__.encode()
    if depth > _DEPTH_MAX:
        return kind

    def all_of(values: Any) -> list[bytes]:
        return [_told(part, sample_size_bytes, depth + 1) for part in values]

    if value is None or isinstance(value, (bool, int, str, bytes, bytearray, complex)):
        return b"%b %b" % (kind, _text(value))
    if isinstance(value, float):
        return b"float nan" if value != value else b"%b %b" % (kind, value.hex().encode())
    if isinstance(value, torch.Tensor):
        return b"tensor %b %b" % (f"{value.dtype} {tuple(value.shape)}".encode(), _sample(value, sample_size_bytes))
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        return b"%b %b %b" % (kind, f"{value.dtype} {value.shape}".encode(), _sum(value.tobytes()[:sample_size_bytes]))
    if isinstance(value, Mapping):
        pairs = [b"".join(map(_sum, all_of(pair))) for pair in value.items()]
        return b"%b %b" % (kind, b"".join(sorted(pairs)))
    if isinstance(value, (set, frozenset)):
        return b"%b %b" % (kind, b"".join(sorted(map(_sum, all_of(value)))))
    if isinstance(value, (list, tuple)) and all(type(part) in PLAIN_TYPES for part in value):
        with contextlib.suppress(ValueError):  # of numbers with thousands of digits
            return b"%b %b" % (kind, _sum(repr(value).encode("utf-8", "surrogatepass")))  # a sampler's may be long
    if isinstance(value, Sequence):
        return b"%b %b" % (kind, b"".join(map(_sum, all_of(value))))
    if isinstance(value, _IN_WORDS):
        return b"%b %b" % (kind, repr(value).encode())
    return kind


def _text(value: Any) -> bytes:
    if isinstance(value, int) and not isinstance(value, bool):
        return b"%x" % value if value >= 0 else b"-%x" % -value  # an int of thousands of digits has no decimal text
    return repr(value).encode("utf-8", "surrogatepass")


def _sum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def _sample(tensor: torch.Tensor, size_bytes: int) -> bytes:
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or type(tensor) is not torch.Tensor:
        return b""
    num = min(tensor.numel(), max(1, size_bytes // max(1, tensor.element_size())))
    head = tensor.detach().resolve_conj().resolve_neg().flatten()[:num].cpu()
    return crc32c(bytes_of(head.contiguous())).to_bytes(4, "little") if num else b""
