"""Fill a sharded model: the same values on every mesh."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elastic_moe.model.decoder import Decoder
from elastic_moe.parallel.draws import fill_normal


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Give a model built on the meta device its memory: this rank's shards, and buffers of zeros."""
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()


@torch.no_grad()
def init_weights(model: Decoder, seed: int) -> None:
    """Initialise every parameter from `seed` and its name alone: norms to one, matrices to N(0, init_std).

    Each rank draws its own shards, on their device: no communication, and the same bits on any mesh.
    """
    for name, param in model.named_parameters():
        _draw(param, _name_key(seed, name), model.config.init_std)


def _draw(param: Tensor, key: int, std: float) -> None:
    if param.ndim == 1:
        _local(param).fill_(1.0)
    else:
        fill_normal(_local(param), _starts(param), tuple(param.shape), key, std)


def _name_key(seed: int, name: str) -> int:
    """64 bits; Python's own hash() of a string differs from process to process."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


class WeightSource(Protocol):
    """Whole parameters that are read by boxes."""

    def holds(self, name: str) -> bool:
        """Whether the parameter `name` is one of them; one that is not is drawn as for a model from scratch."""

    def read(self, name: str, starts: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The box at `starts` of `sizes` of the parameter `name`, which has `shape`."""


@torch.no_grad()
def read_weights(model: Decoder, source: WeightSource, seed: int = 0) -> None:
    """Fill every parameter from `source`: each rank reads its own shards. No communication.

    Args:
        seed: of what the source does not hold.
    """
    for name, param in model.named_parameters():
        if not source.holds(name):
            _draw(param, _name_key(seed, name), model.config.init_std)
            continue
        local = _local(param)
        starts = [min(start, size) for start, size in zip(_starts(param), param.shape, strict=True)]
        local.copy_(source.read(name, starts, local.shape, param.shape))


def write_part(param: Tensor, full: Tensor) -> None:
    """Copy this rank's part of `full` into `param`; all of it where the parameter is not sharded."""
    local = _local(param)
    local.copy_(_cut(full, _starts(param), local.shape))


def gather_full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor whole, on every rank. A collective; for tests and exports of models that fit one rank."""
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def _local(param: Tensor) -> Tensor:
    return param.to_local() if isinstance(param, DTensor) else param


def _starts(param: Tensor) -> tuple[int, ...]:
    """Offsets of this rank's shard in the full tensor: the very ones that a checkpoint of it names."""
    if not isinstance(param, DTensor):
        return (0,) * param.ndim
    (chunk,) = param.__create_chunk_list__()
    return tuple(chunk.offsets)


def _cut(full: Tensor, starts: tuple[int, ...], sizes: torch.Size) -> Tensor:
    for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        # An empty shard's offset may lie beyond the end.
        full = full.narrow(dim, min(start, full.shape[dim] - size), size)
    return full
