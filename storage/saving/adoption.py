"""Which saves of a job's dead workers are still going to be committed, by the services of its nodes.

Whoever claims the run next asks its nodes' services what they hold, and adopts in its claim what is whole: the claim of
the dead is superseded in all but these attempts (`storage.run.owner`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from storage.errors import StorageError, Transient
from storage.format import layout
from storage.ranks.group import COORDINATOR
from storage.run.attempt import Attempt
from storage.saving import receipts
from storage.saving.receipts import Patience
from storage.stores.objects import ObjectStore

log = logging.getLogger(__name__)

SETTLE_S = 60.0
"""So long a restore waits for attempts that were adopted: what they commit is newer than what it would find."""


@dataclass(frozen=True, slots=True)
class UnfinishedPart:
    """One rank's part of an attempt, which a service has not brought to its end."""

    prefix: str
    step: int
    id: str
    world_size: int
    rank: int

    @property
    def attempt(self) -> Attempt:
        """Of which it is a part."""
        return Attempt(self.prefix, self.step, self.id, self.world_size)


FindHeld = Callable[[], Sequence[UnfinishedPart]]
"""Asks the service of this node."""

_parts = TypeAdapter(tuple[UnfinishedPart, ...])


def dump_parts(find: FindHeld) -> bytes:
    """JSON of what this node's service holds, for the way to the coordinator. Never raises."""
    try:
        return _parts.dump_json(tuple(find()))
    except Exception as error:  # noqa: BLE001 - without an answer nothing is adopted, as if there were no service
        log.warning("the checkpoint service does not tell what it still has to store: %s", error)
        return _parts.dump_json(())


def load_parts(dumped: Iterable[bytes]) -> set[UnfinishedPart]:
    """What all of them hold. Pure."""
    return {part for data in dumped for part in _parts.validate_json(data)}


def missing_ranks(parts: Collection[UnfinishedPart]) -> dict[Attempt, set[int]]:
    """By attempt that somebody can commit, whose parts no service holds. Pure."""
    ranks = defaultdict[Attempt, set[int]](set)
    for part in parts:
        ranks[part.attempt].add(part.rank)
    return {attempt: set(range(attempt.world_size)) - held for attempt, held in ranks.items() if COORDINATOR in held}


def adoptable(store: ObjectStore, parts: Collection[UnfinishedPart]) -> list[Attempt]:
    """Attempts of which every part is held, or stored already, by step."""
    found = []
    for attempt, missing in missing_ranks(parts).items():
        if missing:
            folder = attempt.prefix + layout.attempt_folder(attempt.id) + "/"
            names = (info.key.removeprefix(folder) for info in store.list(folder + "receipt-"))
            missing = missing - {layout.parse_receipt(name) for name in names}
        if not missing:
            found.append(attempt)
        else:
            log.warning("step %d is lost with rank %d, which had staged it", attempt.step, min(missing))
    return sorted(found, key=lambda attempt: (attempt.step, attempt.id))


def settle(store: ObjectStore, adopted: Sequence[Attempt], patience_s: float | None = None) -> bool:
    """Wait until the newest of the adopted attempts has been committed, or given up. Whether it may yet be committed:
    it has taken too long.
    """
    patience_s = SETTLE_S if patience_s is None else patience_s
    patience = Patience(time.monotonic() + patience_s, threading.Event())
    for attempt in adopted[-1:]:
        try:
            receipts.await_outcome(store, attempt, patience)
        except StorageError as error:
            log.warning("step %d, which workers that are gone had saved, is not committed: %s", attempt.step, error)
            return isinstance(error, Transient)
    return False
