"""Which state a restore goes on from: the newest good checkpoint of the store, or a newer one in memory of nodes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from storage.errors import Corrupt, NoCheckpoint, OnlyUnhealthy, StorageError, Transient
from storage.events import CheckpointEvent, Reporter
from storage.format import layout
from storage.format.index import Index
from storage.loading.memory_tier import HeldIndex, MemoryTier
from storage.parallel import Pool
from storage.run import catalog, quarantine
from storage.run.owner import Claim
from storage.stores.objects import ObjectInfo, ObjectStore

_STORE_S = 5.0
"""A store that says nothing for so long is away, as far as a state in memory is concerned."""


@dataclass(frozen=True)
class Settling:
    """No state yet: what services still store has to be waited for, so nothing may keep them from it."""

    def dump(self) -> bytes:
        """Bytes for the way to the other ranks."""
        return b""


def load_choice(data: bytes) -> HeldIndex | Settling:
    """What either has dumped."""
    return HeldIndex.load(data) if data else Settling()


Candidate = tuple[int, ObjectInfo]
"""A step, and the version of its `.metadata`."""


class Adopted(Protocol):
    """Saves of this job's dead workers that are still going to be committed, by those who hold them."""

    @property
    def adopted_step(self) -> int:
        """The newest of them; -1 if there is none."""

    def await_look(self) -> None:
        """Wait until it is known that no other job has the run, where that is being found out. Raises InUse."""

    def await_claim(self) -> None:
        """Wait until the run is claimed, where that is being done. Raises InUse, Fenced."""

    def settle(self) -> None:
        """Wait until they are committed, or given up."""


class Chooser:
    """Chooses for the coordinator, and remembers what it has looked at. For one thread.

    Without a `claim` nothing is written: a damaged checkpoint is passed over, and stays as it is. What was `adopted` is
    waited for, unless memory has a state that is as new.
    """

    def __init__(
        self, store: ObjectStore, claim: Claim | None, report: Reporter, adopted: Adopted | None = None
    ) -> None:
        self._store = store
        self._impatient: ObjectStore | None = None
        self._claim = claim
        self._report = report
        self._adopted = adopted
        self.version: ObjectInfo | None = None
        """Of the `.metadata` that is read from."""
        self._told: set[ObjectInfo] = set()  # damaged, and left where they are
        self._ahead: Future[Candidate | None] | None = None

    def look_ahead(self) -> None:
        """Look for the store's newest checkpoint on a thread, while nodes are asked what they hold."""
        asked, pool = self._asked, Pool(1, thread_name_prefix="storage-newest")
        self._ahead = pool.submit(lambda: next(catalog.candidates(asked), None))
        pool.shutdown(wait=False)

    def choose(
        self,
        tier: MemoryTier | None,
        damaged: Mapping[int, str],
        lost: Collection[str],
        *,
        unhealthy: bool,
        way_free: bool = True,
    ) -> HeldIndex | Settling | None:
        """The state to go on from: one in memory if it is newer than the store's newest.

        `damaged`: the steps of the store that were tried, and why they are no good. `lost`: attempts in memory of which
        bytes turned out not to be had. `way_free`: services store meanwhile; else Settling is the answer where what
        they store is waited for.
        """
        if damaged or lost:
            self._ahead = None  # that was a while ago
        if self._adopted is not None:
            self._adopted.await_look()
        found = self._newest_held(tier, damaged, lost, unhealthy=unhealthy)
        if self._adopted is not None and self._adopted.adopted_step > (-1 if found is None else found.index.step):
            if not way_free:
                return Settling()
            self._adopted.settle()
            self._ahead = None
            found = self._newest_held(tier, damaged, lost, unhealthy=unhealthy)
        if found is not None:
            return found
        index = self.newest(damaged, unhealthy=unhealthy)
        return None if index is None else HeldIndex(index)

    def newest(self, damaged: Mapping[int, str], *, unhealthy: bool) -> Index | None:
        """The store's newest checkpoint whose parts fit together; None if the run has no checkpoint at all.

        Those that were saved as unhealthy are passed over, unless `unhealthy` takes them as well.
        """
        reasons = list(damaged.values())
        passed_over: list[int] = []
        for step, version in self._candidates(self._store):
            if step in damaged:
                continue
            self.version = version
            try:
                index = catalog.open_checkpoint(self._store, layout.step_folder(step) + "/")
                if not index.healthy and not unhealthy:
                    passed_over.append(step)
                    continue
                if passed_over:
                    self._report(CheckpointEvent.PASSED_OVER, step=step, passed_over=passed_over, reason="unhealthy")
                return index
            except NoCheckpoint:
                continue  # set aside, or removed since it was listed
            except Corrupt as error:
                self.set_aside(step, version, str(error))
                reasons.append(str(error))
        if passed_over:
            raise OnlyUnhealthy(
                f"no healthy checkpoint is left in {self._store.url}: those of steps {', '.join(map(str, passed_over))}"
                " were saved as unhealthy; restore(..., unhealthy=True) takes the newest of them, or start anew at"
                " another URL" + (f" ({reasons[0]})" if reasons else "")
            )
        if reasons:
            raise Corrupt(f"no good checkpoint is left in {self._store.url}: {reasons[0]}")
        if aside := catalog.quarantined_steps(self._store):
            raise Corrupt(
                f"every checkpoint in {self._store.url} is damaged and was set aside (steps"
                f" {', '.join(map(str, aside))}); start anew at another URL, or remove them"
            )
        return None

    def set_aside(self, step: int, version: ObjectInfo, reason: str) -> None:
        """Quarantine. Raises Fenced: what a newer owner has saved is not this process's to judge."""
        if self._claim is None:
            if version not in self._told:
                self._told.add(version)
                self._report(CheckpointEvent.DAMAGED, step=step, reason=reason)
            return
        if self._adopted is not None:
            self._adopted.await_claim()  # or the look at the owner claims the run, and adopts nothing
        self._claim.check()
        if quarantine.set_aside(self._store, version):
            self._report(CheckpointEvent.QUARANTINED, step=step, reason=reason)

    def _newest_held(
        self, tier: MemoryTier | None, damaged: Mapping[int, str], lost: Collection[str], *, unhealthy: bool
    ) -> HeldIndex | None:
        """The newest state in memory, unless the store has a newer one; if it does not answer, that is not known."""
        if tier is None or not tier.states:
            return None
        stored, away = None, None
        try:
            stored = tier.find_stored(self._asked, self._candidates(self._asked), damaged, unhealthy=unhealthy)
        except Transient as error:
            away = str(error)
        worn_out = tier.worn_out if stored is not None else []
        found = tier.newest(stored, {*lost, *worn_out}, self._report, unhealthy=unhealthy)
        if found is not None and away is not None:
            self._report(CheckpointEvent.STORE_UNASKED, step=found.index.step, reason=away)
        return found

    @property
    def _asked(self) -> ObjectStore:
        if self._impatient is None:
            self._impatient = self._store.impatient(_STORE_S)
        return self._impatient

    def _candidates(self, store: ObjectStore) -> Iterator[Candidate]:
        """The store's checkpoints, newest first; the first one may have been looked for already."""
        first = None
        if self._ahead is not None:
            try:
                first = self._ahead.result()
            except StorageError:
                self._ahead = None
                if store is self._asked:  # which would say the same again, after as long
                    raise
            else:
                if first is None:
                    return
                yield first
        yield from (row for row in catalog.candidates(store) if first is None or row[0] != first[0])
