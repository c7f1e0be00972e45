"""Look at checkpoints without loading them: list, describe, verify every byte. Our own format needs no torch."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Self

from storage.errors import Cause, Corrupt, Forbidden, NoCheckpoint, NotFound, UsageError
from storage.format import layout
from storage.format.checksum import crc32c
from storage.format.index import Index
from storage.format.manifest import ItemEntry, Manifest
from storage.format.zips import RunningSum, check_zip
from storage.parallel import Pool, windowed
from storage.run import catalog
from storage.stores.objects import ObjectStore, exists
from storage.stores.registry import as_url, open_store

log = logging.getLogger(__name__)

_NUM_THREADS = 4
_PART_SIZE_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Summary:
    """One step of a run.

    `state`: "committed", "unhealthy" (committed, but its writer said that it is not to be gone on from), "stock"
    (written by stock DCP), "damaged", "quarantined" or "uncommitted"; `reason` says more about the damaged. What only
    our manifest knows is None for the others; `size_bytes` counts data objects.
    """

    folder: str
    step: int | None
    state: str
    reason: str = ""
    size_bytes: int | None = None
    created_unix_s: float | None = None
    world_size: int | None = None
    generation: int | None = None
    lineage: str | None = None
    mesh: dict[str, Any] | None = None


@dataclass(frozen=True)
class Shard:
    """One stored chunk of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    object: str


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, with its shards by offset."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Details:
    """A checkpoint's content."""

    summary: Summary
    tensors: tuple[Tensor, ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
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
    """Every step, newest first."""
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
        return Summary(folder, step, "quarantined" if is_aside else "uncommitted")
    try:
        commit = catalog.find_commit(store, prefix)
    except (Corrupt, UsageError) as error:
        return Summary(folder, step, "damaged", reason=str(error))
    if commit.manifest is None:
        sizes = [size for name, size in commit.sizes_bytes.items() if name.endswith(".distcp")]
        size = sum(sizes) if commit.sizes_bytes else None  # of what cannot be listed nobody knows it yet
        return Summary(folder, step, "stock", size_bytes=size)
    manifest = commit.manifest
    return Summary(
        folder,
        manifest.step,
        "committed" if manifest.healthy else "unhealthy",
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
        return _stock_details(summary, catalog.open_commit(commit))
    manifest = commit.manifest
    shards: dict[str, list[Shard]] = defaultdict(list)
    for item in manifest.items.rows():
        if item.offsets is not None and item.sizes is not None:
            shards[item.key].append(Shard(item.offsets, item.sizes, manifest.objects[item.object].name))
    tensors = [
        Tensor(key, entry.dtype, entry.shape, tuple(sorted(shards[key], key=lambda shard: shard.offsets)))
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
        shards = [Shard(*box, index.objects[where].name) for box, where in zip(boxes, places, strict=True)]
        tensors.append(Tensor(key, entry.dtype, entry.shape, tuple(shards)))
    values = sorted(key for key, entry in index.entries.items() if not entry.is_tensor)
    return Details(summary, tuple(tensors), tuple(values))


def verify(store: ObjectStore, prefix: str, only: Collection[str] | None = None) -> Verdict:
    """Read every byte of the checkpoint and compare it with the checksums: the manifest's, or the zips' of stock DCP.

    Of the data objects only those whose keys are in `only`, if that is given; the index is checked in any case.

    Raises:
        NoCheckpoint: nothing is committed at `prefix`.
        UsageError: another version's format.
        Transient, Denied: by the store.
    """
    folder = prefix.rstrip("/")
    step = layout.parse_step(folder)
    try:
        commit = catalog.find_commit(store, prefix)
        if commit.manifest is None:
            return _verify_stock(store, catalog.open_commit(commit), folder, step, only)
        manifest = commit.manifest
    except Corrupt as error:
        return Verdict(folder, step, 0, 0, (str(error),))
    items: dict[int, list[ItemEntry]] = defaultdict(list)
    for item in manifest.items.rows():
        items[item.object].append(item)

    def check(index: int) -> list[str]:
        entry = manifest.objects[index]
        return list(_object_problems(store, prefix + entry.name, entry.size_bytes, items[index]))

    problems = list(gaps(manifest))
    chosen = [index for index, entry in enumerate(manifest.objects) if only is None or prefix + entry.name in only]
    with Pool(_NUM_THREADS) as pool:
        for found in windowed(pool, check, chosen, 2 * _NUM_THREADS):
            problems += found
    size_bytes = sum(manifest.objects[index].size_bytes for index in chosen)
    return Verdict(folder, manifest.step, len(chosen), size_bytes, tuple(problems))


def gaps(manifest: Manifest) -> Iterator[str]:
    """Tensors whose shards do not make them up, and values that are not there. Pure."""
    num_elements: dict[str, int] = defaultdict(int)
    stored = set()
    for item in manifest.items.rows():
        stored.add(item.key)
        num_elements[item.key] += math.prod(item.sizes or ())
    for key, entry in manifest.tensors.items():
        if num_elements[key] != math.prod(entry.shape):
            yield f"tensor {key!r} has {num_elements[key]} of {math.prod(entry.shape)} elements"
    for key in manifest.values.keys() - stored:
        yield f"value {key!r} is not stored"


def _object_problems(store: ObjectStore, key: str, size_bytes: int, items: list[ItemEntry]) -> Iterator[str]:
    end = 0
    for item in sorted(items, key=lambda item: item.offset):
        if item.offset != end:
            yield f"{key}: bytes {end} to {item.offset} belong to no item"
        end = item.offset + item.length
        try:
            yield from _item_problems(store, key, item)
        except (Corrupt, NotFound) as error:
            yield str(error)
    if end != size_bytes:
        yield f"{key}: bytes {end} to {size_bytes} belong to no item"


def _item_problems(store: ObjectStore, key: str, item: ItemEntry) -> Iterator[str]:
    """Damage is named by block; the item's own checksum then tells damage of the data from damage of the index."""
    whole_crc, block = 0, item.block_size_bytes
    step = max(1, _PART_SIZE_BYTES // block) * block
    memory = memoryview(bytearray(min(step, item.length)))
    bad = []
    blocks = item.blocks()
    for start in range(0, item.length, step):
        part = memory[: min(step, item.length - start)]
        store.read_into(key, item.offset + start, [part])
        whole_crc = crc32c(part, whole_crc)
        bad += [
            item.offset + start + at
            for at in range(0, part.nbytes, block)
            if crc32c(part[at : at + block]) != blocks[(start + at) // block]
        ]
    if bad:
        yield f"{key}: checksum of {item.key!r} does not match in {len(bad)} block(s), first at byte {bad[0]}"
    elif whole_crc != item.crc32c:
        yield f"{key}: checksum of {item.key!r} as a whole does not match"


def _verify_stock(
    store: ObjectStore,
    index: Index,
    folder: str,
    step: int | None,
    only: Collection[str] | None,
) -> Verdict:
    columns = index.columns
    rows = zip(columns.object.tolist(), columns.offset.tolist(), columns.length.tolist(), strict=True)
    found = {(index.objects[where].name, offset, length) for where, offset, length in rows}
    places = sorted(place for place in found if only is None or index.prefix + place[0] in only)
    names = {name for name, _, _ in places}

    def check(place: tuple[str, int, int]) -> str | None:
        name, offset, length = place
        try:
            if not exists(store, index.prefix + name):
                raise Corrupt(f"{index.prefix}{name} is missing")
            _check_stock_item_twice(store, index.prefix + name, offset, length)
        except Corrupt as error:
            return str(error)
        return None

    with Pool(_NUM_THREADS) as pool:
        problems = tuple(p for p in windowed(pool, check, places, 2 * _NUM_THREADS) if p is not None)
    return Verdict(folder, step, len(names), sum(length for _, _, length in places), problems)


def _check_stock_item_twice(store: ObjectStore, key: str, offset: int, length: int) -> None:
    """Damage counts when it is read twice: the way to here may have flipped a bit. Raises Corrupt, NotFound."""
    try:
        _check_stock_item(store, key, offset, length)
    except Corrupt as error:
        _check_stock_item(store, key, offset, length)
        store.retries.add(Cause.DAMAGED, 0.0)
        log.warning("read again, %s at byte %d is whole; the first time: %s", key, offset, error)


def _check_stock_item(store: ObjectStore, key: str, offset: int, length: int) -> None:
    """Read an item of stock DCP and compare it with its zip's checksums. Raises Corrupt, NotFound."""
    from storage.format.stock import LONG_ITEM_BYTES, PART_SIZE_BYTES, look
    from storage.format.values import check_sense

    def read(start: int, size_bytes: int) -> memoryview:
        memory = memoryview(bytearray(size_bytes))
        store.read_into(key, offset + start, [memory])
        return memory

    name = f"{key} at byte {offset}"
    layout = look(read, length) if length > LONG_ITEM_BYTES else None
    if layout is None:
        memory = read(0, length)
        check_zip(memory, name)
        check_sense(memory, name)
        return
    total = RunningSum(layout.start, layout.stop, layout.crc32, name)
    for start in range(0, length, PART_SIZE_BYTES):
        total.add(start, read(start, min(PART_SIZE_BYTES, length - start)))
    total.check()
