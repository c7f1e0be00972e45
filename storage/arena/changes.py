"""Whether tensors that are copied behind the training's back stayed as they were until they were copied.

torch counts the changes of a tensor (its version), but not those by `.data`, numpy or a kernel of one's own. A sample
of the bytes finds these, if they change much: most that scales, averages or swaps weights does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from storage.arena.moves import Move, lies_plainly
from storage.format.checksum import crc32
from storage.torch_private import version_of

NUM_SAMPLED_MAX = 512
_NUM_STRETCHES = 8
_STRETCH_BYTES = 256


class StateChanged(RuntimeError):
    """A tensor was changed between a save and the optimizer's next step, while it was being copied."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name!r} was changed before the next step of its optimizer, while it was being copied; change it after"
            " that step, or save with staging='sync'"
        )
        self.name = name


@dataclass(frozen=True)
class Witness:
    """What a tensor was like at the save. `version` is None where torch counts none, `sample` where none is taken."""

    move: Move
    version: int | None
    sample: int | None


def witnesses(moves: Sequence[Move], turn: int) -> list[Witness]:
    """One for each; of many, samples of 512 only: of others in each `turn`."""
    stride = -(-len(moves) // NUM_SAMPLED_MAX) or 1
    return [
        Witness(move, version_of(move.source), sample_of(move.source) if (at + turn) % stride == 0 else None)
        for at, move in enumerate(moves)
    ]


def check_versions(seen: Collection[Witness]) -> None:
    """Raise StateChanged if torch has counted a change since."""
    for witness in seen:
        if version_of(witness.move.source) != witness.version:
            raise StateChanged(witness.move.name)


def check_samples(seen: Collection[Witness]) -> None:
    """Raise StateChanged if a sample differs, where it was or where it was copied to."""
    for witness in seen:
        if witness.sample is None:
            continue
        if sample_of(witness.move.source) != witness.sample or sample_of(witness.move.target) != witness.sample:
            raise StateChanged(witness.move.name)


def sample_of(tensor: torch.Tensor) -> int | None:
    """A checksum of eight stretches and the end of it; None of one that does not lie in CPU memory plainly."""
    if not lies_plainly(tensor) or not tensor.numel():
        return None
    # past torch, which takes longer to give its memory away than the sample does
    data = np.frombuffer(memoryview((ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())), np.uint8)
    if data.nbytes <= 2 * _NUM_STRETCHES * _STRETCH_BYTES:
        return crc32(data.tobytes())
    spacing = data.nbytes // _NUM_STRETCHES
    rows = data[: spacing * _NUM_STRETCHES].reshape(_NUM_STRETCHES, spacing)
    return crc32(data[-_STRETCH_BYTES:].tobytes(), crc32(rows[:, :_STRETCH_BYTES].tobytes()))
