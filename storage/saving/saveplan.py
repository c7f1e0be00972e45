"""Decides which rank writes which chunk of the state. Pure: no torch, no store.

Every rank describes what it holds (`Chunk`), the coordinator assigns each distinct chunk to one of the ranks that
hold it, and so gets the index of the whole state.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from storage.format.containers import Container, Path


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of a tensor, or a value, that a rank holds.

    For a value `offsets`, `sizes` and `shape` are None, `dtype` is "" and `size_bytes` 0 (not known yet).
    """

    key: str
    path: Path
    offsets: tuple[int, ...] | None
    sizes: tuple[int, ...] | None
    shape: tuple[int, ...] | None
    dtype: str
    size_bytes: int

    @property
    def identity(self) -> tuple[str, tuple[int, ...] | None]:
        """Equal for the copies of one chunk on several ranks."""
        return self.key, self.offsets


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank holds of the state."""

    chunks: tuple[Chunk, ...]
    containers: tuple[Container, ...] = ()


_share = TypeAdapter(Share)
_picks = TypeAdapter(tuple[tuple[int, ...], ...])


def dump_share(share: Share) -> bytes:
    """JSON for the way to the coordinator."""
    return _share.dump_json(share)


def load_share(data: bytes) -> Share:
    """Read what `dump_share` wrote."""
    return _share.validate_json(data)


def dump_picks(picks: Sequence[Sequence[int]]) -> bytes:
    """JSON of what `assign` returned."""
    return _picks.dump_json(tuple(tuple(pick) for pick in picks))


def load_picks(data: bytes) -> tuple[tuple[int, ...], ...]:
    """Read what `dump_picks` wrote."""
    return _picks.validate_json(data)


def assign(chunks_of_rank: Sequence[Sequence[Chunk]]) -> list[list[int]]:
    """For each rank, the positions (ascending) of its chunks that it must write.

    Every distinct chunk is written once. Tensor chunks go, largest first, to the holder with the fewest bytes so
    far; values to the lowest rank that has them, so that which rank's value is kept does not depend on sizes. Chunks
    without elements (an empty tensor's, or made by uneven sharding) are nobody's: there is nothing to store.

    Raises:
        ValueError: ranks disagree about a tensor, or their chunks do not make up the whole of it.
    """
    holders: dict[tuple[str, tuple[int, ...] | None], list[tuple[int, int]]] = defaultdict(list)
    for rank, chunks in enumerate(chunks_of_rank):
        for position, chunk in enumerate(chunks):
            if not _is_empty(chunk):
                holders[chunk.identity].append((rank, position))
    _check_whole(chunks_of_rank, holders)
    picks: list[list[int]] = [[] for _ in chunks_of_rank]
    load_bytes = [0] * len(chunks_of_rank)

    def first(identity: tuple[str, tuple[int, ...] | None]) -> Chunk:
        rank, position = holders[identity][0]
        return chunks_of_rank[rank][position]

    for identity in sorted(holders, key=lambda identity: -first(identity).size_bytes):
        chunk, places = first(identity), holders[identity]
        if chunk.sizes is None or len(places) == 1:
            rank, position = places[0]
        else:
            rank, position = min(places, key=lambda holder: (load_bytes[holder[0]], holder[0]))
        load_bytes[rank] += chunk.size_bytes
        picks[rank].append(position)
    return [sorted(pick) for pick in picks]


def _is_empty(chunk: Chunk) -> bool:
    return chunk.sizes is not None and math.prod(chunk.sizes) == 0


def _check_whole(
    chunks_of_rank: Sequence[Sequence[Chunk]],
    holders: dict[tuple[str, tuple[int, ...] | None], list[tuple[int, int]]],
) -> None:
    kinds: dict[str, tuple[tuple[int, ...] | None, str]] = {}
    num_elements: dict[str, int] = defaultdict(int)
    for places in holders.values():
        rank, position = places[0]
        chunk = chunks_of_rank[rank][position]
        others = (chunks_of_rank[rank][position] for rank, position in places[1:])
        is_alike = all((c.sizes, c.shape, c.dtype) == (chunk.sizes, chunk.shape, chunk.dtype) for c in others)
        if not is_alike or kinds.setdefault(chunk.key, (chunk.shape, chunk.dtype)) != (
            chunk.shape,
            chunk.dtype,
        ):
            raise ValueError(f"ranks hold different things under {chunk.key!r}")
        if chunk.sizes is not None:
            num_elements[chunk.key] += math.prod(chunk.sizes)
    for key, num in num_elements.items():
        shape = kinds[key][0] or ()
        if num != math.prod(shape):
            raise ValueError(
                f"the ranks' shards of {key!r} have {num} elements, the tensor of shape {list(shape)} has"
                f" {math.prod(shape)}: every rank of the mesh must take part in the save"
            )
