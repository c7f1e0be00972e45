"""Which checkpoints are to be copied from store to store, and what there is of them at either end. Writes nothing."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from storage import inspection
from storage.errors import Corrupt, NoCheckpoint, NotFound, UsageError
from storage.format import layout
from storage.format.completeness import gaps
from storage.format.index import Index
from storage.format.manifest import Manifest
from storage.inspection import Location
from storage.run import catalog
from storage.stores.objects import ObjectStore
from storage.stores.registry import as_url, open_store
from storage.transfer.copyplan import Checksums, DataObject, choose
from storage.verified.twice import read_expected


@dataclass(frozen=True)
class CopyJob:
    """One checkpoint to copy: where it lies in the source, and where in the target."""

    source_prefix: str
    target_prefix: str
    step: int | None

    @property
    def folder(self) -> str:
        """The checkpoint's folder at the target, without the slash."""
        return self.target_prefix.rstrip("/")


@dataclass(frozen=True)
class Found:
    """A checkpoint of the source that can be copied, with its `.metadata`."""

    job: CopyJob
    metadata: bytes
    objects: Sequence[DataObject]
    sizes_there: Mapping[str, int]
    """What lies at the target, by name: a copy that was killed may have left some of the objects."""

    @property
    def size_bytes(self) -> int:
        """The size of all data objects together."""
        return sum(entry.size_bytes for entry in self.objects)


@dataclass(frozen=True)
class CopyContents:
    """All that is known of a checkpoint while it is copied: what its manifest says, or the index of stock DCP's."""

    found: Found
    manifest: Manifest | None = None
    checksums: Checksums | None = None
    index: Index | None = None


class CopyState(enum.StrEnum):
    """What came of one checkpoint, or would."""

    COPIED = "copied"
    PRESENT = "present"
    """The target had it already."""
    DAMAGED = "damaged"
    """In the source, or at the target."""
    REMOVED = "removed"
    """From the source, while it was copied."""
    PLANNED = "planned"
    """It would be copied, by a command that only tells what it would do."""


@dataclass(frozen=True)
class Outcome:
    """What came of one checkpoint; `reason` says more about a damaged one."""

    folder: str
    step: int | None
    state: CopyState
    reason: str = ""
    num_objects_sent: int = 0
    num_objects_present: int = 0
    sent_bytes: int = 0
    present_bytes: int = 0


def open_target(url: str | os.PathLike[str]) -> Location:
    """Open the store to copy to; the caller closes it. `prefix` is None unless the URL names one step's folder.

    Raises BadURL.
    """
    run, prefix = layout.split_step_url(as_url(url))
    return Location(open_store(run), prefix or None)


def plan(source: Location, target: Location, step: int | None = None, last: int | None = None) -> list[CopyJob]:
    """The jobs for all checkpoints that are to be copied, newest first.

    Raises:
        NoCheckpoint: nothing is committed in the source, or not that step.
        UsageError: the URLs do not fit each other.
    """
    if source.store.url == target.store.url:
        raise UsageError(f"source and target are both {source.store.url}; give two different places")
    if source.prefix is not None:
        return [_single(source, target, step, last)]
    if target.prefix is not None:
        raise UsageError(
            f"the source is a whole run, and {target.prefix.rstrip('/')} at the end of the target is one checkpoint; "
            "give the folder above it"
        )
    if catalog.is_checkpoint(target.store, ""):
        raise UsageError(f"{target.store.url} is one checkpoint and no run: steps cannot be copied into it")
    steps = [layout.parse_step(prefix.rstrip("/")) or 0 for prefix in inspection.checkpoints(source)]
    folders = [(number, layout.step_folder(number) + "/") for number in choose(steps, source.store.url, step, last)]
    return [CopyJob(folder, folder, number) for number, folder in folders]


def _single(source: Location, target: Location, step: int | None, last: int | None) -> CopyJob:
    """The job for the only checkpoint of the source. Raises NoCheckpoint, UsageError."""
    if step is not None or last is not None:
        raise UsageError("the source is one checkpoint, so there are no steps to choose from; give the run's URL")
    (prefix,) = inspection.checkpoints(source)
    number = layout.parse_step(prefix.rstrip("/"))
    wanted = target.prefix or prefix
    if number is not None and wanted != prefix:
        raise UsageError(f"the source is step {number} and the target {wanted.rstrip('/')}; give the same step")
    if not wanted and catalog.steps(target.store):
        raise UsageError(f"{target.store.url} has steps in it; give the one to make, such as .../step-000000120")
    return CopyJob(prefix, wanted, layout.parse_step(wanted.rstrip("/")))


def look(source: ObjectStore, target: ObjectStore, job: CopyJob) -> Found | Outcome:
    """What there is to copy, or why there is nothing. Writes nothing.

    Raises:
        UsageError: the target has another checkpoint there; or the source's format is another version's.
        Transient, Denied: by a store.
    """
    contents = find(source, job)
    if isinstance(contents, Outcome):
        return contents
    found = contents.found  # manifests of all steps at once would be large: they are read again
    if (outcome := present_already(target, found)) is not None:
        return outcome
    listed = target.list(job.target_prefix)
    sizes = {info.key.removeprefix(job.target_prefix): info.size_bytes for info in listed}
    return replace(found, sizes_there=sizes)


def find(source: ObjectStore, job: CopyJob) -> CopyContents | Outcome:
    """What the source has of the checkpoint, or why there is nothing to copy. Raises UsageError."""
    try:
        return _find(source, job)
    except Corrupt as error:
        return Outcome(job.folder, job.step, CopyState.DAMAGED, f"in {source.url}: {error}")
    except (NotFound, NoCheckpoint):
        return removed(job)


def _find(source: ObjectStore, job: CopyJob) -> CopyContents:
    """Raises NotFound, NoCheckpoint, Corrupt, UsageError."""
    commit, index = catalog.find_index(source, job.source_prefix)
    manifest = commit.manifest
    if manifest is None:
        plain = [DataObject(entry.name, entry.size_bytes) for entry in index.objects]
        return CopyContents(Found(job, commit.metadata, plain, {}), index=index)
    if job.step not in (None, manifest.step):
        raise UsageError(f"the source is of step {manifest.step}, and the target is to be step {job.step}")
    if problems := list(gaps(manifest)):
        raise Corrupt(problems[0])
    objects = [DataObject(entry.name, entry.size_bytes) for entry in manifest.objects]
    return CopyContents(Found(job, commit.metadata, objects, {}), manifest, Checksums(manifest))


def present_already(target: ObjectStore, found: Found) -> Outcome | None:
    """What there is to say if the target has a checkpoint there. Raises UsageError: it is another one."""
    prefix = found.job.target_prefix
    there = read_expected(target, prefix + layout.METADATA, found.metadata)
    if there is None or catalog.is_set_aside(target, prefix, there):
        return None
    return present(target, found, there)


def present(target: ObjectStore, found: Found, there: bytes) -> Outcome:
    """What there is to say of `there`, a `.metadata` that counts at the target. Raises UsageError: it is another's."""
    job = found.job
    if there != found.metadata:
        raise UsageError(
            f"{layout.join_url(target.url, job.target_prefix)} holds another checkpoint than the source; copy to "
            "another URL, or remove that one first"
        )
    try:
        catalog.find_index(target, job.target_prefix)
    except Corrupt as error:
        return Outcome(job.folder, job.step, CopyState.DAMAGED, f"in {target.url}, where it is committed: {error}")
    return Outcome(
        job.folder,
        job.step,
        CopyState.PRESENT,
        num_objects_present=len(found.objects),
        present_bytes=found.size_bytes,
    )


def removed(job: CopyJob) -> Outcome:
    """The outcome for a checkpoint that is not in the source any more."""
    return Outcome(job.folder, job.step, CopyState.REMOVED, "its job has removed or replaced it meanwhile")
