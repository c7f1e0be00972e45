"""Between a training state and DCP's plans: what a rank holds, and whether a checkpoint fits it."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from storage.commit import Contents
from storage.dcp_metadata import torch_dtype
from storage.errors import UnsupportedValue
from storage.index import Entry, Index
from storage.items import EncodedItem, decode_value, encode_value
from storage.manifest import TensorEntry, ValueEntry
from storage.saveplan import Piece, dump_pieces
from storage.staging import StagingBuffer
from storage.writing import Payload


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


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's planner, except that values are loaded without executing code, and that numpy compares the shards.

    DCP compares every local shard with every stored one in Python; the plan is the same.
    """

    def __init__(self, index: Index) -> None:
        super().__init__()
        self._index = index

    def create_local_plan(self) -> LoadPlan:
        """What to read for each key of the state; the checkpoint must have been found to fit it (`differences`)."""
        items: list[ReadItem] = []
        for key, value in self.state_dict.items():
            if not self._index.entries[key].is_tensor:
                place, nothing = MetadataIndex(key), torch.Size((0,))
                items.append(ReadItem(LoadItemType.BYTE_IO, place, nothing, place, nothing, nothing))
            elif not isinstance(value, DTensor) or value.device_mesh.get_coordinate() is not None:
                for number, chunk in enumerate(_create_chunk_list(value)):
                    items += read_items_of_box(self._index, key, number, chunk.offsets, chunk.sizes)
        return LoadPlan(items)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put the value into the state. Raises Corrupt."""
        key = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[key], decode_value(value.getvalue(), key))


def read_items_of_box(
    index: Index, key: str, number: int, offsets: Sequence[int], sizes: Sequence[int]
) -> list[ReadItem]:
    """What to read for local shard `number`, which is the box [offsets, offsets + sizes) of the tensor `key`."""
    entry, num_dims = index.entries[key], len(offsets)
    span = slice(entry.first, entry.last)
    low, shape = np.array(offsets, np.int64), np.array(sizes, np.int64)
    stored_low, stored_shape = index.columns.offsets[span, :num_dims], index.columns.sizes[span, :num_dims]
    starts = np.maximum(stored_low, low)
    lengths = np.minimum(stored_low + stored_shape, low + shape) - starts
    hits = np.flatnonzero((lengths > 0).all(axis=1))
    destination = MetadataIndex(key, torch.Size(offsets), number)
    rows = zip(
        hits.tolist(),
        stored_low[hits].tolist(),
        (starts - low)[hits].tolist(),
        (starts - stored_low)[hits].tolist(),
        lengths[hits].tolist(),
        strict=True,
    )
    return [
        ReadItem(
            LoadItemType.TENSOR,
            destination,
            torch.Size(to),
            MetadataIndex(key, torch.Size(stored), hit),
            torch.Size(source),
            torch.Size(length),
        )
        for hit, stored, to, source, length in rows
    ]


def differences(state: dict[str, Any], entries: Mapping[str, Entry]) -> list[str]:
    """In what the checkpoint does not fit the flattened state, in the state's order; empty if it fits.

    Keys that only the checkpoint has do not count: a state may be a part of what was saved.
    """
    found = []
    for key, value in state.items():
        saved = entries.get(key)
        if saved is None:
            found.append(f"{key!r} is not in the checkpoint")
        elif not saved.is_tensor:
            if isinstance(value, torch.Tensor):
                found.append(f"{key!r} is a tensor, the checkpoint has a value")
        elif not isinstance(value, torch.Tensor):
            found.append(f"{key!r} is a {type(value).__name__}, the checkpoint has a tensor")
        elif tuple(value.shape) != saved.shape:
            found.append(f"{key!r} has shape {list(value.shape)}, the checkpoint {list(saved.shape)}")
    return found


def num_surplus(state: Collection[str], entries: Mapping[str, Entry]) -> int:
    """How many keys only the checkpoint has."""
    return len(entries.keys() - set(state))


def needed_bytes(items: Collection[ReadItem], entries: Mapping[str, Entry]) -> int:
    """Bytes of tensors that the read items ask for."""
    total = 0
    for item in items:
        saved = entries[item.storage_index.fqn]
        if saved.is_tensor:
            total += item.lengths.numel() * torch_dtype(saved.dtype).itemsize
    return total
