"""What to read of a checkpoint for a training state, by DCP's planner."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.tensor import DTensor

from storage.errors import UnsupportedValue
from storage.format.dtypes import torch_dtype
from storage.format.index import Entry, Index
from storage.format.tensors import oddity
from storage.torch_private import local_chunks


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's planner, except that values are loaded without executing code, and that numpy compares the shards.

    DCP compares every local shard with every stored one in Python; the plan is the same.
    """

    def __init__(self, index: Index) -> None:
        super().__init__(flatten_state_dict=False)
        self._index = index

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        """As DCP's, which gives memory to tensors on the meta device. Raises UnsupportedValue where it cannot."""
        if not dist.is_initialized():
            for key, value in state_dict.items():
                if isinstance(value, torch.Tensor) and value.is_meta:
                    raise UnsupportedValue(f"{key!r} cannot be restored into a tensor {oddity(value)}")
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        """What to read for each name of the state; the checkpoint must have been found to fit it."""
        items: list[ReadItem] = []
        for key, value in self.state_dict.items():
            if not self._index.entries[key].is_tensor:
                place, nothing = MetadataIndex(key), torch.Size((0,))
                items.append(ReadItem(LoadItemType.BYTE_IO, place, nothing, place, nothing, nothing))
            elif not isinstance(value, DTensor) or value.device_mesh.get_coordinate() is not None:
                for number, chunk in enumerate(local_chunks(value)):
                    items += read_items_of_box(self._index, key, number, chunk.offsets, chunk.sizes)
        return LoadPlan(items)

    def load_value(self, read_item: ReadItem, value: object) -> None:
        """Put the value into the state."""
        self.original_state_dict[read_item.dest_index.fqn] = value


def read_items_of_box(
    index: Index, key: str, number: int, offsets: Sequence[int], sizes: Sequence[int]
) -> list[ReadItem]:
    """What to read for local shard `number`, which is the box [offsets, offsets + sizes) of the tensor `key`."""
    entry, num_dims = index.entries[key], len(offsets)
    if entry.first == entry.last:  # without elements; the columns may not have as many dimensions
        return []
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


def needed_bytes(items: Collection[ReadItem], entries: Mapping[str, Entry]) -> int:
    """Bytes of tensors that the read items ask for."""
    total = 0
    for item in items:
        saved = entries[item.storage_index.fqn]
        if saved.is_tensor:
            total += item.lengths.numel() * torch_dtype(saved.dtype).itemsize
    return total
