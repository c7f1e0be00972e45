"""`ShardReader`: reads a checkpoint under `dcp.load`."""

from __future__ import annotations

import dataclasses
import logging
import uuid
from typing import Any, ClassVar

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from storage.dcp.folder import CheckpointFolder, Url
from storage.errors import Forbidden, NoCheckpoint, OnlyUnhealthy, UsageError
from storage.events import CheckpointEvent, Reporter
from storage.format import layout
from storage.format.dcp_view import metadata_of
from storage.format.index import Index
from storage.loading.casts import Casts
from storage.loading.reading import read_items
from storage.ranks.agreement import AgreeingGroup
from storage.ranks.callers import Caller, find_caller
from storage.run import catalog

log = logging.getLogger(__name__)


class ShardReader(CheckpointFolder, StorageReader):
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

    _opened: ClassVar = (*CheckpointFolder._opened, "_index")

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
        """Id of all reads until the next `reset`, for DCP's notes."""

    def __getstate__(self) -> dict[str, Any]:
        if self._process_group is not None:
            raise UsageError("a ShardReader with a process_group belongs to this process; make one in the other")
        return super().__getstate__()

    def _ranks(self) -> AgreeingGroup:
        """The ranks that read together."""
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

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
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
