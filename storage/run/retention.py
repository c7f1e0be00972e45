"""Which checkpoints and left-overs to remove. The decision is pure; `clean` carries it out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from storage.errors import Corrupt, NotFound
from storage.format import layout
from storage.run.catalog import find_manifest, steps
from storage.run.owner import Claim
from storage.stores.objects import Capability, ObjectStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepState:
    """What a step's folder holds.

    `attempt`: the committed one; None without a commit, for stock DCP, and where the manifest is damaged.
    """

    step: int
    committed: bool
    quarantined: bool
    attempt: str | None
    attempts: frozenset[str]
    metadata: bytes | None = field(default=None, repr=False)
    """The content of its `.metadata`."""
    healthy: bool = True
    """Whether a restore may take it: neither saved as unhealthy, nor with a damaged manifest."""


@dataclass(frozen=True)
class Removal:
    """What to delete of a step: the named attempts, or everything (`attempts` is None)."""

    step: int
    attempts: frozenset[str] | None


@dataclass(frozen=True)
class Cleaned:
    """What was removed, and the committed steps beyond the one just saved: a restore takes the newest of them."""

    removals: Sequence[Removal]
    newer_steps: tuple[int, ...]


def newer_steps(states: Iterable[StepState], saved_step: int) -> tuple[int, ...]:
    """Committed steps beyond `saved_step` that a restore may take, in order. Pure."""
    found = (state.step for state in states if state.committed and state.healthy and state.step > saved_step)
    return tuple(sorted(found))


def choose_kept(states: Iterable[StepState], keep: int) -> set[int]:
    """The committed steps that stay: the newest `keep`, and the newest `keep` of the healthy ones. Pure.

    So unhealthy ones push out no healthy one, and there are never more of both than twice `keep`.
    """
    committed = sorted((state.step, state.healthy) for state in states if state.committed)
    healthy = [step for step, is_healthy in committed if is_healthy]
    return {step for step, _ in committed[-keep:]} | set(healthy[-keep:])


def decide(
    states: Iterable[StepState], keep: int, live_attempts: Collection[str], saved_step: int | None = None
) -> list[Removal]:
    """What may go, oldest step first.

    The committed steps of `choose_kept` stay, and `saved_step`, the one that was just committed, wherever it is in the
    order. Of other committed steps and of all that are older than those kept everything goes, unless an attempt in it
    is live. Of the rest only attempts that are
    neither committed nor live go: they belong to an owner of an older epoch, which can never commit them (see
    `commit.publish`). A quarantined checkpoint keeps its data for inquiry until it is older than what is kept.
    Without any commit nothing is removed.
    """
    ordered = sorted(states, key=lambda state: state.step)
    kept = choose_kept(ordered, keep)
    if not kept:
        return []
    oldest_kept = min(kept)
    removals = []
    for state in ordered:
        dead = frozenset(state.attempts - set(live_attempts) - {state.attempt})
        is_old = state.step < oldest_kept or (state.committed and state.step not in kept)
        if is_old and state.step != saved_step and not state.attempts & set(live_attempts):
            removals.append(Removal(state.step, None))
        elif dead and _has_dead(state):
            removals.append(Removal(state.step, dead))
    return removals


def observe(store: ObjectStore) -> list[StepState]:
    """The state of every step's folder."""
    return [_observe_step(store, step) for step in steps(store)]


def _observe_step(store: ObjectStore, step: int) -> StepState:
    prefix = layout.step_folder(step) + "/"
    attempts = frozenset(
        attempt for name in store.folders(prefix) if (attempt := layout.parse_attempt(name)) is not None
    )
    committed, healthy, attempt, metadata = True, True, None, None
    aside = {info.key for info in store.list(prefix + layout.QUARANTINED_PREFIX)}
    try:
        metadata = store.read(prefix + layout.METADATA)
        committed = prefix + layout.quarantined_name(metadata) not in aside
        names = [layout.manifest_name(attempt) for attempt in attempts]
        found = find_manifest(store, prefix, metadata, names)
        attempt = None if found is None else found.attempt
        healthy = found is None or found.healthy
    except NotFound:
        committed = False
    except Corrupt as error:
        healthy = False
        log.warning("nothing of step %d is cleaned up: %s", step, error)  # a restore finds out what is wrong with it
    return StepState(step, committed, bool(aside), attempt if committed else None, attempts, metadata, healthy)


def clean(
    store: ObjectStore,
    claim: Claim,
    keep: int,
    live_among: Callable[[Collection[str]], Collection[str]],
    saved_step: int,
) -> Cleaned:
    """Remove what `decide` says after a commit of `saved_step`.

    `live_among`: which of the attempts seen may be under way. The folders are looked at before the claim is checked:
    what a later owner starts meanwhile cannot be among what was seen.

    Raises:
        Fenced: the run has another owner; nothing was removed.
    """
    states = observe(store)
    seen = frozenset().union(*(state.attempts for state in states))
    removals = decide(states, keep, live_among(seen), saved_step)
    claim.check()
    state_of = {state.step: state for state in states}
    for removal in removals:
        remove(store, removal, state_of[removal.step])
    return Cleaned(removals, newer_steps(states, saved_step))


def dead_attempts(states: Iterable[StepState], live_attempts: Collection[str]) -> list[Removal]:
    """The attempts that nobody can commit any more, as in `decide`, and nothing of any commit. Pure."""
    found = []
    for state in sorted(states, key=lambda state: state.step):
        dead = frozenset(state.attempts - set(live_attempts) - {state.attempt})
        if dead and _has_dead(state):
            found.append(Removal(state.step, dead))
    return found


def _has_dead(state: StepState) -> bool:
    """Whether it can be told which of the step's attempts are dead, and nobody is to look into them."""
    return not state.quarantined and (state.attempt is not None or not state.committed)


def clear(store: ObjectStore, claim: Claim, live_among: Callable[[Collection[str]], Collection[str]]) -> None:
    """Remove `dead_attempts`, after a save that has failed: else a disk that is full stays so.

    Of the failed one this leaves all, as other ranks learn there what has become of it; see `drop_data`.

    Raises:
        Fenced: the run has another owner; nothing was removed.
    """
    states = observe(store)
    seen = frozenset().union(*(state.attempts for state in states))
    removals = dead_attempts(states, live_among(seen))
    claim.check()
    state_of = {state.step: state for state in states}
    for removal in removals:
        remove(store, removal, state_of[removal.step])


def drop_data(store: ObjectStore, prefix: str, attempt: str) -> None:
    """Delete the data of an attempt of which it is known that it can never be committed, and nothing that says so."""
    for info in store.list(f"{prefix}{layout.attempt_folder(attempt)}/"):
        if layout.is_data_name(info.key.removeprefix(prefix)):
            store.delete(info.key)


def remove(store: ObjectStore, removal: Removal, seen: StepState) -> None:
    """Delete; what makes a checkpoint visible goes first, so that nobody sees half of one.

    Of what a newer owner has saved in the step since it was `seen` nothing goes: not its `.metadata`, nor its attempt.
    """
    prefix = layout.step_folder(removal.step) + "/"
    gone = seen.attempts if removal.attempts is None else removal.attempts
    if removal.attempts is None:
        if not _remove_commit(store, prefix + layout.METADATA, seen.metadata):
            return
        store.delete(prefix + layout.MANIFEST)
    for info in store.list(prefix):
        attempt = layout.parse_attempt(info.key.removeprefix(prefix).split("/")[0])
        if attempt in gone or (attempt is None and removal.attempts is None and info.key != prefix + layout.METADATA):
            store.delete(info.key)


def _remove_commit(store: ObjectStore, key: str, seen: bytes | None) -> bool:
    """Remove the `.metadata` that was seen; False if there is another one by now, which stays.

    Where the store cannot remove one version only, one that comes between the look and the delete goes as well.
    """
    try:
        info = store.info(key)
        if store.read(key) != seen:
            return False
    except NotFound:
        return True
    if store.can(Capability.CONDITIONAL_DELETES):
        return store.delete_version(key, info.etag)
    store.delete(key)
    return True
