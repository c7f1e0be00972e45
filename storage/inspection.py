"""Look at checkpoints without loading them: list, describe, verify every byte. Our own format needs no torch."""

from __future__ import annotations

import contextlib
import enum
import functools
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from storage.errors import Corrupt, Forbidden, NoCheckpoint, UsageError
from storage.format import layout
from storage.format.completeness import gaps, has_odd_sum, strays
from storage.format.index import Index, of_manifest
from storage.parallel import Pool, windowed_by_size
from storage.run import catalog
from storage.stores.objects import ObjectStore
from storage.stores.registry import as_url, open_store
from storage.verified.readplan import NOWHERE, Part, Want, plan_parts
from storage.verified.source import Source, scratch
from storage.verified.twice import read_verified

_NUM_THREADS = 4
_WINDOW = 2 * _NUM_THREADS
_PART_SIZE_BYTES = 8 * 1024 * 1024


class CheckpointState(enum.StrEnum):
    """What there is of one step."""

    COMMITTED = "committed"
    UNHEALTHY = "unhealthy"
    """Committed, but whoever saved it said that it is not to be gone on from."""
    STOCK = "stock"
    """Committed by stock DCP."""
    DAMAGED = "damaged"
    QUARANTINED = "quarantined"
    UNCOMMITTED = "uncommitted"


@dataclass(frozen=True)
class Summary:
    """One step of a run.

    `reason` says more about a damaged one. What only our manifest knows is None for the others; `size_bytes` counts
    data objects.
    """

    folder: str
    step: int | None
    state: CheckpointState
    reason: str = ""
    size_bytes: int | None = None
    created_unix_s: float | None = None
    world_size: int | None = None
    generation: int | None = None
    lineage: str | None = None
    mesh: dict[str, Any] | None = None


@dataclass(frozen=True)
class StoredChunk:
    """One stored chunk of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    object: str


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, with its shards by offset."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    shards: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class Details:
    """A checkpoint's content."""

    summary: Summary
    tensors: tuple[StoredTensor, ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Verification:
    """Whether every byte of a checkpoint is what was written; no problems means that it is."""

    folder: str
    step: int | None
    num_objects: int
    size_bytes: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Location:
    """A run (`prefix` None) or one checkpoint in a store, which is closed with it: it is a context manager."""

    store: ObjectStore
    prefix: str | None

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def locate(url: str | os.PathLike[str]) -> Location:
    """Open `url`: a run, a step's folder, or a folder with a stock checkpoint. The caller closes it.

    Raises:
        BadURL: it cannot be opened.
        NoCheckpoint: there is nothing of a checkpoint.
    """
    url = as_url(url)
    run, prefix = layout.split_step_url(url)
    with contextlib.ExitStack() as opened:
        store = opened.enter_context(open_store(run))
        location = Location(store, prefix if prefix or _is_checkpoint(store) else None)
        _check_not_empty(location, url)
        opened.pop_all()
    return location


def _check_not_empty(location: Location, url: str) -> None:
    """Raise NoCheckpoint where nothing of a checkpoint lies."""
    if location.prefix is None:
        if not catalog.steps(location.store):
            raise NoCheckpoint(f"no checkpoint at {url}: there are no step folders (step-000000120) in it")
        return
    with contextlib.suppress(Forbidden):  # it can be read all the same
        if not location.store.list(location.prefix):
            raise NoCheckpoint(f"no checkpoint at {url}: the folder does not exist or is empty")


def _is_checkpoint(store: ObjectStore) -> bool:
    """Whether the store's root is one. Who may not list is told the same of what is not there as of what is denied."""
    try:
        return catalog.is_checkpoint(store, "")
    except Forbidden:
        return False


def summaries(location: Location) -> list[Summary]:
    """The summaries of every step, newest first."""
    if location.prefix is not None:
        return [summarize(location.store, location.prefix)]
    return [summarize(location.store, layout.step_folder(step) + "/") for step in catalog.steps(location.store)]


def summarize(store: ObjectStore, prefix: str) -> Summary:
    """One step's summary; damage of the index is reported in it, not raised."""
    folder = prefix.rstrip("/")
    step = layout.parse_step(folder)
    if not catalog.is_checkpoint(store, prefix):
        try:
            is_aside = bool(store.list(prefix + layout.QUARANTINED_PREFIX))
        except Forbidden:
            is_aside = True  # asked for by name: else what is there counted
        return Summary(folder, step, CheckpointState.QUARANTINED if is_aside else CheckpointState.UNCOMMITTED)
    try:
        commit = catalog.find_commit(store, prefix)
    except (Corrupt, UsageError) as error:
        return Summary(folder, step, CheckpointState.DAMAGED, reason=str(error))
    if commit.manifest is None:
        sizes = [size for name, size in commit.sizes_bytes.items() if name.endswith(".distcp")]
        size = sum(sizes) if commit.sizes_bytes else None  # of what cannot be listed nobody knows it yet
        return Summary(folder, step, CheckpointState.STOCK, size_bytes=size)
    manifest = commit.manifest
    return Summary(
        folder,
        manifest.step,
        CheckpointState.COMMITTED if manifest.healthy else CheckpointState.UNHEALTHY,
        size_bytes=manifest.size_bytes,
        created_unix_s=manifest.created_unix_s,
        world_size=manifest.world_size,
        generation=manifest.generation,
        lineage=manifest.lineage,
        mesh=manifest.mesh,
    )


def checkpoints(location: Location) -> list[str]:
    """Prefixes of the committed checkpoints, newest first. Raises NoCheckpoint when there is none."""
    if location.prefix is not None:
        found = [location.prefix] if catalog.is_checkpoint(location.store, location.prefix) else []
    else:
        found = [layout.step_folder(step) + "/" for step in catalog.committed_steps(location.store)]
    if not found:
        where = layout.join_url(location.store.url, location.prefix or "")
        raise NoCheckpoint(f"no checkpoint at {where}: nothing is committed")
    return found


def details(store: ObjectStore, prefix: str) -> Details:
    """What a checkpoint holds. Raises NoCheckpoint, Corrupt."""
    commit = catalog.find_commit(store, prefix)
    summary = summarize(store, prefix)
    if commit.manifest is None:
        return _stock_details(summary, catalog.find_index(store, prefix)[1])
    manifest = commit.manifest
    shards: dict[str, list[StoredChunk]] = defaultdict(list)
    for item in manifest.items.rows():
        if item.offsets is not None and item.sizes is not None:
            shards[item.key].append(StoredChunk(item.offsets, item.sizes, manifest.objects[item.object].name))
    tensors = [
        StoredTensor(key, entry.dtype, entry.shape, tuple(sorted(shards[key], key=lambda shard: shard.offsets)))
        for key, entry in sorted(manifest.tensors.items())
    ]
    return Details(summary, tuple(tensors), tuple(sorted(manifest.values)))


def _stock_details(summary: Summary, index: Index) -> Details:
    tensors = []
    for key, entry in sorted(index.entries.items()):
        if not entry.is_tensor:
            continue
        places = index.columns.object[entry.first : entry.last].tolist()
        boxes = (index.box(key, item) for item in range(entry.first, entry.last))
        shards = [StoredChunk(*box, index.objects[where].name) for box, where in zip(boxes, places, strict=True)]
        tensors.append(StoredTensor(key, entry.dtype, entry.shape, tuple(shards)))
    values = sorted(key for key, entry in index.entries.items() if not entry.is_tensor)
    return Details(summary, tuple(tensors), tuple(values))


def verify(store: ObjectStore, prefix: str, only: Collection[str] | None = None) -> Verification:
    """Read every byte of the checkpoint and compare it with the checksums: the manifest's, or the zips' of stock DCP.

    Of the data objects only those whose keys are in `only`, if that is given; the index is checked in any case.
    Damage counts when it is read twice.

    Raises:
        NoCheckpoint: nothing is committed at `prefix`.
        UsageError: another version's format.
        Transient, Denied: by the store.
    """
    folder = prefix.rstrip("/")
    try:
        problems, index = _examined(store, prefix)
    except Corrupt as error:
        return Verification(folder, layout.parse_step(folder), 0, 0, (str(error),))
    source = Source(store, index)
    wanted = [number for number, entry in enumerate(index.objects) if only is None or prefix + entry.name in only]
    with Pool(_NUM_THREADS) as pool:
        damage = windowed_by_size(
            pool, functools.partial(_damage, source), _units(source, wanted), lambda _: 1, _WINDOW
        )
        problems += filter(None, damage)
    is_wanted = np.isin(index.columns.object, wanted)
    size_bytes = int(index.columns.length[is_wanted].sum())
    return Verification(folder, index.step, len(wanted), size_bytes, tuple(dict.fromkeys(problems)))


def _examined(store: ObjectStore, prefix: str) -> tuple[list[str], Index]:
    """What the index does not account for, and the index. Raises Corrupt."""
    commit = catalog.find_commit(store, prefix)
    if commit.manifest is None:
        return [], catalog.find_index(store, prefix)[1]
    manifest = commit.manifest
    problems = list(gaps(manifest))
    problems += [prefix + text for text in strays(manifest)]
    for item in manifest.items.rows():
        if has_odd_sum(item):
            name = manifest.objects[item.object].name
            problems.append(f"{prefix}{name}: checksum of {item.key!r} as a whole does not match")
    return problems, of_manifest(prefix, manifest)


def _units(source: Source, objects: Sequence[int]) -> Iterator[Part | int]:
    """What is read and judged by itself: parts of objects, and items that can be judged only as a whole."""
    items_of = source.index.items_by_object()
    for number in objects:
        items = items_of[number].tolist()
        joint = source.joint(items)
        places = {item: source.place(item) for item in sorted(set(items) - set(joint))}
        wants = [Want(item, 0, place.length, NOWHERE, 0) for item, place in places.items()]
        yield from plan_parts(places, wants, part_size_bytes=_PART_SIZE_BYTES)
        yield from joint


def _damage(source: Source, unit: Part | int) -> str | None:
    """What is wrong with a part or an item; None if it is whole."""
    try:
        if isinstance(unit, Part):
            _fetch(source, unit)
        else:
            read_verified(source.store, source.index.object_of(unit), functools.partial(_read_whole, source, unit))
    except Corrupt as error:
        return str(error)
    return None


def _read_whole(source: Source, item: int) -> None:
    """Read and judge an item that can be judged only as a whole. Raises Corrupt."""
    source, _ = source.looked_at([item], map)
    place = source.place(item)
    for part in plan_parts({item: place}, [Want(item, 0, place.length, NOWHERE, 0)], part_size_bytes=_PART_SIZE_BYTES):
        _fetch(source, part)
    source.verifier(item).check()


def _fetch(source: Source, part: Part) -> None:
    source.fetch(part, [scratch(segment.stop - segment.start) for segment in part.segments])
