"""What a checkpoint that is saved over another makes superfluous."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from storage.errors import Corrupt, NoCheckpoint, StorageError
from storage.format import layout
from storage.run import catalog
from storage.stores.objects import ObjectStore, read_if_there

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replaced:
    """The `.metadata` that is to be put over, and the keys of what nobody needs any more afterwards."""

    metadata: bytes
    keys: Sequence[str]


def find(store: ObjectStore, prefix: str) -> Replaced | None:
    """The checkpoint at `prefix`, committed or set aside, that a save is to replace; None where there is none.

    Of a damaged checkpoint, or one that was set aside, nothing is superfluous: somebody may want to look at it.

    Raises Transient, Denied.
    """
    metadata = read_if_there(store, prefix + layout.METADATA)
    if metadata is None:
        return None
    try:
        return Replaced(metadata, _keys(store, catalog.find_commit(store, prefix)))
    except NoCheckpoint:
        return Replaced(metadata, ())
    except Corrupt as error:
        log.warning("what is replaced at %s is damaged, and its data stays: %s", _where(store, prefix), error)
        return Replaced(metadata, ())


def _keys(store: ObjectStore, commit: catalog.Commit) -> list[str]:
    if commit.manifest is not None:
        folder = f"{commit.prefix}{layout.attempt_folder(commit.manifest.attempt)}/"
        return [info.key for info in store.list(folder)]
    # a `.metadata` of stock DCP can name anything; what its writer calls data files lies beside it
    names = (entry.name for entry in catalog.open_commit(commit).objects)
    return [commit.prefix + name for name in names if "/" not in name and name.endswith(".distcp")]


def remove(store: ObjectStore, prefix: str, replaced: Replaced) -> None:
    """Delete what a checkpoint has replaced, once that stands. What cannot be deleted costs space, and a warning."""
    try:
        for key in replaced.keys:
            store.delete(key)
    except StorageError as error:
        log.warning("data of the checkpoint that was replaced at %s stays: %s", _where(store, prefix), error)


def _where(store: ObjectStore, prefix: str) -> str:
    return layout.join_url(store.url, prefix)
