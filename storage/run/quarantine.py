"""Setting a `.metadata` aside, and what then has to make way: one that was found damaged, commits nothing any more, or
was saved as unhealthy and is in the way of a new one.

A copy whose name says which `.metadata` is meant (`layout.quarantined_name`) makes it count no more. It is also removed
where the store can remove that very version and no other; elsewhere it stays until the step is saved anew. So nothing
here hits what another process has committed meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass

from storage.errors import AlreadyExists, Corrupt, NotFound, UsageError
from storage.format import layout
from storage.run import catalog
from storage.run.owner import Claim
from storage.stores.objects import Capability, ObjectInfo, ObjectStore
from storage.verified.twice import read_agreed, read_expected

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuarantinedMetadata:
    """A `.metadata` that was set aside and is still there."""

    info: ObjectInfo
    metadata: bytes


def set_aside(store: ObjectStore, judged: ObjectInfo) -> bool:
    """Set a `.metadata` aside, so that nobody takes the damaged checkpoint for a good one; whether it was still there.

    `judged` is what the store said of it before the damage was looked for. By now another may be there, of a newer
    owner who was faster and has saved the step anew: that one stays. A copy whose name says which `.metadata` is
    meant makes it count no more; it is also removed where the store can remove that very version and no other.
    """
    prefix = judged.key.removesuffix(layout.METADATA)
    try:
        metadata = read_agreed(store, judged.key)
        if store.info(judged.key) != judged:
            return False
    except NotFound:
        return False
    store.put(prefix + layout.quarantined_name(metadata), [metadata])
    return not store.can(Capability.CONDITIONAL_DELETES) or store.delete_version(judged.key, judged.etag)


def withdraw(store: ObjectStore, prefix: str, metadata: bytes) -> None:
    """Undo a commit, unless another has taken its place."""
    with contextlib.suppress(NotFound):
        info = store.info(prefix + layout.METADATA)
        if read_expected(store, info.key, metadata) != metadata:
            return
        if store.can(Capability.CONDITIONAL_DELETES):
            store.delete_version(info.key, info.etag)
        else:
            store.put(prefix + layout.quarantined_name(metadata), [metadata])


def find_aside(store: ObjectStore, prefix: str, claim: Claim | None = None) -> QuarantinedMetadata | None:
    """The `.metadata` at `prefix` that was set aside; None where there is no `.metadata`.

    A checkpoint that was saved as unhealthy is set aside for the owner of the run, who has `claim`: the step is saved
    anew. Its data stays as that of a damaged one does.

    Raises:
        AlreadyExists: it was not set aside.
        Fenced: it is of an unhealthy checkpoint, and the run has another owner.
    """
    try:
        info = store.info(prefix + layout.METADATA)
        metadata = read_agreed(store, info.key)
    except NotFound:
        return None
    if catalog.is_set_aside(store, prefix, metadata):
        return QuarantinedMetadata(info, metadata)
    if claim is None or not _is_unhealthy(store, prefix):
        raise taken(store, prefix)
    claim.check()
    log.info("the unhealthy checkpoint at %s makes way", layout.join_url(store.url, prefix))
    set_aside(store, info)
    return find_aside(store, prefix)


def _is_unhealthy(store: ObjectStore, prefix: str) -> bool:
    try:
        commit = catalog.find_commit(store, prefix)
    except (Corrupt, UsageError):
        return False  # a restore finds out what is wrong with it
    return commit.manifest is not None and not commit.manifest.healthy


def make_way(store: ObjectStore, aside: QuarantinedMetadata, claim: Claim | None) -> bool:
    """Remove what was set aside, to be called right after it was found; True where it has to be put over instead.

    Raises Fenced, AlreadyExists.
    """
    if store.can(Capability.CONDITIONAL_DELETES):
        store.delete_version(aside.info.key, aside.info.etag)
        return False
    return _may_replace(store, aside.info, claim)


def _may_replace(store: ObjectStore, aside: ObjectInfo, claim: Claim | None) -> bool:
    """Whether it is still there, asked right before a put that has no condition.

    A process that was paused before this must not overwrite what a newer owner has committed meanwhile. One that is
    paused after it still can, where the store has no conditional deletes.

    Raises Fenced, AlreadyExists.
    """
    if claim is not None:
        claim.check()
    try:
        if store.info(aside.key) == aside:
            return True
    except NotFound:
        return False
    raise taken(store, aside.key.removesuffix(layout.METADATA))


def taken(store: ObjectStore, prefix: str) -> AlreadyExists:
    """The error of whoever would commit at `prefix` where another has."""
    where = layout.join_url(store.url, prefix)
    return AlreadyExists(f"{where} is committed already; restore it, or save to another URL")
