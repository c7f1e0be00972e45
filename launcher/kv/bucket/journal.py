"""The store as numbered versions, each created if it is not there, so that each has one author. No clock, no I/O.

A client knows a version and reads the next one until there is none. To change something it writes the next version; if
another was first, it learns that one and tries again. Nothing ever rests on a listing, nor on which of two writes came
later. What an old version's object held is replaced by a tombstone, and its name stays taken: a writer that was stopped
for an hour between its look and its write finds the name taken, as one that lost a race by a millisecond does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeVar

from launcher.errors import Compacted, KVUnavailable
from launcher.kv.base import WatchEvent
from launcher.kv.bucket.register import Create, Names, Pause, Read, Steps
from launcher.kv.bucket.version import LOG, TOMBSTONE, Version, number_of, version_name
from launcher.kv.state import HISTORY_EVENTS, State

T = TypeVar("T")

KEPT_VERSIONS = 128
"""So many of the newest versions keep their content."""
_TRIES = 200
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.1


class Journal:
    """One client's knowledge of the store. Its steps must not be interleaved with one another."""

    def __init__(self, nonces: Callable[[], str]) -> None:
        """`nonces` gives a text that nobody has given before."""
        self.state = State()
        self.number = 0
        self._nonces = nonces
        self._began = False
        self._history: deque[WatchEvent] = deque()
        self._oldest = 1  # changes of this version and all later ones are in the history
        self._known_from = 1  # their first revision

    # --- steps

    def catch_up(self) -> Steps[bool]:
        """Learn the versions that are there by now. Returns whether there was one.

        Raises:
            KVUnavailable
        """
        before = self.number
        if not self._began:
            yield from self._jump()
            self._began = True
        while (content := (yield Read(version_name(self.number + 1)))) is not None:
            if content == TOMBSTONE:
                yield from self._jump()
            else:
                self._learn(Version.from_bytes(self.number + 1, content))
        return self.number != before

    def change(self, act: Callable[[State], T]) -> Steps[T]:
        """Write a version in which `act` was done, and return what `act` returned.

        Args:
            act: changes the state that it is given, or finds that it must not; called again where another was first.

        Raises:
            KVUnavailable: whether it was written is not known, or too many others write.
        """
        is_fresh = False
        pause_s = _FIRST_PAUSE_S
        if not self._began:
            yield from self.catch_up()
            is_fresh = True
        for _ in range(_TRIES):
            before = self.state.dump()
            draft = State.load(before)
            result = act(draft)
            if draft.dump() == before:
                if is_fresh:
                    return result  # there is nothing to be done
                yield from self.catch_up()  # what `act` has seen may be of before
                is_fresh = True
                continue
            events = draft.events("", self.state.revision + 1)
            version = Version(self.number + 1, self._nonces(), draft, events)
            if (yield from self._write(version)):
                return result
            is_fresh = yield from self.catch_up()
            yield Pause(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        raise KVUnavailable("others write all the time")

    def look_back(self, revision: int) -> Steps[None]:
        """Learn the changes from `revision` on, as far as the versions that brought them keep them.

        Raises:
            KVUnavailable
        """
        while revision < self._known_from and self._oldest > 1:
            content = yield Read(version_name(self._oldest - 1))
            if not content:  # a tombstone, or long removed
                return
            version = Version.from_bytes(self._oldest - 1, content)
            self._oldest -= 1
            self._history.extendleft(reversed(version.events))
            self._known_from = version.events[0].revision if version.events else self._known_from
            if self._oldest == 1:
                self._known_from = 1

    def _write(self, version: Version) -> Steps[bool]:
        content = version.to_bytes()
        try:
            created = yield Create(version_name(version.number), content)
        except KVUnavailable:
            there = yield Read(version_name(version.number))
            if there is None:
                raise  # it may land yet
            created = there == content
        if not created:
            # Told that another was there: it may be this one, that a try before was not heard to have written.
            there = yield Read(version_name(version.number))
            created = there == content
        if created:
            self._learn(version)
        return bool(created)

    def _jump(self) -> Steps[None]:
        """Go on from the newest version that a listing shows."""
        newest = max((number_of(name) for name in (yield Names(LOG))), default=0)
        if newest <= self.number:
            if self._began:
                raise KVUnavailable("the listing of the store's versions is old")
            return
        content = yield Read(version_name(newest))
        if not content:
            raise KVUnavailable("the listing of the store's versions is old")
        self._learn(Version.from_bytes(newest, content))

    # --- what is known

    def _learn(self, version: Version) -> None:
        if version.number != self.number + 1:
            self._history.clear()
            self._oldest = version.number
            self._known_from = version.events[0].revision if version.events else version.state.revision + 1
        self.number, self.state = version.number, version.state
        if len(self._history) + len(version.events) > HISTORY_EVENTS:
            self._history.clear()
            self._oldest, self._known_from = version.number + 1, version.state.revision + 1
            return
        self._history.extend(version.events)

    def events(self, prefix: str, from_revision: int) -> tuple[WatchEvent, ...]:
        """The known changes under `prefix` from `from_revision` on.

        Raises:
            Compacted: some of them are not known: `look_back` may learn them.
        """
        if from_revision < self._known_from and self._oldest > 1:
            raise Compacted(f"revision {from_revision} is forgotten; the oldest kept is {self._known_from}")
        return tuple(e for e in self._history if e.revision >= from_revision and e.key.startswith(prefix))
