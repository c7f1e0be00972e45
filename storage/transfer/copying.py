"""Copy committed checkpoints from one store to another.

    data objects, several at once and in parts, each part compared with the checksums there are before it is sent
    -> the source's `.metadata` looked at once more -> sizes compared -> `commit.publish`, as every save ends

So whoever reads the target sees a checkpoint whole or not at all, and a copy that was killed is taken up by the next
one: an object that is there counts if every byte of it is right. The order, and that nothing is overwritten that is
committed, are those of `saving.commit`. A checkpoint of stock DCP has only the checksums that its zips hold: what does
not fit them when it is read twice is copied as it is, and what is at the target already is compared byte by byte.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace

from storage.errors import AlreadyExists, Corrupt, NotFound, StorageError
from storage.format import layout
from storage.format.manifest import ObjectEntry
from storage.parallel import Pool, run_all
from storage.run import catalog, garbage
from storage.run.attempt import Attempt
from storage.saving import commit
from storage.stores.objects import ObjectStore, parts_of_size
from storage.transfer import copy_jobs
from storage.transfer.copy_jobs import CopyContents, CopyJob, CopyState, Found, Outcome
from storage.transfer.copyplan import DataObject
from storage.transfer.verified_read import Advance, VerifiedRead
from storage.verified.source import Source
from storage.verified.twice import read_expected, read_verified
from storage.verified.verifiers import BlockVerifier, Verifier

log = logging.getLogger(__name__)

_Open = Callable[..., VerifiedRead]
"""Begins a pass over one object; takes `advance`."""

NUM_OBJECTS_AT_ONCE = 4
NUM_PARTS_AT_ONCE = 16
"""Of all objects together: they hold 16 MiB each, more where the target wants larger parts."""

ABANDONED_AGE_S = 24 * 3600.0
"""An unfinished upload of this age has nobody who works on it, as `ckpt gc` takes it."""


class Copier:
    """Copies what `copy_jobs.look` has found.

    `advance` is told of bytes, from any thread; fewer, where some must go again.
    `now_unix_s` is when it begins: what others have begun long before it is given up for dead.
    """

    def __init__(
        self, source: ObjectStore, target: ObjectStore, now_unix_s: float, advance: Advance = lambda num_bytes: None
    ) -> None:
        self._source = source
        self._target = target
        self._now_unix_s = now_unix_s
        self._advance = advance
        self._stop = threading.Event()

    def copy(self, found: Found) -> Outcome:
        """Copy one checkpoint and commit it. Damage is in the outcome, and not raised.

        Raises:
            UsageError: meanwhile the target got another checkpoint there.
            StorageError: something is gone from the target that was just there, or nothing can be created there.
            Fenced: a job at the target has removed what was copied, before it was committed.
            Transient, Denied, Unconfirmed: by a store.
        """
        job = found.job
        # another copy may have committed it since it was looked for: nothing is rewritten below its readers
        if (outcome := copy_jobs.present_already(self._target, found)) is not None:
            return outcome
        contents = copy_jobs.find(self._source, job)
        if isinstance(contents, Outcome):
            return contents
        if contents.found.metadata != found.metadata:
            return copy_jobs.removed(job)
        contents = replace(contents, found=found)
        try:
            sent = self._copy_objects(contents)
            if self._is_replaced(job, found.metadata):
                return copy_jobs.removed(job)
            try:
                self._publish(contents)
            except AlreadyExists:
                # by another copy that was faster, or it was set aside here, and its objects are whole again
                key = job.target_prefix + layout.METADATA
                if (there := read_expected(self._target, key, found.metadata)) is None:
                    raise NotFound(f"{key} is gone") from None
                outcome = copy_jobs.present(self._target, found, there)
                if outcome.state is not CopyState.PRESENT:
                    return outcome
        except Corrupt as error:
            if self._is_replaced(job, found.metadata):
                return copy_jobs.removed(job)
            return Outcome(job.folder, job.step, CopyState.DAMAGED, str(error))
        except NotFound as error:  # what lacks in the source is Corrupt
            raise StorageError(
                f"{job.folder or 'the checkpoint'} cannot be written to {self._target.url}: {error}; nothing can be "
                "created there, or another program works on it at the same time"
            ) from error
        sizes = [entry.size_bytes for entry in found.objects]
        sent_bytes = sum(size for size, was_sent in zip(sizes, sent, strict=True) if was_sent)
        num_sent, present_bytes = sum(sent), sum(sizes) - sent_bytes
        return Outcome(
            job.folder, job.step, CopyState.COPIED, "", num_sent, len(sent) - num_sent, sent_bytes, present_bytes
        )

    def _is_replaced(self, job: CopyJob, metadata: bytes) -> bool:
        return read_expected(self._source, job.source_prefix + layout.METADATA, metadata) != metadata

    def _copy_objects(self, contents: CopyContents) -> list[bool]:
        """For each object whether it was sent. The first failure ends all, and is raised."""
        self._stop.clear()
        failures: list[BaseException] = []

        def ensure(number: int, parts: Executor) -> bool:
            try:
                return self._ensure(contents, number, parts)
            except BaseException as error:
                failures.append(error)
                self._stop.set()
                raise

        with (
            Pool(NUM_PARTS_AT_ONCE, thread_name_prefix="storage-copy-part") as parts,
            Pool(NUM_OBJECTS_AT_ONCE, thread_name_prefix="storage-copy") as pool,
        ):
            try:
                self._abort_uploads(contents.found)
                numbers = range(len(contents.found.objects))
                return run_all(pool, [functools.partial(ensure, number, parts) for number in numbers])
            except StorageError:
                if failures:
                    raise failures[0] from None  # the others failed because they were stopped
                raise
            finally:
                self._stop.set()  # after an interrupt as well, what is under way ends with its next part

    def _abort_uploads(self, found: Found) -> None:
        """Parts that a killed copy has left would cost money for ever: nobody can go on with its uploads.

        Younger ones may be of another copy that is under way.
        """
        keys = {found.job.target_prefix + entry.name for entry in found.objects}
        uploads = [upload for upload in self._target.uploads() if upload.key in keys]
        for old in garbage.of_uploads(uploads, self._now_unix_s - ABANDONED_AGE_S):
            garbage.remove(self._target, old)
            log.info("removed the parts of an upload of %s that was not finished", old.name)

    def _ensure(self, contents: CopyContents, number: int, parts: Executor) -> bool:
        """See to it that the object is at the target; whether it had to be sent."""
        job, entry = contents.found.job, contents.found.objects[number]
        source_key, target_key = job.source_prefix + entry.name, job.target_prefix + entry.name
        has_sums = contents.checksums is not None
        verifier = self._verifier_of(contents, number)

        def ours(advance: Advance, *, is_verified: bool = True) -> VerifiedRead:
            judge = verifier(source_key) if is_verified else None
            return VerifiedRead(self._source, source_key, entry.size_bytes, judge, advance, self._stop, is_owed=True)

        def theirs(advance: Advance) -> VerifiedRead:
            judge = verifier(target_key) if has_sums else None
            return VerifiedRead(self._target, target_key, entry.size_bytes, judge, advance, self._stop, is_owed=False)

        is_candidate = contents.found.sizes_there.get(entry.name) == entry.size_bytes
        if is_candidate and self._is_there(entry, target_key, theirs, None if has_sums else ours, parts):
            return False
        try:
            read_verified(self._source, source_key, lambda: self._send(entry, target_key, ours, parts))
        except Corrupt as error:
            if has_sums:
                raise
            # stock DCP lets planners store what is no zip, too
            log.warning("%s; it is copied as it is", error)
            self._send(entry, target_key, functools.partial(ours, is_verified=False), parts)
        return True

    def _verifier_of(self, contents: CopyContents, number: int) -> Callable[[str], Verifier | None]:
        """What makes a verifier for one pass over data object `number`, under the key that it is given."""
        if contents.checksums is not None:
            sums = contents.checksums.blocks(number)
            return lambda key: BlockVerifier(key, sums)
        index = contents.index
        if index is None or index.transforms:
            return lambda key: None
        return lambda key: Source(self._source, index).object_verifier(number)

    def _is_there(self, entry: DataObject, key: str, theirs: _Open, ours: _Open | None, parts: Executor) -> bool:
        """Whether every byte of what lies at the target is right: by its checksums, or else compared with `ours`."""
        try:
            there = theirs(self._advance)
        except NotFound:
            return False  # removed since it was listed
        original = None if ours is None else ours(lambda num_bytes: None)

        def same(offset: int, length: int) -> bool:
            found = there.fetch(offset, length)
            return original is None or found == original.fetch(offset, length)

        try:
            if all(run_all(parts, [functools.partial(same, *part) for part in parts_of_size(entry.size_bytes)])):
                return True
        except (Corrupt, NotFound) as error:
            log.warning("%s at the target is sent again: %s", key, error)
        there.take_back()
        return False

    def _send(self, entry: DataObject, key: str, ours: _Open, parts: Executor) -> None:
        """Raises Corrupt for what the source lacks, and NotFound for what the target does."""
        read = ours(self._advance)
        try:
            self._target.put_from(key, entry.size_bytes, read.fetch, parts)
        except BaseException:
            read.take_back()
            raise

    def _publish(self, contents: CopyContents) -> None:
        """Commit what was copied. Raises AlreadyExists, Corrupt."""
        found, manifest = contents.found, contents.manifest
        prefix = found.job.target_prefix
        if manifest is None:
            listed = {info.key.removeprefix(prefix): info for info in self._target.list(prefix)}
            entries = [ObjectEntry(name=entry.name, size_bytes=entry.size_bytes, etag="") for entry in found.objects]
            catalog.check_objects(self._target, prefix, entries, listed)
            commit.put_metadata(self._target, prefix, found.metadata)
        else:
            attempt = Attempt(prefix, manifest.step, manifest.attempt, manifest.world_size)
            commit.publish(self._target, attempt, manifest, found.metadata, claim=None)
        # what was found damaged here is whole again; last, so that whoever dies before this leaves it set aside
        self._target.delete(prefix + layout.quarantined_name(found.metadata))
