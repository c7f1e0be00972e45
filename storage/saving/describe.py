"""What a rank holds of a training state, by DCP's planner."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.stateful import Stateful

from storage.errors import UnsupportedValue
from storage.format.items import EncodedItem
from storage.format.manifest import TensorEntry, ValueEntry
from storage.format.values import encode_value
from storage.saving.commit import Contents
from storage.saving.saveplan import Piece, dump_pieces
from storage.saving.staging import StagingBuffer
from storage.saving.writing import Payload


def state_dicts(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with `state_dict()` in the place of every Stateful object, in sorted order of keys.

    The order matters: a `state_dict()` may hold collectives, so all ranks must call them alike.
    """
    return {key: state[key].state_dict() if isinstance(state[key], Stateful) else state[key] for key in sorted(state)}


@dataclass(frozen=True)
class Holdings:
    """What this rank could write of the state: one piece for each write item of the planner."""

    planner: DefaultSavePlanner
    items: tuple[WriteItem, ...]
    pieces: tuple[Piece, ...]
    digest: str

    def encode_values(self, positions: Collection[int]) -> dict[int, EncodedItem]:
        """The values among `positions`, encoded. Raises UnsupportedValue."""
        return {
            position: encode_value(self.pieces[position].key, self.planner.lookup_object(self.items[position].index))
            for position in positions
            if self.pieces[position].sizes is None
        }

    def stage(self, picks: Collection[int], values: dict[int, EncodedItem], buffer: StagingBuffer) -> list[Payload]:
        """The content of the picked pieces, copied: the state may change from here on.

        `values` are those that are encoded already. Raises UnsupportedValue.
        """
        missing = [position for position in picks if position not in values]
        values = {**values, **self.encode_values(missing)}
        tensors = [position for position in missing if position not in values]
        staged = buffer.stage([self._tensor(position) for position in tensors])
        return [
            *(Payload(self.pieces[position], item) for position, item in values.items() if position in picks),
            *(Payload(self.pieces[p], tensor) for p, tensor in zip(tensors, staged, strict=True)),
        ]

    def _tensor(self, position: int) -> torch.Tensor:
        tensor = self.planner.resolve_data(self.items[position])
        assert isinstance(tensor, torch.Tensor)
        return tensor


def describe(state: dict[str, Any], *, is_coordinator: bool) -> Holdings:
    """Flatten `state` the way DCP does and list what this rank holds of it.

    Raises:
        UnsupportedValue: a tensor that is sparse or has no data.
        ValueError: two keys of the state flatten to the same name.
    """
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=is_coordinator)
    items = tuple(planner.create_local_plan().items)
    pieces = tuple(_piece(item, planner) for item in items)
    digest = hashlib.blake2b(dump_pieces(pieces), digest_size=16).hexdigest()
    return Holdings(planner, items, pieces, digest)


def _piece(item: WriteItem, planner: DefaultSavePlanner) -> Piece:
    key = item.index.fqn
    path = planner.mappings[key]
    if item.type is WriteItemType.BYTE_IO:
        return Piece(key, path, None, None, None, "", 0)
    data = item.tensor_data
    assert data is not None
    value = planner.lookup_object(item.index)
    if data.properties.layout is not torch.strided or value.device.type == "meta":
        what = "on the meta device" if value.device.type == "meta" else f"of layout {data.properties.layout}"
        raise UnsupportedValue(f"state {key!r} is a tensor {what}; only dense tensors with data can be saved")
    dtype = data.properties.dtype
    sizes = tuple(data.chunk.sizes)
    return Piece(
        key,
        path,
        tuple(data.chunk.offsets),
        sizes,
        tuple(data.size),
        str(dtype).removeprefix("torch."),
        math.prod(sizes) * dtype.itemsize,
    )


def contents_of(pieces_of_rank: Collection[Collection[Piece]]) -> Contents:
    """The state as a whole, from what all ranks hold."""
    tensors: dict[str, TensorEntry] = {}
    values: dict[str, ValueEntry] = {}
    for pieces in pieces_of_rank:
        for piece in pieces:
            if piece.shape is None:
                values.setdefault(piece.key, ValueEntry(path=piece.path))
            else:
                tensors.setdefault(piece.key, TensorEntry(dtype=piece.dtype, shape=piece.shape, path=piece.path))
    return Contents(tensors, values)
