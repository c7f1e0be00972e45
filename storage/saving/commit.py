"""The commit protocol: from data objects that nobody sees to a checkpoint that everybody does, or to nothing.

    every rank       data objects under a fresh attempt -> its receipt (or a receipt that says why not)
    coordinator      all receipts
                     -> at once: still the run's owner | no other `.metadata` there | every object has the size in its
                        receipt | the attempt's manifest.json
                     -> at once: still the run's owner | that manifest read back | a copy of it at the top
                     -> .metadata, last, one conditional put
                     -> at once: it is read back and compared | the objects are still there
    other ranks      wait for `.metadata` of their attempt, or for the coordinator's `aborted.json`

Whoever finds no `.metadata` finds no checkpoint, so a process may die at any point. `.metadata` also says which
attempt it commits (by its checksum, see `catalog.find_manifest`), so a process that lost its run while it was paused
between two of these steps cannot tear what a newer owner has committed meanwhile: everything else it writes is its
own attempt's. The ranks meet only in the store (`storage.saving.receipts`).

Who is fenced learns so before the copy at the top is put, and once more right before `.metadata`; an attempt's manifest
that is put beside the first of these looks is nobody else's.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import tenacity

from storage.errors import AlreadyExists, Corrupt, Fenced, StorageError, Transient, Unconfirmed
from storage.format import layout
from storage.format.manifest import Manifest, ObjectEntry, dump_manifest
from storage.parallel import run_concurrently
from storage.run import catalog, quarantine
from storage.run.attempt import Attempt as Attempt
from storage.run.attempt import StateContents as StateContents
from storage.run.attempt import build_manifest as build_manifest
from storage.run.owner import Claim
from storage.stores.objects import ObjectStore, read_if_there
from storage.verified.twice import read_expected

_NUM_TRIES = 8  # about 5 s

T = TypeVar("T")

log = logging.getLogger(__name__)


def _check_objects(store: ObjectStore, attempt: Attempt, objects: Sequence[ObjectEntry]) -> None:
    """Compare what the ranks say with what the store has. Raises Corrupt."""
    folder = attempt.prefix + layout.attempt_folder(attempt.id) + "/"
    listed = {info.key.removeprefix(attempt.prefix): info for info in store.list(folder)}
    catalog.check_objects(store, attempt.prefix, objects, listed)


def publish(
    store: ObjectStore,
    attempt: Attempt,
    manifest: Manifest,
    metadata: bytes,
    claim: Claim | None,
    replaces: bytes | None = None,
) -> None:
    """Check what was stored, and make the checkpoint visible.

    Requests that do not need each other's answers go at once, since a commit is small and waits for nothing but them.
    What must not be overwritten by one who is fenced or too late is put a round after both were looked up.

    Args:
        claim: this process's claim on the run; None where nobody claims it.
        replaces: a `.metadata` that stands there and is to be put over, in one put: until then it counts, and all that
            it commits stays as it is.

    Raises:
        Fenced: another process owns the run now.
        AlreadyExists: the step is committed already, or what stands there is not what was to be replaced.
        Corrupt: a data object, or what is read back, is not what was written.
        Unconfirmed: `.metadata` was put, but the store does not answer any more.
        Transient, Denied: by the store, before anything was visible.

        Of several errors the first in this order: an owner that is superseded learns that, and not what has become of
        its objects since.
    """
    prefix, manifest_bytes = attempt.prefix, dump_manifest(manifest)
    manifest_key, metadata_key = prefix + layout.manifest_name(attempt.id), prefix + layout.METADATA
    check_claim: Callable[[], object] = claim.check if claim is not None else lambda: None
    _, aside, *_ = run_concurrently(
        [
            check_claim,
            lambda: quarantine.find_aside(store, prefix, claim) if replaces is None else None,
            lambda: _check_objects(store, attempt, manifest.objects),
            lambda: _put_once(store, manifest_key, manifest_bytes),
        ]
    )
    run_concurrently(
        [
            check_claim,  # once more: it is the later look that counts, and the one before guards the copy below
            lambda: _check_manifest(store, attempt, manifest_bytes, is_copy=claim is None),
            # plain put: here may lie what a dead attempt left, and nobody relies on it (see `catalog.find_manifest`)
            lambda: store.put(prefix + layout.MANIFEST, [manifest_bytes]),
        ]
    )
    if replaces is None:
        doubt = _try_to_put(store, prefix, metadata, claim, is_clear=aside is None)
    else:
        doubt = _put_over(store, prefix, metadata, replaces)
    if doubt is not None:
        # it may land late, and the objects count from when it stands
        _confirm(store, prefix, metadata, doubt, replaces)
    _, lost = run_concurrently(
        [
            lambda: _confirm(store, prefix, metadata, None),
            lambda: _insist(lambda: _find_lost(store, attempt, manifest.objects), metadata_key),
        ]
    )
    if lost is not None:
        _insist(lambda: quarantine.withdraw(store, prefix, metadata), metadata_key)
        raise Fenced(f"a newer owner of the run has cleaned this attempt up: {lost}")


def put_metadata(store: ObjectStore, prefix: str, metadata: bytes, claim: Claim | None = None) -> None:
    """Put the `.metadata` of `prefix`, and believe what is read back more than how the put was answered.

    For a copy (no `claim`), what was set aside stays so as long as the marker that says it is there: a copy puts the
    same bytes again. No save does, as its objects have names of their own.

    Raises Fenced, AlreadyExists, Corrupt, Unconfirmed, Transient, Denied, as `publish`.
    """
    _confirm(store, prefix, metadata, _try_to_put(store, prefix, metadata, claim))


def _put_once(store: ObjectStore, key: str, data: bytes) -> None:
    with contextlib.suppress(AlreadyExists):  # a copy that was killed has put it (see `storage.transfer.copying`)
        store.put(key, [data], if_absent=True)


def _check_manifest(store: ObjectStore, attempt: Attempt, expected: bytes, *, is_copy: bool) -> None:
    """Read the attempt's manifest back. Raises Corrupt."""
    key = attempt.prefix + layout.manifest_name(attempt.id)
    found = read_expected(store, key, expected)
    if found != expected and is_copy and not catalog.is_checkpoint(store, attempt.prefix):
        # half of it, or damaged: nobody but copies of this very checkpoint puts it, and none has committed
        log.warning("%s at %s is not what it must be; it is put again", key, store.url)
        store.put(key, [expected])
        found = read_expected(store, key, expected)
    if found != expected:
        raise Corrupt(f"{key} is not what was written")


def _try_to_put(
    store: ObjectStore, prefix: str, metadata: bytes, claim: Claim | None, *, is_clear: bool = False
) -> StorageError | None:
    """Put `.metadata` where nothing is in its way. The error that leaves it in doubt whether it stands, if one does.

    `is_clear`: nothing lay there when it was looked for; the put's own condition sees to what has come since.
    """
    replaces = False
    if not is_clear and (aside := quarantine.find_aside(store, prefix, claim)) is not None:
        if claim is None and aside.metadata == metadata:
            return None  # that very one: to remove it would hit one that counts again once the marker is gone
        replaces = quarantine.make_way(store, aside, claim)
    try:
        store.put(prefix + layout.METADATA, [metadata], if_absent=not replaces)
    except (AlreadyExists, Transient) as error:
        return error  # it may be there all the same: answered late, and tried again below us
    return None


def _put_over(store: ObjectStore, prefix: str, metadata: bytes, replaces: bytes) -> StorageError | None:
    """Put `.metadata` over the one that it replaces; returns as `_try_to_put`. Raises AlreadyExists."""
    if read_if_there(store, prefix + layout.METADATA) != replaces:
        raise quarantine.taken(store, prefix)
    try:
        store.put(prefix + layout.METADATA, [metadata])
    except Transient as error:
        return error
    return None


def _confirm(
    store: ObjectStore, prefix: str, metadata: bytes, doubt: StorageError | None, replaces: bytes | None = None
) -> None:
    """Read `.metadata` back. Raises AlreadyExists, Corrupt, Unconfirmed, or the doubt."""
    key = prefix + layout.METADATA
    found = _insist(lambda: read_expected(store, key, metadata), key)
    if found == metadata:
        return
    if doubt is None:
        raise Corrupt(f"{key} was overwritten by another process while it was committed")
    if found is None or found == replaces:
        raise doubt
    raise quarantine.taken(store, prefix)


def _insist(call: Callable[[], T], key: str) -> T:
    """Call, and try again for some seconds while the store is away. Raises Unconfirmed.

    Once `.metadata` was put, an outage must not turn a commit, which others see, into a failure.
    """
    wait = tenacity.wait_exponential(multiplier=0.05, max=2.0) + tenacity.wait_random(0.0, 0.05)
    try:
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, Transient) and not error.given_up),
            stop=tenacity.stop_after_attempt(_NUM_TRIES),
            wait=wait,
            reraise=True,
        )(call)
    except Transient as error:
        raise Unconfirmed(f"{key} was put, but whether it stands could not be read: {error}") from error


def _find_lost(store: ObjectStore, attempt: Attempt, objects: Sequence[ObjectEntry]) -> str | None:
    """What is gone of the objects of an attempt that was just committed: its `.metadata` has to go again.

    A newer owner cleans up the attempts of the owners before it, and one of them may have been paused between its
    last look at the owner and its `.metadata`. Its claim came before the cleaning and the cleaning before this look, or
    it has seen the `.metadata` and spares the attempt.
    """
    try:
        _check_objects(store, attempt, objects)
    except Corrupt as error:
        return str(error)
    return None
