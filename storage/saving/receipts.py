"""How the ranks of a save meet in the store: their receipts go to the coordinator, and its outcome comes back.

Nothing here needs a collective, and it may run while the training uses the process group.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from storage.errors import Corrupt, NotFound, StorageError, Transient
from storage.format import layout
from storage.format.checksum import crc32c
from storage.format.manifest import (
    HEAD_SIZE_BYTES,
    Aborted,
    Head,
    Receipt,
    dump_aborted,
    dump_receipt,
    load_aborted,
    load_head,
    load_manifest,
    load_receipt,
)
from storage.parallel import run_concurrently
from storage.run.attempt import Attempt
from storage.run.owner import Claim
from storage.stores.objects import ObjectInfo, ObjectStore, parts_of_size
from storage.verified.twice import read_document

_POLL_S_MIN = 0.02
_POLL_S_MAX = 2.0
_NUM_RANKS_SHOWN = 8
_NUM_AT_ONCE = 16
_PART_SIZE_BYTES = 8 * 1024 * 1024
"""How much of `.metadata`, and of receipts, is in memory at once: the training needs its memory for itself."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class PartFailed(StorageError):
    """A rank has said that its part is not stored, by a receipt that nobody replaces: nobody can commit the attempt."""


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
        """What `look` finds at last, called at the intervals of `poll`. A store that is away has found nothing yet.

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


def find_receipt(store: ObjectStore, attempt: Attempt, rank: int) -> Receipt | None:
    """The receipt that says that the rank's part is stored, if there is one."""
    key = attempt.prefix + layout.receipt_name(attempt.id, rank)
    try:
        receipt = _read_receipt(store, key)
    except (NotFound, Corrupt):
        return None
    is_good = receipt.error is None and (receipt.rank, receipt.attempt) == (rank, attempt.id)
    return receipt if is_good else None


def await_receipts(store: ObjectStore, attempt: Attempt, patience: Patience, claim: Claim) -> list[Receipt]:
    """Every rank's receipt, by rank.

    Raises:
        Fenced: another process owns the run now; it may have removed the receipts.
        PartFailed: a rank reported a failure; the message names it.
        Transient: a receipt did not come in time; the message says whose.
    """
    receipts: dict[int, Receipt] = {}
    folder = attempt.prefix + layout.attempt_folder(attempt.id) + "/"

    def missing() -> str:
        ranks = [str(rank) for rank in range(attempt.world_size) if rank not in receipts]
        more = f" and {len(ranks) - _NUM_RANKS_SHOWN} more" if len(ranks) > _NUM_RANKS_SHOWN else ""
        return f"the receipts of ranks {', '.join(ranks[:_NUM_RANKS_SHOWN])}{more}"

    def look() -> list[Receipt] | None:
        listed = [
            (layout.parse_receipt(info.key.removeprefix(folder)), info) for info in store.list(folder + "receipt-")
        ]
        fresh = {info.key: rank for rank, info in listed if rank is not None and rank not in receipts}
        for batch in batches([info for _, info in listed if info.key in fresh]):
            try:
                found = run_concurrently([functools.partial(_read_receipt, store, info.key) for info in batch])
            except NotFound:
                claim.check()
                raise
            for info, receipt in zip(batch, found, strict=True):
                rank = fresh[info.key]
                if receipt.error is not None:
                    raise PartFailed(f"rank {rank} failed: {receipt.error}")
                if (receipt.rank, receipt.attempt) != (rank, attempt.id):
                    raise Corrupt(f"{info.key} is the receipt of another rank or attempt")
                receipts[rank] = receipt
        if len(receipts) == attempt.world_size:
            return [receipts[rank] for rank in range(attempt.world_size)]
        claim.check()
        return None

    return patience.until(missing, look)


def batches(infos: Sequence[ObjectInfo]) -> list[Sequence[ObjectInfo]]:
    """What is read at once of objects, in order: some of them, of some MiB in sum, or one that is larger. Pure."""
    found, start, size_bytes = list[Sequence[ObjectInfo]](), 0, 0
    for number, info in enumerate(infos):
        if number - start == _NUM_AT_ONCE or (number > start and size_bytes + info.size_bytes > _PART_SIZE_BYTES):
            found.append(infos[start:number])
            start, size_bytes = number, 0
        size_bytes += info.size_bytes
    return [*found, infos[start:]] if infos else []


def _read_receipt(store: ObjectStore, key: str) -> Receipt:
    return read_document(store, key, functools.partial(load_receipt, name=key))


def put_aborted(store: ObjectStore, attempt: Attempt, reason: str) -> None:
    """Tell the other ranks that the attempt will not be committed."""
    note = Aborted(attempt=attempt.id, reason=reason)
    store.put(attempt.prefix + layout.aborted_name(attempt.id), [dump_aborted(note)])


def check_not_aborted(store: ObjectStore, attempt: Attempt) -> None:
    """Raise StorageError, with the coordinator's reason, if it has told the other ranks that it gave the attempt up."""
    key = attempt.prefix + layout.aborted_name(attempt.id)
    with contextlib.suppress(NotFound):
        raise StorageError(read_document(store, key, lambda data: load_aborted(data, key)).reason)


def await_outcome(store: ObjectStore, attempt: Attempt, patience: Patience) -> None:
    """Return when the coordinator has committed the attempt.

    Raises:
        StorageError: it was aborted; the message is the coordinator's reason.
        Transient: nothing was heard in time.
    """

    def look() -> bool | None:
        check_not_aborted(store, attempt)
        return _is_committed(store, attempt) or None

    patience.until(lambda: "the coordinator to commit", look)


def committed_bytes(store: ObjectStore, attempt: Attempt) -> int | None:
    """The size of the attempt's data objects if it is committed, else None."""
    if not _is_committed(store, attempt):
        return None
    key = attempt.prefix + layout.manifest_name(attempt.id)
    return read_document(store, key, functools.partial(load_manifest, name=key)).size_bytes


def _is_committed(store: ObjectStore, attempt: Attempt) -> bool:
    """Whether it is this attempt that the step's `.metadata` commits, every byte of it.

    All ranks but the coordinator ask, each of them beside its training: the manifest may have hundreds of thousands of
    entries, and only its head is fetched and parsed.
    """
    try:
        info = store.info(attempt.prefix + layout.METADATA)
        head = _read_head(store, attempt.prefix + layout.manifest_name(attempt.id))
        if info.size_bytes != head.metadata_size_bytes:
            return False
        return _crc32c_of(store, info.key, info.size_bytes) == head.metadata_crc32c
    except NotFound:
        return False


def _read_head(store: ObjectStore, key: str) -> Head:
    """Raises NotFound, Corrupt, UsageError."""
    buffer = bytearray(min(HEAD_SIZE_BYTES, store.info(key).size_bytes))
    store.read_into(key, 0, [memoryview(buffer)])
    # what does not reach far enough, or is of another version or damaged, is for the whole document to tell
    return load_head(bytes(buffer)) or Head.of(read_document(store, key, functools.partial(load_manifest, name=key)))


def _crc32c_of(store: ObjectStore, key: str, size_bytes: int) -> int | None:
    """The CRC32C of an object, read in parts; None, or one that fits nothing, if it is replaced meanwhile."""
    buffer, crc = memoryview(bytearray(min(size_bytes, _PART_SIZE_BYTES))), 0
    for offset, length in parts_of_size(size_bytes, _PART_SIZE_BYTES):
        try:
            store.read_into(key, offset, [buffer[:length]])
        except Corrupt:  # it is shorter by now
            return None
        crc = crc32c(buffer[:length], crc)
    return crc
