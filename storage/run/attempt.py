"""One try to save one step, what it holds, and the manifest that joins what its ranks have written. Pure.

The parts of an attempt are described alike wherever their bytes lie: in a store, or in the memory of a node.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from storage.errors import Corrupt
from storage.format import layout
from storage.format.checksum import crc32c
from storage.format.containers import Container, Path
from storage.format.index import of_manifest
from storage.format.manifest import (
    MANIFEST_VERSION,
    SPREAD_VERSION,
    ItemTable,
    Manifest,
    Receipt,
    TensorEntry,
    ValueEntry,
)
from storage.run.job import Origin


@dataclass(frozen=True)
class Attempt:
    """One try to save one step."""

    prefix: str
    step: int
    id: str
    world_size: int

    @classmethod
    def of_step(cls, step: int, id: str, world_size: int) -> Attempt:
        """An attempt in a run's folder for `step`. Raises UsageError."""
        return cls(layout.step_folder(step) + "/", layout.as_step(step), id, world_size)


@dataclass(frozen=True)
class StateContents:
    """What the state holds, by flattened key."""

    tensors: dict[str, TensorEntry]
    values: dict[str, ValueEntry]
    containers: tuple[Container, ...] = ()

    @property
    def paths(self) -> dict[str, Path]:
        """The path of each key."""
        tensors = {key: entry.path for key, entry in self.tensors.items()}
        return tensors | {key: entry.path for key, entry in self.values.items()}


def draft_manifest(
    attempt: Attempt,
    origin: Origin,
    contents: StateContents,
    receipts: Sequence[Receipt],
    created_unix_s: float,
    *,
    healthy: bool = True,
) -> Manifest:
    """The manifest that joins the receipts, of a checkpoint that no `.metadata` commits yet.

    Raises Corrupt where they do not fit together: somebody else may have made them.
    """
    ends = list(itertools.accumulate((len(receipt.objects) for receipt in receipts), initial=0))
    is_spread = any(layout.is_spread(entry.name) for receipt in receipts for entry in receipt.objects)
    with _fitting(attempt):
        return Manifest(
            version=SPREAD_VERSION if is_spread else MANIFEST_VERSION,
            step=attempt.step,
            attempt=attempt.id,
            created_unix_s=created_unix_s,
            world_size=attempt.world_size,
            generation=origin.generation,
            lineage=origin.lineage,
            mesh=origin.mesh,
            healthy=healthy,
            metadata_size_bytes=0,
            metadata_crc32c=0,
            objects=tuple(entry for receipt in receipts for entry in receipt.objects),
            tensors=contents.tensors,
            values=contents.values,
            containers=contents.containers,
            items=ItemTable.join([receipt.items for receipt in receipts], ends[:-1]),
        )


@contextlib.contextmanager
def _fitting(attempt: Attempt) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise Corrupt(f"the parts of step {attempt.step} do not fit together: {error.errors()[0]['msg']}") from None


def build_manifest(
    attempt: Attempt,
    origin: Origin,
    contents: StateContents,
    receipts: Sequence[Receipt],
    created_unix_s: float,
    *,
    healthy: bool = True,
) -> tuple[Manifest, bytes]:
    """The manifest that joins the receipts, and the `.metadata` it commits with."""
    from storage.format.dcp_pickle import dump_metadata

    draft = draft_manifest(attempt, origin, contents, receipts, created_unix_s, healthy=healthy)
    metadata = dump_metadata(of_manifest(attempt.prefix, draft), attempt.id)
    sums = {"metadata_size_bytes": len(metadata), "metadata_crc32c": crc32c(metadata)}
    return draft.model_copy(update=sums), metadata
