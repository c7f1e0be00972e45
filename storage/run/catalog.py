"""Which checkpoints a run has, and opening one: everything up to its data objects."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from storage.errors import Corrupt, Denied, Forbidden, NoCheckpoint, NotFound
from storage.format import layout
from storage.format.checksum import crc32c
from storage.format.index import Index, check_whole, of_manifest
from storage.format.manifest import Manifest, ObjectEntry, load_manifest
from storage.parallel import Pool
from storage.stores.objects import ObjectInfo, ObjectStore, exists, read_if_there
from storage.verified.twice import read_verified

log = logging.getLogger(__name__)

_NUM_ASKED_AT_ONCE = 16
_NUM_LOOKS_MAX = 100


@dataclass(frozen=True)
class Commit:
    """What was found of a committed checkpoint, before any data was read.

    `metadata` is the `.metadata`; `manifest` is None for a checkpoint of stock DCP; `sizes_bytes` says what lies in its
    folder.
    """

    prefix: str
    metadata: bytes
    manifest: Manifest | None
    sizes_bytes: Mapping[str, int]


def steps(store: ObjectStore) -> list[int]:
    """Every step that has a folder, committed or not, newest first. Raises Forbidden where nothing may be listed."""
    try:
        found = [layout.parse_step(name) for name in store.folders("")]
    except Forbidden as error:
        example = layout.join_url(store.url, layout.step_folder(120))
        raise Forbidden(
            f"the steps of {store.url} cannot be found without permission to list it ({error}); give ShardReader or"
            f" `elastic-moe ckpt` the URL of one step, such as {example}"
        ) from None
    return sorted((step for step in found if step is not None), reverse=True)


def is_checkpoint(store: ObjectStore, prefix: str) -> bool:
    """Whether a checkpoint is committed at `prefix`, and not set aside."""
    if not exists(store, prefix + layout.METADATA):
        return False
    try:
        if not (aside := store.list(prefix + layout.QUARANTINED_PREFIX)):
            return True
    except Forbidden:
        return layout.quarantined_name(store.read(prefix + layout.METADATA)) not in _AskedByName(store, prefix)
    try:
        metadata = store.read(prefix + layout.METADATA)
    except NotFound:
        return False
    return prefix + layout.quarantined_name(metadata) not in {info.key for info in aside}


def is_set_aside(store: ObjectStore, prefix: str, metadata: bytes) -> bool:
    """Whether the checkpoint that `metadata` commits was found corrupt. It stays where it cannot be removed safely."""
    return exists(store, prefix + layout.quarantined_name(metadata))


def candidates(store: ObjectStore) -> Iterator[tuple[int, ObjectInfo]]:
    """Steps that have a `.metadata`, with the version of it, newest first. `find_commit` knows those set aside.

    A step is looked at when it is asked for: who takes the newest one has asked for no other. Who takes none, or finds
    none, is given what another job has committed meanwhile: the one that was there may have gone for it.
    """
    given: set[tuple[int, ObjectInfo]] = set()
    listed, num_alike = steps(store), 0
    for _ in range(_NUM_LOOKS_MAX if listed else 0):
        for step in listed:
            with contextlib.suppress(NotFound):
                found = step, store.info(f"{layout.step_folder(step)}/{layout.METADATA}")
                if found not in given:
                    given.add(found)
                    yield found
        before, listed = listed, steps(store)
        num_alike = num_alike + 1 if listed == before else 0
        # a listing that is as before may be so by chance, of a step that is being saved and one that is being removed
        if num_alike == (1 if given else 2):
            return


def committed_steps(store: ObjectStore) -> list[int]:
    """Steps that are committed, newest first."""
    return [step for step in steps(store) if is_checkpoint(store, layout.step_folder(step) + "/")]


@dataclass(frozen=True)
class _CommitFiles:
    """What lies at a prefix: `.metadata`, objects by name below it, and the manifest at the top if it was read."""

    metadata: bytes
    listed: Mapping[str, ObjectInfo]
    manifest: bytes | None = None


class _AskedByName(Mapping[str, ObjectInfo]):
    """What lies below a prefix that may not be listed: nothing is known of it but what is asked for by its name.

    What the store refuses counts as not there: it tells those who may not list the same of both.
    """

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._known: dict[str, ObjectInfo | None] = {}

    def __getitem__(self, name: str) -> ObjectInfo:
        if name not in self._known:
            self._known[name] = self._ask(name)
        found = self._known[name]
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def ask(self, names: Collection[str]) -> None:
        """Ask for many objects at once: each is a request."""
        with Pool(_NUM_ASKED_AT_ONCE, thread_name_prefix="storage-look") as pool:
            self._known.update(zip(names, pool.map(self._ask, names), strict=True))

    def _ask(self, name: str) -> ObjectInfo | None:
        try:
            return self._store.info(self._prefix + name)
        except (NotFound, Forbidden):
            return None


class _Sizes(Mapping[str, int]):
    """The sizes of what lies below a prefix."""

    def __init__(self, infos: Mapping[str, ObjectInfo]) -> None:
        self._infos = infos

    def __getitem__(self, name: str) -> int:
        return self._infos[name].size_bytes

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def find_commit(store: ObjectStore, prefix: str) -> Commit:
    """Read what commits the checkpoint at `prefix` ("" or ending in a slash), and check that it fits together.

    Raises:
        NoCheckpoint: nothing is committed there, or it was set aside.
        Corrupt: the manifest or `.metadata` is damaged, missing or another's, or a data object is missing or has
            another size.
    """
    return read_verified(store, layout.join_url(store.url, prefix), lambda: _look(store, prefix))


def find_index(store: ObjectStore, prefix: str) -> tuple[Commit, Index]:
    """What `find_commit` finds, and what `open_commit` makes of it. Raises NoCheckpoint, Corrupt."""

    def find() -> tuple[Commit, Index]:
        commit = _look(store, prefix)
        return commit, open_commit(commit)

    return read_verified(store, layout.join_url(store.url, prefix), find)


def _look(store: ObjectStore, prefix: str) -> Commit:
    metadata = _read_metadata(store, prefix)
    return _fit(store, prefix, _CommitFiles(metadata, _listed(store, prefix)))


def open_checkpoint(store: ObjectStore, prefix: str) -> Index:
    """The index that `find_index` finds, with fewer waits for the store: the looks that it takes go at once.

    What does not fit together is looked at again, one after the other: somebody may have committed between the looks.

    Raises NoCheckpoint, Corrupt.
    """
    return read_verified(
        store,
        layout.join_url(store.url, prefix),
        lambda: open_commit(_fit(store, prefix, _look_at_once(store, prefix))),
        lambda: open_commit(_look(store, prefix)),
    )


def _look_at_once(store: ObjectStore, prefix: str) -> _CommitFiles:
    with Pool(2, thread_name_prefix="storage-open") as pool:
        manifest = pool.submit(read_if_there, store, prefix + layout.MANIFEST)
        # below the root lies perhaps a whole run; that is listed only if the root is a checkpoint itself
        listing = pool.submit(_listed, store, prefix) if prefix else None
        metadata = _read_metadata(store, prefix)
        listed = listing.result() if listing is not None else _listed(store, prefix)
        try:
            return _CommitFiles(metadata, listed, manifest.result())
        except Forbidden:
            if not isinstance(listed, _AskedByName):
                raise
            return _CommitFiles(metadata, listed)


def _read_metadata(store: ObjectStore, prefix: str) -> bytes:
    try:
        return store.read(prefix + layout.METADATA)
    except NotFound:
        where = layout.join_url(store.url, prefix)
        raise NoCheckpoint(f"no checkpoint at {where}: there is no {layout.METADATA}") from None


def _listed(store: ObjectStore, prefix: str) -> Mapping[str, ObjectInfo]:
    try:
        return {info.key.removeprefix(prefix): info for info in store.list(prefix)}
    except Forbidden as error:
        log.info("what belongs to the checkpoint is asked for by name, since it cannot be listed: %s", error)
        return _AskedByName(store, prefix)


def _fit(store: ObjectStore, prefix: str, found: _CommitFiles) -> Commit:
    metadata, listed = found.metadata, found.listed
    if layout.quarantined_name(metadata) in listed:
        where = layout.join_url(store.url, prefix)
        raise NoCheckpoint(f"no checkpoint at {where}: it was found damaged, and set aside")
    manifest = find_manifest(store, prefix, metadata, listed, found.manifest)
    sizes_bytes = _Sizes(listed)
    if manifest is None:
        # stock DCP's has no checksum of its own
        if store.read(prefix + layout.METADATA) != metadata:
            raise Corrupt(f"{prefix}{layout.METADATA} is damaged: it reads differently each time")
        return Commit(prefix, metadata, None, sizes_bytes)
    step = layout.parse_step(prefix.rstrip("/"))
    if step is not None and step != manifest.step:
        raise Corrupt(f"{prefix}{layout.MANIFEST} is of step {manifest.step}")
    check_objects(store, prefix, manifest.objects, listed)
    return Commit(prefix, metadata, manifest, sizes_bytes)


def check_objects(
    store: ObjectStore, prefix: str, objects: Sequence[ObjectEntry], listed: Mapping[str, ObjectInfo]
) -> None:
    """Compare the data objects with the store's; `listed` is what a listing of `prefix` showed, by name below it.

    By size, and not by etag: that may differ between two clients of one store (on a mounted file system it holds the
    inode and the time of change, as this client sees them).

    A listing may be older than the truth (caches of a mounted file system): what it lacks is asked for by name.

    Raises:
        Corrupt: one is missing or has another size.
    """
    if isinstance(listed, _AskedByName):
        listed.ask([entry.name for entry in objects])
    for entry in objects:
        info = listed.get(entry.name)
        if info is None or info.size_bytes != entry.size_bytes:
            try:
                info = store.info(prefix + entry.name)
            except NotFound:
                raise Corrupt(f"{prefix}{entry.name} is missing") from None
        if info.size_bytes != entry.size_bytes:
            raise Corrupt(f"{prefix}{entry.name} has {info.size_bytes} bytes, the manifest says {entry.size_bytes}")


def find_manifest(
    store: ObjectStore, prefix: str, metadata: bytes, names: Collection[str], top: bytes | None = None
) -> Manifest | None:
    """The manifest that `metadata`, the `.metadata` at `prefix`, commits; None for a checkpoint of stock DCP.

    `.metadata` decides, and nothing else: whoever lost the race for it may still have put its own manifest at the top,
    which is a copy for people. `names` are the objects below `prefix`; an attempt's manifest is never overwritten.
    `top`: the manifest at the top, if it was read already.

    Raises:
        Corrupt: there is an attempt, but no intact manifest that fits `metadata`.
    """
    problems = []
    may_list = not isinstance(names, _AskedByName)
    # stock DCP's pickle holds the names of the data objects as they are
    names = sorted(names) if may_list else [layout.manifest_name(attempt) for attempt in layout.attempts_in(metadata)]
    for name in (layout.MANIFEST, *filter(layout.is_manifest_name, names)):
        try:
            data = top if name == layout.MANIFEST and top is not None else store.read(prefix + name)
            manifest = load_manifest(data, prefix + name)
        except NotFound:
            continue
        except Forbidden:
            if may_list:
                raise
            continue  # what it says of an object that is not there
        except Corrupt as error:
            problems.append(str(error))
            continue
        if commits(metadata, manifest):
            if problems:
                log.warning("%s; read %s%s instead", problems[0], prefix, name)
            return manifest
        problems.append(f"{prefix}{layout.METADATA} is damaged: its checksum is not that in {name}")
    if _is_of_stock(metadata):
        return None
    if problems:
        raise Corrupt(problems[0])
    if any(layout.parse_attempt(name.split("/")[0]) for name in names):
        raise Corrupt(f"{prefix}{layout.MANIFEST} is missing")
    return None


def _is_of_stock(metadata: bytes) -> bool:
    """Whether it names data objects, and none of an attempt: then an attempt beside it has not committed. Pure."""
    return b".distcp" in metadata and not layout.attempts_in(metadata)


def commits(metadata: bytes, manifest: Manifest) -> bool:
    """Whether `metadata` is the `.metadata` of `manifest`. Pure."""
    return (len(metadata), crc32c(metadata)) == (manifest.metadata_size_bytes, manifest.metadata_crc32c)


def open_commit(commit: Commit) -> Index:
    """Turn a commit into something that can be read from. Raises Corrupt."""
    from storage.format.dcp_metadata import load_metadata
    from storage.format.dtypes import check_sizes

    if commit.manifest is not None:
        return check_whole(check_sizes(of_manifest(commit.prefix, commit.manifest)))
    step = layout.parse_step(commit.prefix.rstrip("/")) or 0
    name = commit.prefix + layout.METADATA
    try:
        return load_metadata(commit.metadata, commit.prefix, step, commit.sizes_bytes, name)
    except Denied as error:
        # what damage looks like from here: no store was asked, so nothing refused an access
        raise Corrupt(str(error)) from None


def quarantined_steps(store: ObjectStore) -> list[int]:
    """Steps of which a damaged checkpoint was set aside, newest first."""
    return [step for step in steps(store) if store.list(f"{layout.step_folder(step)}/{layout.QUARANTINED_PREFIX}")]
