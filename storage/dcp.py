"""`ShardReader` and `ShardWriter`: this package's format and checks under `dcp.load`, `dcp.save`, `dcp.async_save`.

They leave who writes what to DCP's planner and its collectives; what they add is the attempt folder, the manifest
with checksums, the commit by one put, and the verified read. Nobody claims the run here, so there is no fencing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, ClassVar, Self

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

from storage.errors import AlreadyExists, Forbidden, NoCheckpoint, OnlyUnhealthy, UnsupportedValue, UsageError
from storage.events import CheckpointEvent, Reporter
from storage.format import layout
from storage.format.dcp_metadata import metadata_of
from storage.format.index import Index
from storage.format.items import EncodedItem
from storage.format.manifest import ItemEntry, ItemTable, ObjectEntry, Receipt, TensorEntry, ValueEntry
from storage.format.tensors import oddity
from storage.format.values import check_value
from storage.loading.casts import Casts
from storage.loading.reading import read_items
from storage.parallel import before_pools_close
from storage.ranks.agreement import AgreeingGroup
from storage.ranks.callers import Caller, find_caller
from storage.run import catalog, replacing
from storage.run.job import Origin
from storage.saving import commit, tickets
from storage.saving.commit import Attempt, Contents
from storage.saving.saveplan import Chunk
from storage.saving.staging import StagingBuffer, as_staged
from storage.saving.tickets import Ticket
from storage.saving.writing import Payload, write_payloads
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectStore
from storage.stores.registry import as_url, has_store, open_store
from storage.torch_private import ASYNC_SAVE_THREAD

Url = str | os.PathLike[str]

log = logging.getLogger(__name__)


class _Place:
    """A URL opened as a folder of a checkpoint; what readers and writers have in common.

    Its store is closed by `close`, or at the end of a `with`; DCP itself closes none. Pickled, it is its URL and its
    options: `AsyncCheckpointerType.PROCESS` sends its writer to another process.
    """

    _opened: ClassVar[tuple[str, ...]] = ("_store", "_run", "_prefix")
    _run: str | None = None
    """The URL of the open store."""

    def _open(self, url: object) -> None:
        text = as_url(url)
        run, prefix = layout.split_step_url(text)
        if run != self._run:
            store = open_store(run)
            self.close()
            self._store: ObjectStore = store
        self._url, self._run, self._prefix = text, run, prefix

    def close(self) -> None:
        """Let go of the store; `reset` opens it again."""
        if self._run is not None:
            self._run = None
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def checkpoint_id(self) -> str:
        """The URL."""
        return self._url

    def reset(self, checkpoint_id: Url | None = None) -> None:
        """Take another URL from now on; None for the same one anew. Raises BadURL."""
        self._open(self._url if checkpoint_id is None else checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Url) -> bool:
        """Whether there is a store for that URL."""
        return has_store(checkpoint_id)

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self._store, MemoryStore):
            raise UsageError(f"{self._url} is the memory of this process; another one can neither read nor write it")
        return {name: value for name, value in self.__dict__.items() if name not in self._opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open(self._url)


def _finish_saves() -> None:
    """Wait for `dcp.async_save`'s threads, which are waited for anyway, before pools of other packages close.

    A store's client may need one of those (asyncio's name lookup does). Without this hook, `storage.parallel.Pool`
    alone lets a save end that is under way when the script does.
    """
    for thread in threading.enumerate():
        if thread.name.startswith(ASYNC_SAVE_THREAD):
            thread.join()


before_pools_close(_finish_saves)


class ShardReader(_Place, StorageReader):
    """Reads one checkpoint, ours or stock DCP's, for `dcp.load(state, storage_reader=ShardReader(url))`.

    Args:
        url: a step's folder (`…/step-000000120`), any folder with a stock checkpoint, or a run: then its newest
            committed step. Rank 0 reads the index and chooses that step for all ranks.
        process_group, no_dist: `dcp.load` need not be told twice: which ranks take part is found out. `no_dist` lets
            each rank read for itself all the same; `process_group` is for callers that are not DCP's, whose ranks
            read alone without it.
        allow_casts: also load tensors into such of another dtype that cannot hold all their values, as float32 into
            float16 or int64 into bool; else that raises WrongModel. Allowed anyway, and logged, are those that can, and
            float32 into bfloat16.

    Raises (from `dcp.load`, as the cause in its CheckpointException): NoCheckpoint, WrongModel, UnloadableValue,
        Corrupt, Denied, Transient; see `storage.errors`.
    """

    _opened: ClassVar = (*_Place._opened, "_index")

    def __init__(
        self,
        url: Url,
        *,
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
        allow_casts: bool = False,
    ) -> None:
        self._allow_casts = allow_casts
        self._process_group = process_group
        self._no_dist = no_dist
        self._open(url)

    def _open(self, url: object) -> None:
        super()._open(url)
        self._index: Index | None = None
        self.load_id = str(uuid.uuid4())
        """Of all reads until the next `reset`, for DCP's notes."""

    def __getstate__(self) -> dict[str, Any]:
        if self._process_group is not None:
            raise UsageError("a ShardReader with a process_group belongs to this process; make one in the other")
        return super().__getstate__()

    def _ranks(self) -> AgreeingGroup:
        """Those that read together."""
        caller = find_caller() or Caller(self._process_group is None, self._process_group)
        return AgreeingGroup(caller.group, alone=self._no_dist or caller.alone)

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Open the checkpoint and return DCP's view of it; a collective of the ranks that `dcp.load` runs on."""
        # `options`, since whoever calls it `kwargs` is asked once more after an error, for metadata of this rank alone
        # each rank's own look could find another newest step, while a save goes on
        self._index = self._ranks().share(self._find, Index.load)
        assert self._index is not None  # it raises instead
        noted = StorageMeta(checkpoint_id=self._url, save_id=self._index.save_id or None, load_id=self.load_id)
        return dataclasses.replace(metadata_of(self._index), storage_meta=noted)

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
        """Read and verify what `plan` asks for; a collective as `read_metadata`: DCP calls it on all ranks alike."""
        assert self._index is not None, "read_metadata comes first"
        casts = Casts(self._allow_casts)
        read_items(self._store, self._index, plan.items, planner, self._ranks(), casts=casts)
        if told := casts.told():
            Reporter(None)(CheckpointEvent.CAST, url=self._url, **told)
        done: Future[None] = Future()
        done.set_result(None)
        return done


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Log why a save has failed that goes on behind the script, which may never ask its future for the result."""
    try:
        yield
    except Exception as error:
        if threading.current_thread() is not threading.main_thread():
            log.error("nothing is saved to %s: %s: %s", url, type(error).__name__, error)
        raise


class ShardWriter(_Place, StorageWriter):
    """Writes one checkpoint for `dcp.save(state, storage_writer=ShardWriter(url))`, and for `dcp.async_save`.

    Args:
        url: the folder to write to; a name such as `…/step-000000120` makes it a step of a run.
        overwrite: replace a checkpoint that is committed there, ours or stock DCP's. It stays whole until the new one
            is committed by one put, and its data is removed after that: who is reading it then gets an error that
            names what is missing.

    Raises (from `dcp.save`, as the cause in its CheckpointException): AlreadyExists without `overwrite`, before
        anything is written; UnsupportedValue, Corrupt, Denied, Transient; see `storage.errors`.
    """

    _opened: ClassVar = (*_Place._opened, "_buffer")

    def __init__(self, url: Url, *, overwrite: bool = False) -> None:
        self._overwrite = overwrite
        self._open(url)

    def _open(self, url: object) -> None:
        super()._open(url)
        self._buffer = StagingBuffer()
        self._attempt_id = ""
        self._world_size = 1

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Find out whether anything is in the way (coordinator). Raises AlreadyExists, UsageError."""
        with _told(self._url):
            self._look_first(is_coordinator, bool(kwargs.get("use_collectives", True)))

    def _look_first(self, is_coordinator: bool, use_collectives: bool) -> None:
        if not use_collectives and dist.is_initialized() and dist.get_world_size() > 1:
            raise UsageError("use_collectives=False would commit each rank's part as if it were all; leave it out")
        if is_coordinator and not self._overwrite and catalog.is_checkpoint(self._store, self._prefix):
            raise AlreadyExists(
                f"Checkpoint already exists at {self._url}; save to another URL, or give ShardWriter overwrite=True"
            )

    @property
    def save_id(self) -> str:
        """Of the last save of this writer, as a reader's metadata has it; empty before the first."""
        return self._attempt_id

    def storage_meta(self) -> StorageMeta:
        """What DCP may note about the checkpoint."""
        return StorageMeta(checkpoint_id=self._url, save_id=self.save_id or None)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Hand one fresh attempt to every rank (coordinator)."""
        self._attempt_id, self._world_size = str(uuid.uuid4()), len(plans)
        tickets.receive(self._attempt_id, 0)  # a process by itself sends nothing; among several it gets its own as well
        return [
            dataclasses.replace(plan, storage_data=Ticket(self._attempt_id, rank)) for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Store this rank's items; DCP carries the receipt to the coordinator."""
        done: Future[list[WriteResult]] = Future()
        with _told(self._url):
            done.set_result(self._write(plan, planner))
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        payloads, tensors = [], []
        for item in plan.items:
            content = planner.resolve_data(item)
            if isinstance(content, torch.Tensor):
                if (why := oddity(content)) is not None:
                    raise UnsupportedValue(f"state {item.index.fqn!r} is a tensor {why}")
                if content.numel():  # of the others the manifest knows all there is to know
                    tensors.append((item, content))
            else:
                data = content.getvalue()
                check_value(data, item.index.fqn)
                payloads.append(Payload(_chunk(item), EncodedItem((data,), 0, len(data))))
        # DCP keeps the state as it is until this returns (`async_save` has made a copy of its own), so that only what
        # lies in another way, or on another device, has to be copied
        copied = iter(self._buffer.stage([tensor for _, tensor in tensors if as_staged(tensor) is None]))
        for item, tensor in tensors:
            plain = as_staged(tensor)
            payloads.append(Payload(_chunk(item), next(copied) if plain is None else plain))
        ticket = tickets.take(plan.storage_data)
        self._attempt_id = ticket.attempt_id
        objects, entries = write_payloads(self._store, self._prefix, ticket.attempt_id, ticket.rank, payloads)
        index_of = {_chunk(item).identity: item.index for item in plan.items}
        return [
            WriteResult(
                index=index_of[entry.key, entry.offsets],
                size_in_bytes=entry.length,
                storage_data=(dataclasses.asdict(entry), [o.model_dump() for o in objects], ticket.rank),
            )
            for entry in entries
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Verify and commit (coordinator)."""
        with _told(self._url):
            self._commit(metadata, results)

    def _commit(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        step = layout.parse_step(self._prefix.rstrip("/")) or 0
        attempt = Attempt(self._prefix, step, self._attempt_id, self._world_size)
        receipts = [_receipt(attempt.id, of_rank) for of_rank in results if of_rank]
        manifest, data = commit.build_manifest(attempt, Origin(), _contents(metadata), receipts, time.time())
        replaced = replacing.find(self._store, self._prefix) if self._overwrite else None
        over = None if replaced is None else replaced.metadata
        commit.publish(self._store, attempt, manifest, data, claim=None, replaces=over)
        metadata.storage_meta = self.storage_meta()
        if replaced is not None:
            replacing.remove(self._store, self._prefix, replaced)


def _chunk(item: WriteItem) -> Chunk:
    """The planner's item in this package's words; the path is the coordinator's to know."""
    data = item.tensor_data
    if data is None or item.type is WriteItemType.BYTE_IO:
        return Chunk(item.index.fqn, (), None, None, None, "", 0)
    sizes, dtype = tuple(data.chunk.sizes), data.properties.dtype
    name = str(dtype).removeprefix("torch.")
    size_bytes = math.prod(sizes) * dtype.itemsize
    return Chunk(item.index.fqn, (), tuple(data.chunk.offsets), sizes, tuple(data.size), name, size_bytes)


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
