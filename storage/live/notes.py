"""`Note`: what a rank would stage of its state after a step, as references where that is safe, and how it is taken.

Under FSDP2 parameters are whole in the middle of a forward pass, and a `state_dict()` then is of other tensors. So
the local shards are noted when a step is complete, and it is these that are copied, whatever the modules show then.

What may change before it is copied:

- What an optimizer has (its parameters and their state) changes in its `step()` only, which `StepLock` hears of (and
  version counters may not: fused kernels leave them as they are).
- Anything else (buffers, averages of parameters, tensors of a script's own) is copied with the note, up to 16 MiB of
  it in all; what is larger is copied when it is asked for, and only if torch's version counters say that nobody has
  written to it since.
- Values are encoded with the note.
"""

from __future__ import annotations

import contextlib
import marshal
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from storage.errors import UnsupportedValue
from storage.format.containers import Container
from storage.format.framing import EncodedItem
from storage.format.values import encode_value
from storage.saving.describe import Holdings, holdings_of
from storage.saving.saveplan import Chunk, Share
from storage.state.modules import is_fsdp1
from storage.state.objects import open_state
from storage.state.tree import Flat
from storage.torch_private import shards_of, version_of

_COPIED_BYTES_MAX = 16 * 1024 * 1024
_NUM_MOVES_MAX = 3
"""Of the state's tensors from note to note, before that counts as how this state is."""


@dataclass(frozen=True)
class NotedTensor:
    """A tensor to be copied: the state's own memory, or a copy that was taken with the note (`version` None)."""

    chunk: Chunk
    tensor: torch.Tensor
    version: int | None

    def is_as_noted(self) -> bool:
        """Whether nobody has written to it since."""
        return self.version is None or version_of(self.tensor) == self.version


@dataclass(frozen=True)
class Note:
    """What this rank holds of the state after `step`. `digest`: of its chunks and containers."""

    step: int
    tensors: tuple[NotedTensor, ...]
    values: tuple[tuple[Chunk, EncodedItem], ...]
    digest: str
    ready: torch.cuda.Event | None = None
    """On CUDA, the moment in the training's stream at which the step was complete."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(noted.chunk.size_bytes for noted in self.tensors)


@dataclass(frozen=True)
class _Outline:
    """Tells whether a state's leaves are those of the note before: by leaf, its tensors' kind, and their places."""

    containers: tuple[Container, ...]
    kinds: tuple[Any, ...]
    places: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class _Known:
    """What was found out of a state, valid as long as its outline is the same and no further optimizer was seen."""

    outline: _Outline
    num_optimizers: int
    holdings: Holdings
    tensors: tuple[tuple[Chunk, torch.Tensor, bool], ...]
    """With each: whether it is copied with the note."""
    values: tuple[Chunk, ...]

    def fits(self, outline: _Outline, num_optimizers: int) -> bool:
        """Whether it holds for a state of that outline."""
        return self.num_optimizers == num_optimizers and self.outline == outline


class NoteTaker:
    """Takes notes of one rank's state. For the training's thread."""

    def __init__(self, rank: int, optimizers: Collection[Optimizer]) -> None:
        """`optimizers`: those that have been seen to make steps; more may come."""
        self._rank = rank
        self._optimizers = optimizers
        self._known: _Known | None = None
        self._num_moves = 0
        self._encoded: dict[str, tuple[bytes, EncodedItem]] = {}

    @property
    def share(self) -> Share:
        """What this rank holds, as of the last note."""
        assert self._known is not None, "no note was taken yet"
        return self._known.holdings.share

    def take(self, step: int, state: Mapping[Any, Any]) -> Note:
        """Note the state of a complete step.

        Raises:
            UnsupportedValue: it cannot be saved, or not be noted at each step; the message says why.
            Exception: what a `state_dict` raises.
        """
        flat, objects = open_state(state, self._rank)
        outline = _outline(flat)
        if self._known is None or not self._known.fits(outline, len(self._optimizers)):
            if any(is_fsdp1(module) for module in objects.modules.values()):
                raise UnsupportedValue("FullyShardedDataParallel gathers parameters for a state_dict; FSDP2 does not")
            self._mind_moves(flat, outline)
            self._known = self._describe(flat, outline)
        known = self._known
        ready = None
        tensors = []
        for chunk, tensor, is_copied in known.tensors:
            content = tensor.clone() if is_copied else tensor
            tensors.append(NotedTensor(chunk, content, None if is_copied else version_of(tensor)))
        if any(noted.tensor.is_cuda for noted in tensors):
            ready = torch.cuda.Event()
            ready.record()
        values = tuple((chunk, self._encode(chunk.key, flat.leaves[chunk.key])) for chunk in known.values)
        return Note(step, tuple(tensors), values, known.holdings.digest, ready)

    def _mind_moves(self, flat: Flat, outline: _Outline) -> None:
        """Raise UnsupportedValue where an object gives copies of its tensors each time: too costly at every step."""
        if self._known is None or self._known.outline.kinds != outline.kinds:
            return
        pairs = zip(flat.leaves.items(), outline.places, self._known.outline.places, strict=True)
        sizes = {name: sum(t.nbytes for t in _local(leaf)) for (name, leaf), now, was in pairs if now != was}
        self._num_moves += sum(sizes.values()) > _COPIED_BYTES_MAX
        if self._num_moves > _NUM_MOVES_MAX:
            name = max(sizes, key=lambda name: sizes[name])
            raise UnsupportedValue(f"state {name!r} is another tensor after each step, a copy perhaps: too costly")

    def _describe(self, flat: Flat, outline: _Outline) -> _Known:
        holdings = holdings_of(flat, self._rank)
        owned = _places_of(self._optimizers)
        tensors: list[tuple[Chunk, torch.Tensor, bool]] = []
        copied_bytes = 0
        sized = [position for position, chunk in enumerate(holdings.chunks) if chunk.size_bytes]
        for position in sorted(sized, key=lambda position: holdings.chunks[position].size_bytes):
            chunk, tensor = holdings.chunks[position], holdings.tensor(position)
            is_small = copied_bytes + chunk.size_bytes <= _COPIED_BYTES_MAX
            is_copied = (is_small and _place(tensor) not in owned) or version_of(tensor) is None
            copied_bytes += chunk.size_bytes * is_copied
            tensors.append((chunk, tensor, is_copied))
        if copied_bytes > _COPIED_BYTES_MAX:
            raise UnsupportedValue("it has inference tensors, of which nobody can tell whether they were written to")
        values = tuple(chunk for chunk in holdings.chunks if chunk.sizes is None)
        return _Known(outline, len(self._optimizers), holdings, tuple(tensors), values)

    def _encode(self, key: str, value: Any) -> EncodedItem:
        """The value's item; the one of the last note, if it is the same value."""
        text = b""
        with contextlib.suppress(ValueError):  # it is more than plain Python
            text = marshal.dumps(value)
        known = self._encoded.get(key)
        if known is not None and text and known[0] == text:
            return known[1]
        item = encode_value(key, value)
        self._encoded[key] = (text, item)
        return item


def _local(leaf: Any) -> list[torch.Tensor]:
    """The tensors that this rank has of a leaf."""
    if isinstance(leaf, DTensor):
        with torch.no_grad():
            return [leaf.to_local()]
    if isinstance(leaf, torch.Tensor):
        return [leaf]
    return shards_of(leaf) or []


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Where its memory is."""
    return tensor.data_ptr(), tensor.nbytes


def _outline(flat: Flat) -> _Outline:
    local = [_local(leaf) for leaf in flat.leaves.values()]
    kinds = [tuple((tuple(t.shape), t.dtype, t.stride()) for t in tensors) for tensors in local]
    places = tuple(tuple(map(_place, tensors)) for tensors in local)
    return _Outline(tuple(flat.containers), tuple(zip(flat.paths.items(), kinds, strict=True)), places)


def _places_of(optimizers: Iterable[Optimizer]) -> set[tuple[int, int]]:
    """Where the tensors lie that only an optimizer's `step` writes to."""
    found: set[tuple[int, int]] = set()
    for optimizer in list(optimizers):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = [value for state in optimizer.state.values() if isinstance(state, dict) for value in state.values()]
        for tensor in (*parameters, *states):
            found.update(map(_place, _local(tensor)))
    return found
