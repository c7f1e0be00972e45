"""`ShardReader` and `ShardWriter`: this package's format and checks under `dcp.load`, `dcp.save`, `dcp.async_save`.

They leave who writes what to DCP's planner and its collectives; what they add is the attempt folder, the manifest
with checksums, the commit by one put, and the verified read. Nobody claims the run here, so there is no fencing.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
import uuid
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from storage.errors import Forbidden, NoCheckpoint, OnlyUnhealthy
from storage.events import Reporter
from storage.format import layout
from storage.format.dcp_metadata import metadata_of
from storage.format.index import Index
from storage.format.items import EncodedItem
from storage.format.manifest import ItemEntry, ItemTable, ObjectEntry, Receipt, TensorEntry, ValueEntry
from storage.format.values import check_value
from storage.loading.casts import Casts
from storage.loading.reading import read_items
from storage.ranks.agreement import AgreeingGroup
from storage.run import catalog
from storage.saving import commit
from storage.saving.commit import Attempt, Contents, Origin
from storage.saving.saveplan import Piece
from storage.saving.staging import StagingBuffer, as_staged
from storage.saving.writing import Payload, write_payloads
from storage.stores.objects import ObjectStore
from storage.stores.registry import open_store

log = logging.getLogger(__name__)


class ShardReader(StorageReader):
    """Reads one checkpoint, ours or stock DCP's, for `dcp.load(state, storage_reader=ShardReader(url))`.

    Args:
        url: a step's folder (`…/step-000000120`), any folder with a stock checkpoint, or a run: then its newest
            committed step. Rank 0 reads the index and chooses that step for all ranks.
        process_group, no_dist: as given to `dcp.load`, which does not tell its reader. With `no_dist` this process
            reads alone, whatever other ranks there are.
        allow_casts: also load tensors into such of another dtype that cannot hold all their values, as float32 into
            float16 or int64 into bool; else that raises WrongModel. Allowed anyway, and logged, are those that can, and
            float32 into bfloat16.

    Raises (from `dcp.load`): NoCheckpoint, WrongModel, UnloadableValue, Corrupt, Denied, Transient; see
    `storage.errors`.
    """

    def __init__(
        self,
        url: str,
        *,
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
        allow_casts: bool = False,
    ) -> None:
        self._allow_casts = allow_casts
        self._process_group = process_group
        self._no_dist = no_dist
        self._open(url)

    def _open(self, url: str) -> None:
        self._url = url
        run, self._prefix = layout.split_step_url(url)
        self._store: ObjectStore = open_store(run)
        self._index: Index | None = None

    @property
    def checkpoint_id(self) -> str:
        """The URL."""
        return self._url

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Read from another URL from now on; None for the same one anew."""
        self._open(self._url if checkpoint_id is None else os.fspath(checkpoint_id))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Open the checkpoint and return DCP's view of it; a collective unless `no_dist`."""
        # each rank's own look could find another newest step, while a save goes on
        shared = not self._no_dist
        self._index = AgreeingGroup(self._process_group).share(self._find, Index.load) if shared else self._find()
        assert self._index is not None  # it raises instead
        return metadata_of(self._index)

    def _find(self) -> Index:
        try:
            return catalog.open_checkpoint(self._store, self._prefix)
        except (NoCheckpoint, Forbidden) as error:
            if self._prefix:
                raise
            if not (steps := catalog.committed_steps(self._store)):
                raise NoCheckpoint(f"{error}, nor is it a run that has one") from None
        for step in steps:
            index = catalog.open_checkpoint(self._store, layout.step_folder(step) + "/")
            if index.healthy:
                return index
            log.warning("step %d in %s was saved as unhealthy: passed over", step, self._store.url)
        raise OnlyUnhealthy(
            f"no healthy checkpoint is left in {self._store.url}; to read an unhealthy one, give its folder, such as"
            f" {layout.step_folder(steps[0])}"
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to set up once the metadata is read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read and verify what `plan` asks for; a collective unless `no_dist`, for DCP calls it on all ranks alike."""
        assert self._index is not None, "read_metadata comes first"
        group = None if self._no_dist else AgreeingGroup(self._process_group)
        casts = Casts(self._allow_casts)
        read_items(self._store, self._index, plan.items, planner, group, casts=casts)
        if told := casts.told():
            Reporter(None)("checkpoint_cast", url=self._url, **told)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any URL that can be opened will do."""
        return bool(os.fspath(checkpoint_id))


class ShardWriter(StorageWriter):
    """Writes one checkpoint for `dcp.save(state, storage_writer=ShardWriter(url))`, and for `dcp.async_save`.

    Args:
        url: the folder to write to; a name such as `…/step-000000120` makes it a step of a run. It must not hold a
            committed checkpoint.

    Raises (from `dcp.save`): AlreadyExists, UnsupportedValue, Corrupt, Denied, Transient; see `storage.errors`.
    """

    def __init__(self, url: str) -> None:
        self._open(url)
        self._buffer = StagingBuffer()
        self._rank = 0

    def _open(self, url: str) -> None:
        self._url = url
        run, self._prefix = layout.split_step_url(url)
        self._store: ObjectStore = open_store(run)
        self._attempt_id = ""
        self._world_size = 1

    @property
    def checkpoint_id(self) -> str:
        """The URL."""
        return self._url

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Write to another URL from now on; None for the same one."""
        self._open(self._url if checkpoint_id is None else os.fspath(checkpoint_id))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learn this process's rank."""
        self._rank = int(kwargs.get("rank") or 0)

    def storage_meta(self) -> StorageMeta:
        """What DCP may note about the checkpoint."""
        return StorageMeta(checkpoint_id=self._url)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Hand one fresh attempt to every rank (coordinator)."""
        self._attempt_id, self._world_size = str(uuid.uuid4()), len(plans)
        return [dataclasses.replace(plan, storage_data=self._attempt_id) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Store this rank's items; DCP carries the receipt to the coordinator."""
        payloads, tensors = [], []
        for item in plan.items:
            content = planner.resolve_data(item)
            if isinstance(content, torch.Tensor):
                if content.numel():  # of the others the manifest knows all there is to know
                    tensors.append((item, content))
            else:
                data = content.getvalue()
                check_value(data, item.index.fqn)
                payloads.append(Payload(_piece(item), EncodedItem((data,), 0, len(data))))
        # DCP keeps the state as it is until this returns (`async_save` has made a copy of its own), so that only what
        # lies in another way, or on another device, has to be copied
        copied = iter(self._buffer.stage([tensor for _, tensor in tensors if as_staged(tensor) is None]))
        for item, tensor in tensors:
            plain = as_staged(tensor)
            payloads.append(Payload(_piece(item), next(copied) if plain is None else plain))
        attempt = str(plan.storage_data)
        objects, entries = write_payloads(self._store, self._prefix, attempt, self._rank, payloads)
        index_of = {_piece(item).identity: item.index for item in plan.items}
        results = [
            WriteResult(
                index=index_of[entry.key, entry.offsets],
                size_in_bytes=entry.length,
                storage_data=(dataclasses.asdict(entry), [o.model_dump() for o in objects], self._rank),
            )
            for entry in entries
        ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Verify and commit (coordinator)."""
        step = layout.parse_step(self._prefix.rstrip("/")) or 0
        attempt = Attempt(self._prefix, step, self._attempt_id, self._world_size)
        receipts = [_receipt(attempt.id, of_rank) for of_rank in results if of_rank]
        manifest, data = commit.build_manifest(attempt, Origin(), _contents(metadata), receipts, time.time())
        commit.publish(self._store, attempt, manifest, data, claim=None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any URL that can be opened will do."""
        return bool(os.fspath(checkpoint_id))


def _piece(item: WriteItem) -> Piece:
    """The planner's item in this package's words; the path is the coordinator's to know."""
    data = item.tensor_data
    if data is None or item.type is WriteItemType.BYTE_IO:
        return Piece(item.index.fqn, (), None, None, None, "", 0)
    sizes, dtype = tuple(data.chunk.sizes), data.properties.dtype
    name = str(dtype).removeprefix("torch.")
    size_bytes = math.prod(sizes) * dtype.itemsize
    return Piece(item.index.fqn, (), tuple(data.chunk.offsets), sizes, tuple(data.size), name, size_bytes)


def _receipt(attempt: str, results: list[WriteResult]) -> Receipt:
    rows = [result.storage_data for result in results]
    return Receipt(
        rank=rows[0][2],
        attempt=attempt,
        objects=tuple(ObjectEntry(**row) for row in rows[0][1]),
        items=ItemTable.of(ItemEntry(**row[0]) for row in rows),
    )


def _contents(metadata: Metadata) -> Contents:
    paths = metadata.planner_data or {}
    tensors: dict[str, TensorEntry] = {}
    values: dict[str, ValueEntry] = {}
    for key, entry in metadata.state_dict_metadata.items():
        path = paths.get(key, (key,))
        if isinstance(entry, TensorStorageMetadata):
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[key] = TensorEntry(dtype=dtype, shape=tuple(entry.size), path=path)
        else:
            values[key] = ValueEntry(path=path)
    return Contents(tensors, values)
