"""The store as numbered versions, each created if it is not there, so that each has one author. No clock, no I/O.

A client knows a version and reads the next one until there is none. To change something it writes the next version; if
another was first, it learns that one and tries again. Nothing ever rests on a listing, nor on which of two writes came
later. What an old version's object held is replaced by a tombstone, and its name stays taken: a writer that was stopped
for an hour between its look and its write finds the name taken, as one that lost a race by a millisecond does.

Where many write at once that would take each its own version, one after the other. So whoever lost twice, or has seen
many write of late, writes down what it wishes; one of them, whose turn it is, writes a version with the wishes of all
(Hendler and others, "Flat combining and the synchronization-parallelism tradeoff", 2010), and the others read there
what came of theirs. Whose turn it is decides nothing: if that one is gone, another does the same a moment later. A
version tells which wishes it and those before it have granted, so none is granted twice.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum, auto
from typing import TypeVar

from launcher.errors import Compacted, KVUnavailable
from launcher.kv.base import WatchEvent
from launcher.kv.bucket.ops import WISH, Op, PutKey, Result, Wish, carry_out, turn_name, wish_name
from launcher.kv.bucket.register import Create, Names, Overwrite, Pause, Read, Steps, Together
from launcher.kv.bucket.version import LOG, TOMBSTONE, Version, number_of, version_name
from launcher.kv.state import HISTORY_EVENTS, State

T = TypeVar("T")

KEPT_VERSIONS = 128
"""So many of the newest versions keep their content: more than a wish has to be granted in."""
_NUM_TRIES_ALONE = 2
_NUM_OF_A_CROWD, _CROWD_VERSIONS = 4, 16
_NUM_WISHES = 8
_NUM_WISHES_READ_MAX = 256
_NUM_PAUSES, _PAUSE_GROWTH = 6, 1.5
_NUM_REQUESTS_FOR_ALL = 2.0
"""What the writer for all asks one after the other: a listing and the version; the wishes in between, where their names
do not tell them."""
_CLAIM_PAUSES = 4.0
_FIRST_REST_S, _LONGEST_REST_S = 0.005, 0.1


class _Kind(Enum):
    """What a change is, as to who else may be about to write."""

    OWN = auto()
    COMING = auto()  # a lease is granted with it: a node comes, and seldom alone
    CLAIM = auto()  # of a key that was not there: of all who want it one has it, and the others want it no more
    AWAITED = auto()  # under no lease, so no client's own: others are not about to write theirs, but wait for it


def _kind_of(ops: Sequence[Op]) -> _Kind:
    puts = [op for op in ops if isinstance(op, PutKey)]
    if any(op.grant_ttl_s for op in puts):
        return _Kind.COMING
    if len(puts) < len(ops):
        return _Kind.OWN
    if not any(op.lease_id for op in puts):
        return _Kind.AWAITED
    return _Kind.CLAIM if all(op.if_revision == 0 for op in puts) else _Kind.OWN


class Journal:
    """One client's knowledge of the store. Its steps must not be interleaved with one another."""

    def __init__(
        self,
        nonces: Callable[[], str],
        pause_s: float = 0.005,
        num_tries_alone: int = _NUM_TRIES_ALONE,
        name_size_bytes_max: int = 0,
    ) -> None:
        """`nonces` gives a text that nobody has given before; `pause_s`: the first one before another look.

        `name_size_bytes_max`: see `Register`.
        """
        self.state = State()
        self.number = 0
        self.authored: list[int] = []
        """Versions that this client has written. Whoever tidies up empties it, and the next."""
        self.litter: list[str] = []
        """Objects that this client has written and that nobody needs any more."""
        self._nonces = nonces
        self._pause_s = pause_s
        self._num_tries_alone = num_tries_alone
        self._name_size_bytes_max = name_size_bytes_max
        self._began = False
        self._is_behind = False  # perhaps, by more than one version
        self._recent: dict[str, int] = {}  # as in the newest version
        self._wish: str = ""  # of the steps under way
        self._granted: tuple[Result, ...] | None = None  # and what came of it
        self._has_lost_sight = False
        self._crowd_until = 0  # up to this version many are thought to write at once
        self._history: deque[WatchEvent] = deque()
        self._oldest = 1  # changes of this version and all later ones are in the history
        self._known_from = 1  # their first revision

    @property
    def is_granted(self) -> bool:
        """Whether the wish of the change that is under way is in a version that is known."""
        return self._granted is not None

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
        while (yield from self._learn_next()):
            pass
        return self.number != before

    def peek(self) -> Steps[bool]:
        """Learn the next version, if it is there; and those after it, where there was one at the last `peek` too.

        Whoever looks often need not ask each time whether there is yet another. Returns whether there was one.

        Raises:
            KVUnavailable
        """
        if self._is_behind or not self._began:
            self._is_behind = False
            return (yield from self.catch_up())
        self._is_behind = yield from self._learn_next()
        return self._is_behind

    def change(self, ops: Sequence[Op]) -> Steps[tuple[Result, ...]]:
        """Have a version written in which `ops` were carried out in this order, and return what came of each.

        None is written where there is nothing to be done.

        Raises:
            KVUnavailable: whether it was written is not known.
        """
        is_fresh = False
        self._begin("")
        if not self._began:
            yield from self.catch_up()
            is_fresh = True
        kind = _kind_of(ops)
        if kind is _Kind.CLAIM and self.number < self._crowd_until:  # all of them want it, and one will have it
            spread = zlib.crc32(self._nonces().encode()) / 2**32
            yield Pause(spread * _CLAIM_PAUSES * self._pause_s, spread * _CLAIM_PAUSES)
            yield from self.catch_up()
            is_fresh = True
        num_tries = 0
        while True:
            draft = self.state.fork()
            results = tuple(carry_out(op, draft) for op in ops)
            if (draft.revision, draft.leases()) == (self.state.revision, self.state.leases()):
                if is_fresh:
                    return results  # there is nothing to be done
                yield from self.catch_up()  # what was seen may be of before
                is_fresh = True
                continue
            if not self._may_try_alone(kind, num_tries):
                break
            num_tries += 1
            if (yield from self._write(draft, {}, {})):
                return results
            is_fresh = False
        for _ in range(_NUM_WISHES):
            wish = Wish(wish_name(self._nonces()), self.number, tuple(ops))
            held = Overwrite(*wish.to_object(self._name_size_bytes_max))
            try:
                yield from self._have_granted(wish, held)
                if self._granted is not None:
                    return self._granted
            finally:
                self._wish = ""
                self.litter.append(held.name)
        raise KVUnavailable("others write all the time")

    def _may_try_alone(self, kind: _Kind, num_tries: int) -> bool:
        if num_tries >= self._num_tries_alone or kind is _Kind.COMING:
            return False
        return self.number >= self._crowd_until or (kind is not _Kind.OWN and num_tries == 0)

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

    # --- with others

    def _have_granted(self, wish: Wish, held: Overwrite) -> Steps[None]:
        """Have `wish`, which is `held` by an object, in a version, whoever writes it; or learn that it will be in none.

        Raises:
            KVUnavailable: neither is known.
        """
        self._begin(wish.name)
        attempt = 0
        is_own_turn = yield from self._take_turn(attempt, held)
        rest_s = _FIRST_REST_S
        while self._granted is None and self.number < wish.until:
            before = self.number
            try:
                if is_own_turn:
                    yield from self._write_for_all(wish)
                else:
                    yield from self._wait_for_another()
                if is_own_turn and self._granted is None:  # somebody was first who wishes nothing
                    yield Pause(rest_s)
                    yield from self.catch_up()
                    rest_s = min(2 * rest_s, _LONGEST_REST_S)
            except KVUnavailable:
                if self._granted is None:
                    raise
            if self._has_lost_sight and self._granted is None:
                raise KVUnavailable("whether it was written is forgotten")
            if self.is_granted:
                break
            if self.number != before:
                attempt = 0
            elif is_own_turn:  # and this client could not
                is_own_turn = False
                continue
            else:  # whose turn it was is gone, or slow: one of those who wait takes it, and not all of them at once
                attempt += 1
            is_own_turn = yield from self._take_turn(attempt)

    def _begin(self, wish: str) -> None:
        self._wish, self._granted, self._has_lost_sight = wish, None, False

    def _take_turn(self, attempt: int, *beside: Overwrite) -> Steps[bool]:
        name = turn_name(self.number + 1, attempt)
        told = yield Together((*beside, Create(name, b"")))
        if isinstance(told[-1], KVUnavailable) and (attempt or isinstance(told[0], KVUnavailable)):
            raise told[-1]  # the store takes nothing, or nothing more
        if told[-1] is True:
            self.litter.append(name)
        return told[-1] is True

    def _wait_for_another(self) -> Steps[None]:
        pause_s = self._pause_s
        for _ in range(_NUM_PAUSES):
            yield Pause(pause_s, _NUM_REQUESTS_FOR_ALL if self._name_size_bytes_max else _NUM_REQUESTS_FOR_ALL + 1)
            was_behind, self._is_behind = self._is_behind, (yield from self._learn_next())
            if self._is_behind:  # if it lacks the wish, somebody writes the next one
                while was_behind and self._granted is None and (yield from self._learn_next()):
                    pass
                return
            pause_s *= _PAUSE_GROWTH

    def _write_for_all(self, own: Wish) -> Steps[None]:
        others = yield from self._collect(own)
        draft = self.state.fork()
        granted: dict[str, tuple[Result, ...]] = {}
        until: dict[str, int] = {}
        for wish in self._grantable([own, *others]):
            granted[wish.name] = tuple(carry_out(op, draft) for op in wish.ops)
            until[wish.name] = wish.until
        yield from self._write(draft, granted, until)

    def _grantable(self, wishes: Iterable[Wish]) -> list[Wish]:
        return [w for w in wishes if w.name not in self._recent and w.base <= self.number < w.until]

    def _collect(self, own: Wish) -> Steps[list[Wish]]:
        """What others wish, as far as a listing shows; what it does not is for the next version."""
        (listed,) = yield Together((Names(WISH),))
        found = [] if isinstance(listed, KVUnavailable) else listed
        wishes, names = list[Wish](), list[str]()
        for name in found:
            try:
                if (told := Wish.from_name(name)) is not None:
                    wishes.append(told)
                elif name not in self._recent:
                    names.append(name)
            except ValueError:  # damaged: its author will see to it
                continue
        names = [name for name in names if name != own.name][:_NUM_WISHES_READ_MAX]
        if names:
            contents = yield Together(tuple(map(Read, names)))
            for name, content in zip(names, contents, strict=True):
                try:
                    wishes.append(Wish.from_bytes(name, content if isinstance(content, bytes) else b""))
                except ValueError:  # gone meanwhile, unreadable or damaged, as above
                    continue
        return [wish for wish in wishes if wish.name != own.name]

    def _write(self, draft: State, granted: dict[str, tuple[Result, ...]], until: dict[str, int]) -> Steps[bool]:
        """Write the next version. Returns whether this client did; else the one that another wrote is learnt.

        Raises:
            KVUnavailable: it is not known.
        """
        number = self.number + 1
        events = draft.events("", self.state.revision + 1)
        recent = {name: last for name, last in {**self._recent, **until}.items() if last > number}
        version = Version(number, self._nonces(), draft, events, granted, recent)
        name, content = version_name(number), version.to_bytes()
        try:
            is_created = yield Create(name, content)
        except KVUnavailable:
            there = yield Read(name)
            if there is None:
                raise  # it may land yet
        else:
            # Told that another was there: it may be this one, that a try before was not heard to have written.
            there = content if is_created else (yield Read(name))
        if there != content:
            if there:
                self._learn(Version.from_bytes(number, there))
            else:  # it is long past
                yield from self.catch_up()
            return False
        self.authored.append(number)
        self._learn(version)
        return True

    def _learn_next(self) -> Steps[bool]:
        content = yield Read(version_name(self.number + 1))
        if content is None:
            return False
        if content == TOMBSTONE:
            yield from self._jump()
        else:
            self._learn(Version.from_bytes(self.number + 1, content))
        return True

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
            self._has_lost_sight = True
            self._history.clear()
            self._oldest = version.number
            self._known_from = version.events[0].revision if version.events else version.state.revision + 1
        self.number, self.state, self._recent = version.number, version.state, dict(version.recent)
        if len(version.granted) >= _NUM_OF_A_CROWD:  # as in the next phase of a round, perhaps: none tries alone
            self._crowd_until = version.number + _CROWD_VERSIONS
        if self._wish in version.granted:
            self._granted = version.granted[self._wish]
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
