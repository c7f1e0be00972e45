"""`ShardWriter`: writes a checkpoint under `dcp.save` and `dcp.async_save`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from storage.arena.arena import Arena
from storage.arena.moves import lies_plainly
from storage.arena.stager import Stager, in_place
from storage.dcp import tickets
from storage.dcp.folder import CheckpointFolder, Url
from storage.dcp.tickets import Ticket
from storage.errors import AlreadyExists, UnsupportedValue, UsageError
from storage.format import layout
from storage.format.framing import EncodedItem
from storage.format.manifest import ItemEntry, ItemTable, ObjectEntry, Receipt, TensorEntry, ValueEntry
from storage.format.tensors import oddity
from storage.format.values import check_value
from storage.parallel import before_pools_close
from storage.priority import let_background_step_back, step_back
from storage.ranks.callers import is_in_process_of_dcp
from storage.run import catalog, replacing
from storage.run.attempt import Attempt, StateContents
from storage.run.job import Origin
from storage.saving import commit
from storage.saving.describe import chunk_of
from storage.saving.options import SavingPlan
from storage.saving.writing import Payload, write_payloads
from storage.torch_private import ASYNC_SAVE_THREAD

log = logging.getLogger(__name__)

_NICENESS = 19  # as the checkpoint service's


def _finish_saves() -> None:
    """Wait for `dcp.async_save`'s threads, which are waited for anyway, before pools of other packages close.

    A store's client may need one of those (asyncio's name lookup does). Without this hook, `storage.parallel.Pool`
    alone lets a save end that is under way when the script does.
    """
    for thread in threading.enumerate():
        if thread.name.startswith(ASYNC_SAVE_THREAD):
            thread.join()


before_pools_close(_finish_saves)


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Log why a save has failed that goes on behind the script, which may never ask its future for the result."""
    try:
        yield
    except Exception as error:
        if threading.current_thread() is not threading.main_thread():
            log.error("nothing is saved to %s: %s: %s", url, type(error).__name__, error)
        raise


class ShardWriter(CheckpointFolder, StorageWriter):
    """Writes one checkpoint for `dcp.save(state, storage_writer=ShardWriter(url))`, and for `dcp.async_save`.

    Args:
        url: the folder to write to; a name such as `…/step-000000120` makes it a step of a run.
        overwrite: replace a checkpoint that is committed there, ours or stock DCP's. It stays whole until the new one
            is committed by one put, and its data is removed after that: who is reading it then gets an error that
            names what is missing.
        prefix_spread: over how many prefixes, 256 at most, the data is spread: S3 limits requests by prefix.

    Raises (from `dcp.save`, as the cause in its CheckpointException): AlreadyExists without `overwrite`, before
        anything is written; UnsupportedValue, Corrupt, Denied, Transient; see `storage.errors`.
    """

    def __init__(self, url: Url, *, overwrite: bool = False, prefix_spread: int = 1) -> None:
        self._overwrite = overwrite
        self._prefix_spread = SavingPlan.of(prefix_spread=prefix_spread).prefix_spread
        self._open(url)

    def _open(self, url: object) -> None:
        super()._open(url)
        self._attempt_id = ""
        self._world_size = 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if is_in_process_of_dcp():  # whose threads that store are still to be started
            let_background_step_back(_NICENESS)
            step_back()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Find out whether anything is in the way (coordinator). Raises AlreadyExists, UsageError."""
        with _told(self._url):
            self._look_first(is_coordinator=is_coordinator, uses_collectives=bool(kwargs.get("use_collectives", True)))

    def _look_first(self, *, is_coordinator: bool, uses_collectives: bool) -> None:
        if not uses_collectives and dist.is_initialized() and dist.get_world_size() > 1:
            raise UsageError("use_collectives=False would commit each rank's part as if it were all; leave it out")
        if is_coordinator and not self._overwrite and catalog.is_checkpoint(self._store, self._prefix):
            raise AlreadyExists(
                f"Checkpoint already exists at {self._url}; save to another URL, or give ShardWriter overwrite=True"
            )

    @property
    def save_id(self) -> str:
        """Id of the last save of this writer, as a reader's metadata has it; empty before the first."""
        return self._attempt_id

    def storage_meta(self) -> StorageMeta:
        """What DCP may note about the checkpoint."""
        return StorageMeta(checkpoint_id=self._url, save_id=self.save_id or None)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Hand one fresh attempt to every rank (coordinator)."""
        self._attempt_id = layout.with_spread(str(uuid.uuid4()), self._prefix_spread)
        self._world_size = len(plans)
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
                payloads.append(Payload(chunk_of(item), EncodedItem((data,), 0, len(data))))
        # DCP keeps the state as it is until this returns (`async_save` has made a copy of its own), so that only what
        # lies in another way, or on another device, has to be copied
        others = [(item.index.fqn, tensor) for item, tensor in tensors if not lies_plainly(tensor)]
        ticket = tickets.take(plan.storage_data)
        self._attempt_id = ticket.attempt_id
        with _copied(others) as copies:
            copied = iter(copies)
            for item, tensor in tensors:
                content = in_place(tensor) if lies_plainly(tensor) else next(copied)
                payloads.append(Payload(chunk_of(item), content))
            objects, entries = write_payloads(self._store, self._prefix, ticket.attempt_id, ticket.rank, payloads)
        index_of = {chunk_of(item).identity: item.index for item in plan.items}
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


@contextlib.contextmanager
def _copied(tensors: Sequence[tuple[str, torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    """Copies of named tensors in CPU memory, whose place goes with the block."""
    if not tensors:
        yield []
        return
    with contextlib.closing(Arena(1)) as arena, contextlib.closing(Stager(arena)) as stager:
        staged = stager.stage(tensors)
        try:
            yield staged.tensors
        finally:
            staged.release()


def _receipt(attempt: str, results: list[WriteResult]) -> Receipt:
    rows = [result.storage_data for result in results]
    return Receipt(
        rank=rows[0][2],
        attempt=attempt,
        objects=tuple(ObjectEntry(**row) for row in rows[0][1]),
        items=ItemTable.of(ItemEntry(**row[0]) for row in rows),
    )


def _contents(metadata: Metadata) -> StateContents:
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
    return StateContents(tensors, values)
