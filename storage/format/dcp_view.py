"""An index as DCP's planners know one: the `Metadata` of DCP, whose entries are made when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.distributed.checkpoint import metadata as dcp

from storage.format.dtypes import torch_dtype
from storage.format.index import Entry, Index


class _Entries(Mapping[str, dcp.STORAGE_TYPES]):
    """`state_dict_metadata` in which an entry is made when it is asked for: a rank asks for few of many shards."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._made: dict[str, dcp.STORAGE_TYPES] = {}

    def __getitem__(self, key: str) -> dcp.STORAGE_TYPES:
        if key not in self._made:
            self._made[key] = self._make(key, self._index.entries[key])
        return self._made[key]

    def _make(self, key: str, entry: Entry) -> dcp.STORAGE_TYPES:
        if not entry.is_tensor:
            return dcp.BytesStorageMetadata()
        columns, num_dims = self._index.columns, len(entry.shape)
        rows = slice(entry.first, entry.last)
        pairs = zip(columns.offsets[rows, :num_dims].tolist(), columns.sizes[rows, :num_dims].tolist(), strict=True)
        return dcp.TensorStorageMetadata(
            properties=dcp.TensorProperties(dtype=torch_dtype(entry.dtype)),
            size=torch.Size(entry.shape),
            chunks=[dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in pairs],
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.entries)

    def __len__(self) -> int:
        return len(self._index.entries)

    def __contains__(self, key: object) -> bool:
        return key in self._index.entries


def metadata_of(index: Index) -> dcp.Metadata:
    """What a planner of DCP has to know; `storage_data` is None, for that is this package's own business."""
    paths = {key: entry.path for key, entry in index.entries.items()}
    return dcp.Metadata(state_dict_metadata=_Entries(index), planner_data=paths, version="1.0.0")  # type: ignore[arg-type]
