"""The commit protocol: from data objects that nobody sees to a checkpoint that everybody does, or to nothing.

    every rank       data objects under a fresh attempt -> its receipt (or a receipt that says why not)
    coordinator      all receipts -> every object has the size in its receipt -> still the run's owner
                     -> the attempt's manifest.json, read back, and a copy of it at the top
                     -> .metadata, last, one conditional put, read back and compared
    other ranks      wait for `.metadata` of their attempt, or for the coordinator's `aborted.json`

Whoever finds no `.metadata` finds no checkpoint, so a process may die at any point. `.metadata` also says which
attempt it commits (by its checksum, see `catalog.find_manifest`), so a process that lost its run while it was paused
between two of these steps cannot tear what a newer owner has committed meanwhile: everything else it writes is its
own attempt's. The ranks meet only in the store: nothing here needs a collective, and it may run while the training
uses the process group.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import tenacity

from storage import catalog, layout, quarantine
from storage.checksum import crc32c
from storage.errors import AlreadyExists, Corrupt, Fenced, NotFound, StorageError, Transient, Unconfirmed
from storage.index import of_manifest
from storage.manifest import (
    Aborted,
    ItemTable,
    Manifest,
    ObjectEntry,
    Receipt,
    TensorEntry,
    ValueEntry,
    dump_aborted,
    dump_manifest,
    dump_receipt,
    load_aborted,
    load_manifest,
    load_receipt,
)
from storage.objects import ObjectStore, exists, read_checked, read_if_there
from storage.owner import Claim

_POLL_S_MIN = 0.02
_POLL_S_MAX = 2.0
_NUM_RANKS_SHOWN = 8
_NUM_TRIES = 8  # about 5 s

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One try to save one step."""

    prefix: str
    step: int
    id: str
    world_size: int

    @classmethod
    def of_step(cls, step: int, id: str, world_size: int) -> Attempt:
        """An attempt in a run's folder for `step`."""
        return cls(layout.step_folder(step) + "/", step, id, world_size)


@dataclass(frozen=True)
class Origin:
    """Who saves: recorded in the manifest."""

    generation: int = 0
    lineage: str = ""
    mesh: dict[str, Any] | None = None


@dataclass(frozen=True)
class Contents:
    """What the state holds, by flattened key."""

    tensors: dict[str, TensorEntry]
    values: dict[str, ValueEntry]


class Patience:
    """How long to wait for others: until a deadline, or until `stop` is set.

    Thread-safe to stop; `poll` is for the waiting thread.
    """

    def __init__(self, deadline_s: float, stop: threading.Event) -> None:
        self._deadline_s = deadline_s
        self._stop = stop

    def poll(self, what: Callable[[], str]) -> Iterator[None]:
        """Yields at growing intervals (20 ms to 2 s).

        Raises Transient, with `what` is still missing then, at the deadline or when stopped.
        """
        for count in itertools.count():
            yield
            left_s = self._deadline_s - time.monotonic()
            if left_s <= 0:
                raise Transient(f"gave up waiting for {what()}")
            if self._stop.wait(min(_POLL_S_MIN * 1.5 ** min(count, 12), _POLL_S_MAX, left_s)):
                raise Transient(f"closed while waiting for {what()}")

    def until(self, what: Callable[[], str], look: Callable[[], T | None]) -> T:
        """What `look` finds at last, asked at the intervals of `poll`. A store that is away has not answered yet.

        Raises Transient as `poll` does, and any other error of `look`.
        """
        outages: list[Transient] = []
        for _ in self.poll(lambda: what() + (f"; the store: {outages[-1]}" if outages else "")):
            try:
                found = look()
            except Transient as error:
                if not outages:
                    log.warning("waiting on for %s, although the store does not answer: %s", what(), error)
                outages.append(error)
                continue
            outages.clear()
            if found is not None:
                return found
        raise AssertionError("poll ends by an error only")


def put_receipt(store: ObjectStore, attempt: Attempt, receipt: Receipt) -> None:
    """Publish what this rank wrote, or why it failed."""
    store.put(attempt.prefix + layout.receipt_name(attempt.id, receipt.rank), [dump_receipt(receipt)], if_absent=True)


def await_receipts(store: ObjectStore, attempt: Attempt, patience: Patience, claim: Claim) -> list[Receipt]:
    """Every rank's receipt, by rank.

    Raises:
        Fenced: another process owns the run now; it may have removed the receipts.
        StorageError: a rank reported a failure; the message names it.
        Transient: a receipt did not come in time; the message says whose.
    """
    receipts: dict[int, Receipt] = {}
    folder = attempt.prefix + layout.attempt_folder(attempt.id) + "/"

    def missing() -> str:
        ranks = [str(rank) for rank in range(attempt.world_size) if rank not in receipts]
        more = f" and {len(ranks) - _NUM_RANKS_SHOWN} more" if len(ranks) > _NUM_RANKS_SHOWN else ""
        return f"the receipts of ranks {', '.join(ranks[:_NUM_RANKS_SHOWN])}{more}"

    def look() -> list[Receipt] | None:
        for info in store.list(folder + "receipt-"):
            rank = layout.parse_receipt(info.key.removeprefix(folder))
            if rank is None or rank in receipts:
                continue
            receipt = read_checked(store, info.key, functools.partial(load_receipt, name=info.key))
            if receipt.error is not None:
                raise StorageError(f"rank {rank} failed: {receipt.error}")
            if (receipt.rank, receipt.attempt) != (rank, attempt.id):
                raise Corrupt(f"{info.key} is the receipt of another rank or attempt")
            receipts[rank] = receipt
        if len(receipts) == attempt.world_size:
            return [receipts[rank] for rank in range(attempt.world_size)]
        claim.check()
        return None

    return patience.until(missing, look)


def check_objects(store: ObjectStore, attempt: Attempt, objects: Sequence[ObjectEntry]) -> None:
    """Compare what the ranks say with what the store has. Raises Corrupt."""
    folder = attempt.prefix + layout.attempt_folder(attempt.id) + "/"
    listed = {info.key.removeprefix(attempt.prefix): info for info in store.list(folder)}
    catalog.check_objects(store, attempt.prefix, objects, listed)


def build_manifest(
    attempt: Attempt, origin: Origin, contents: Contents, receipts: Sequence[Receipt], created_unix_s: float
) -> tuple[Manifest, bytes]:
    """The manifest that joins the receipts, and the `.metadata` it commits with. Pure."""
    from storage.dcp_pickle import dump_metadata

    objects = [entry for receipt in receipts for entry in receipt.objects]
    ends = list(itertools.accumulate((len(receipt.objects) for receipt in receipts), initial=0))
    draft = Manifest(
        step=attempt.step,
        attempt=attempt.id,
        created_unix_s=created_unix_s,
        world_size=attempt.world_size,
        generation=origin.generation,
        lineage=origin.lineage,
        mesh=origin.mesh,
        metadata_size_bytes=0,
        metadata_crc32c=0,
        objects=tuple(objects),
        tensors=contents.tensors,
        values=contents.values,
        items=ItemTable.join([receipt.items for receipt in receipts], ends[:-1]),
    )
    metadata = dump_metadata(of_manifest(attempt.prefix, draft), attempt.id)
    sums = {"metadata_size_bytes": len(metadata), "metadata_crc32c": crc32c(metadata)}
    return draft.model_copy(update=sums), metadata


def publish(store: ObjectStore, attempt: Attempt, manifest: Manifest, metadata: bytes, claim: Claim | None) -> None:
    """Make the checkpoint visible. `claim`: this process's claim on the run; None where nobody claims it.

    Raises:
        Fenced: another process owns the run now.
        AlreadyExists: the step is committed already.
        Corrupt: what is read back is not what was written.
        Unconfirmed: `.metadata` was put, but the store does not answer any more.
        Transient, Denied: by the store, before anything was visible.
    """
    if claim is not None:
        claim.check()
    manifest_key, metadata_key = attempt.prefix + layout.manifest_name(attempt.id), attempt.prefix + layout.METADATA
    if catalog.is_checkpoint(store, attempt.prefix):
        raise quarantine.taken(store, attempt.prefix)
    manifest_bytes = dump_manifest(manifest)
    with contextlib.suppress(AlreadyExists):  # a copy that was killed has put it (see `storage.copying`)
        store.put(manifest_key, [manifest_bytes], if_absent=True)
    found = _read_back(store, manifest_key, manifest_bytes)
    if found != manifest_bytes and claim is None and not catalog.is_checkpoint(store, attempt.prefix):
        # half of it, or damaged: nobody but copies of this very checkpoint puts it, and none has committed
        log.warning("%s at %s is not what it must be; it is put again", manifest_key, store.url)
        store.put(manifest_key, [manifest_bytes])
        found = _read_back(store, manifest_key, manifest_bytes)
    if found != manifest_bytes:
        raise Corrupt(f"{manifest_key} is not what was written")
    # plain put: here may lie what a dead attempt left, and nobody relies on it (see `catalog.find_manifest`)
    store.put(attempt.prefix + layout.MANIFEST, [manifest_bytes])
    put_metadata(store, attempt.prefix, metadata, claim)
    _insist(lambda: _check_still_there(store, attempt, manifest.objects, metadata), metadata_key)


def put_metadata(store: ObjectStore, prefix: str, metadata: bytes, claim: Claim | None = None) -> None:
    """Put the `.metadata` of `prefix`, and believe what is read back more than how the put was answered.

    For a copy (no `claim`), what was set aside stays so as long as the marker that says it is there: a copy puts the
    same bytes again. No save does, as its objects have names of their own.

    Raises Fenced, AlreadyExists, Corrupt, Unconfirmed, Transient, Denied, as `publish`.
    """
    key = prefix + layout.METADATA
    if claim is None and quarantine.lies_set_aside(store, prefix, metadata):
        return
    aside = quarantine.make_way(store, prefix)
    replaces = aside is not None and quarantine.may_replace(store, aside, claim)
    doubt: StorageError | None = None
    try:
        store.put(key, [metadata], if_absent=not replaces)
    except (AlreadyExists, Transient) as error:
        doubt = error  # it may be there all the same: answered late, and tried again below us
    found = _insist(lambda: _read_back(store, key, metadata), key)
    if found == metadata:
        return
    if doubt is None:
        raise Corrupt(f"{key} was overwritten by another process while it was committed")
    if found is None:
        raise doubt
    raise quarantine.taken(store, prefix)


def _read_back(store: ObjectStore, key: str, expected: bytes) -> bytes | None:
    """The object, or None. What differs counts when it is read twice: the way to here may have damaged it."""
    found = read_if_there(store, key)
    return found if found == expected else read_if_there(store, key)


def _insist(call: Callable[[], T], key: str) -> T:
    """What `call` returns, tried again for some seconds. Raises Unconfirmed.

    After `.metadata` was put an outage must not turn a commit, which others see, into a failure.
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


def _check_still_there(store: ObjectStore, attempt: Attempt, objects: Sequence[ObjectEntry], metadata: bytes) -> None:
    """A `.metadata` just put that commits nothing any more goes again. Raises Fenced.

    A newer owner cleans up the attempts of its forerunners, and one of them may have been paused between its last look
    at the owner and its `.metadata`. Its claim came before the cleaning and the cleaning before this look, or it has
    seen the `.metadata` and spares the attempt.
    """
    try:
        check_objects(store, attempt, objects)
    except Corrupt as error:
        quarantine.withdraw(store, attempt.prefix, metadata)
        raise Fenced(f"a newer owner of the run has cleaned this attempt up: {error}") from None


def put_aborted(store: ObjectStore, attempt: Attempt, reason: str) -> None:
    """Tell the other ranks that the attempt will not be committed."""
    note = Aborted(attempt=attempt.id, reason=reason)
    store.put(attempt.prefix + layout.aborted_name(attempt.id), [dump_aborted(note)])


def await_outcome(store: ObjectStore, attempt: Attempt, patience: Patience) -> None:
    """Return when the coordinator has committed the attempt.

    Raises:
        StorageError: it was aborted; the message is the coordinator's reason.
        Transient: nothing was heard in time.
    """
    aborted_key = attempt.prefix + layout.aborted_name(attempt.id)

    def look() -> bool | None:
        try:
            raise StorageError(read_checked(store, aborted_key, lambda data: load_aborted(data, aborted_key)).reason)
        except NotFound:
            return _is_committed(store, attempt) or None

    patience.until(lambda: "the coordinator to commit", look)


def _is_committed(store: ObjectStore, attempt: Attempt) -> bool:
    """Whether it is this attempt that the step's `.metadata` commits."""
    manifest_key = attempt.prefix + layout.manifest_name(attempt.id)
    if not exists(store, attempt.prefix + layout.METADATA):
        return False
    try:
        metadata = store.read(attempt.prefix + layout.METADATA)
        return catalog.commits(metadata, read_checked(store, manifest_key, load_manifest))
    except NotFound:
        return False
