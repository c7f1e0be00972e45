"""Which samples a step holds, and which of them a rank works on: pure functions of integers.

Nothing here depends on the world size but the slicing, so a job that is resized sees the same samples in the same
step, and the whole state of the data is the number of the step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

_NUM_FEISTEL_ROUNDS = 8
_SPLIT_SEED = -1  # no job has it


def ids(seed: int, step: int, global_batch: int, num_samples: int) -> Int64s:
    """The samples of a step, int64 (global_batch,), each in [0, num_samples).

    Samples are drawn without replacement: every run of `num_samples` draws, an epoch, is one permutation of all
    samples, another for each epoch and seed. Steps count from 0, and an epoch may end within a step.
    """
    draws = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    epochs = draws // num_samples
    out = np.empty_like(draws)
    for epoch in np.unique(epochs):
        of_epoch = epochs == epoch
        out[of_epoch] = permute(draws[of_epoch] % num_samples, num_samples, seed=seed, epoch=int(epoch))
    return out


@dataclass(frozen=True)
class Split:
    """Samples to train on and samples held out, at random but the same in every run over a corpus of that length.

    Attributes:
        num_samples: of the corpus.
        num_held_out: of these; with none, samples keep their numbers.
    """

    num_samples: int
    num_held_out: int = 0

    @classmethod
    def of(cls, num_samples: int, part: float) -> Split:
        """Hold out `part` of the samples, at least one if it is more than 0, and leave at least one."""
        wanted = max(1, round(part * num_samples)) if part else 0
        return cls(num_samples, min(wanted, num_samples - 1))

    def trained(self, seed: int, step: int, global_batch: int) -> Int64s:
        """The samples of a training step, as `ids` draws them from those that are not held out."""
        drawn = ids(seed, step, global_batch, self.num_samples - self.num_held_out)
        return self._placed(drawn) if self.num_held_out else drawn

    def held_out(self, start: int, stop: int) -> Int64s:
        """A range of the samples held out, in an order that never changes."""
        return self._placed(np.arange(start, min(stop, self.num_held_out)) + self.num_samples - self.num_held_out)

    def _placed(self, numbers: Int64s) -> Int64s:
        return permute(numbers, self.num_samples, seed=_SPLIT_SEED, epoch=0)


def permute(indices: Int64s, num_items: int, *, seed: int, epoch: int) -> Int64s:
    """Images of `indices` under a pseudo-random permutation of [0, num_items), int64, same shape.

    A Feistel network over the next power of four, walked until it lands inside (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002). Unlike a shuffled array it takes no memory and no time for the items that are
    not asked for, and unlike a library's shuffle it is the same in every version.
    """
    half_bits = max(1, ((num_items - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    out = _feistel(indices.astype(np.uint64), keys, half_bits)
    while (outside := out >= num_items).any():
        out[outside] = _feistel(out[outside], keys, half_bits)
    return out.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    digest = hashlib.sha512(f"elastic-moe sample order/{seed}/{epoch}".encode()).digest()
    return np.frombuffer(digest, dtype="<u8", count=_NUM_FEISTEL_ROUNDS).astype(np.uint64)


def _feistel(values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], half_bits: int) -> npt.NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014); uint64 arithmetic wraps."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Share:
    """What one rank does of a step: `rounds` passes over `micro_batch` sequences each.

    Attributes:
        start, stop: its range of the step's samples.
        micro_batch, rounds: equal on all ranks, for passes are collective; what exceeds the range is padding.
    """

    start: int
    stop: int
    micro_batch: int
    rounds: int


def share(global_batch: int, *, rank: int, world_size: int, micro_batch: int, rounds: int) -> Share:
    """The contiguous part of a step's samples that `rank` works on; parts differ by one sample at most.

    Raises:
        ValueError: `rounds` passes of `micro_batch` cannot hold the largest part.
    """
    if rounds * micro_batch * world_size < global_batch:
        raise ValueError(
            f"{rounds} rounds of {micro_batch} sequences on {world_size} ranks do not hold a global batch of "
            f"{global_batch}"
        )
    return Share(
        start=rank * global_batch // world_size,
        stop=(rank + 1) * global_batch // world_size,
        micro_batch=micro_batch,
        rounds=rounds,
    )
