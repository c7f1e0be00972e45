"""The store's versions whatever answers get lost: each has one author, and what is wished is done once."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from launcher.errors import KVUnavailable
from launcher.kv.bucket.journal import Journal
from launcher.kv.bucket.ops import (
    WISH,
    DeleteKey,
    EndLease,
    GrantLease,
    Op,
    PutKey,
    Result,
    Wish,
    carry_out,
    turn_name,
    wish_name,
)
from launcher.kv.bucket.register import Create, Names, Overwrite, Pause, Read, Request, Steps, Together
from launcher.kv.bucket.version import TOMBSTONE, Version, number_of, version_name
from launcher.kv.state import State

SEEDS = range(int(os.environ.get("BUCKET_SEEDS", "150")))


class FaultyObjects:
    """Objects behind a network: answers get lost, puts land late or twice, listings lag, old versions are buried."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.objects: dict[str, bytes] = {}
        self.late: list[Create | Overwrite] = []
        self.lagging: list[str] = []
        self.authors: dict[str, list[bytes]] = {}

    def answer(self, request: Request) -> Any:
        """What the client hears.

        Raises:
            KVUnavailable: nothing.
        """
        if isinstance(request, Together):
            return [self._heard(one) for one in request.requests]
        self._land_some()
        fault = self.random.random()
        if fault < 0.05:
            raise KVUnavailable("lost on the way there")
        told: Any = None
        match request:
            case Read(name):
                told = self.objects.get(name)
            case Names(prefix):
                if self.random.random() < 0.5:
                    self.lagging = sorted(self.objects)
                told = [name for name in self.lagging if name.startswith(prefix)]
            case Create() | Overwrite():
                if fault < 0.10:
                    self.late.append(request)
                    raise KVUnavailable("on its way for long")
                told = self._write(request)
                if fault < 0.15:
                    self.late.append(request)  # and a second time
        if fault > 0.95:
            raise KVUnavailable("the answer was lost")
        return told

    def _heard(self, request: Request) -> Any:
        try:
            return self.answer(request)
        except KVUnavailable as error:
            return error

    def _write(self, request: Create | Overwrite) -> bool | None:
        if isinstance(request, Create) and request.name in self.objects:
            return False
        self.objects[request.name] = request.content
        if number_of(request.name):
            self.authors.setdefault(request.name, []).append(request.content)
        return True if isinstance(request, Create) else None

    def _land_some(self) -> None:
        while self.late and self.random.random() < 0.2:
            self._write(self.late.pop(self.random.randrange(len(self.late))))

    def tidy(self, client: Client, kept: int) -> None:
        """What a client does behind itself, and with versions long before the newest."""
        newest = max(map(number_of, self.objects), default=0)
        for name in list(self.objects):
            if 0 < number_of(name) <= newest - kept:
                self.objects[name] = TOMBSTONE
        for name in client.journal.litter:
            self.objects.pop(name, None)
        client.journal.litter.clear()

    def newest(self) -> Version:
        number = max(map(number_of, self.objects))
        return Version.from_bytes(number, self.objects[version_name(number)])


class Client:
    """Changes something again and again, one request at a time, and may stop for long in between."""

    def __init__(self, objects: FaultyObjects, name: str, num_tries_alone: int = 3) -> None:
        self.objects = objects
        self.name = name
        numbers = itertools.count()
        name_size_bytes_max = objects.random.choice((0, 1000))
        self.journal = Journal(lambda: f"{name}-{next(numbers)}", 0.005, num_tries_alone, name_size_bytes_max)
        self.unknown = 0
        self.steps: Steps[tuple[Result, ...]] | None = None
        self.asked: Request | None = None
        self.paused_turns = 0
        self.num_wished = 0

    def next_ops(self) -> list[Op]:
        raise NotImplementedError

    def note(self, results: tuple[Result, ...] | None) -> None:
        """What came of the last ones; None where that is not known."""
        raise NotImplementedError

    def turn(self) -> None:
        """One request."""
        if self.paused_turns:
            self.paused_turns -= 1
            return
        try:
            if self.steps is None:
                self.steps = self.journal.change(self.next_ops())
                self.asked = next(self.steps)
                return
            assert self.asked is not None
            if self.objects.random.random() < 0.02:
                self.paused_turns = self.objects.random.randrange(400)  # between its look and its write
                return
            self.num_wished += isinstance(self.asked, Together) and isinstance(self.asked.requests[0], Overwrite)
            try:
                told = self.objects.answer(self.asked)
            except KVUnavailable as error:
                self.asked = self.steps.throw(error)
            else:
                self.asked = self.steps.send(told)
        except StopIteration as end:
            self.steps = None
            self.note(end.value)
        except KVUnavailable:
            self.unknown += 1
            self.steps = None
            self.note(None)


class Counter(Client):
    """Adds one to a counter by compare-and-swap."""

    def __init__(self, objects: FaultyObjects, name: str) -> None:
        super().__init__(objects, name)
        self.added: list[int] = []
        self._value = 0

    def next_ops(self) -> list[Op]:
        there = self.journal.state.get("count")
        self._value = int(there.value) + 1 if there else 1
        return [PutKey("count", b"%d" % self._value, there.revision if there else 0)]

    def note(self, results: tuple[Result, ...] | None) -> None:
        if results and results[0]:
            self.added.append(self._value)


class Marker(Client):
    """Puts a key of its own, and then deletes it, whatever is there: what is done twice would show."""

    def __init__(self, objects: FaultyObjects, name: str, num_tries_alone: int) -> None:
        super().__init__(objects, name, num_tries_alone)
        self.put: dict[str, tuple[int, int]] = {}
        self.deleted: list[str] = []
        self._marks = itertools.count()
        self._key = ""
        self._is_there = False

    def next_ops(self) -> list[Op]:
        if self._is_there:
            return [DeleteKey(self._key)]
        self._key = f"{self.name}/{next(self._marks)}"
        return [PutKey(self._key, b"")]

    def note(self, results: tuple[Result, ...] | None) -> None:
        if results is None:
            self._is_there = False
        elif self._is_there:
            assert results == (True,), f"{self._key} was gone"
            self.deleted.append(self._key)
            self._is_there = False
        else:
            assert isinstance(results[0], tuple)
            self.put[self._key] = results[0]
            self._is_there = True


def live(objects: FaultyObjects, clients: list[Any], num_turns: int, is_enough: Callable[[], bool]) -> None:
    """So many turns, and as often again until enough was done: all may be stopped for long at first."""
    for _ in range(20):
        for _ in range(num_turns):
            client = objects.random.choice(clients)
            client.turn()
            if objects.random.random() < 0.05:
                objects.tidy(client, kept=40)
        if is_enough():
            return
    raise AssertionError("hardly anything was done")


@pytest.mark.parametrize("seed", SEEDS)
def test_no_version_has_two_authors(seed: int) -> None:
    """Whatever is lost, late, doubled or paused: what one client was told it has counted, no other has counted."""
    objects = FaultyObjects(seed)
    clients = [Counter(objects, name) for name in "abcde"[: 3 + seed % 3]]
    live(objects, clients, 1500, lambda: sum(len(client.added) for client in clients) > 20)
    added = [value for client in clients for value in client.added]
    assert len(added) == len(set(added)), f"seed {seed}: two clients were told the same number"
    assert all(len(set(contents)) == 1 for contents in objects.authors.values()), f"seed {seed}"
    for client in clients:
        assert client.added == sorted(client.added), f"seed {seed}"
    last = objects.newest().state.get("count")
    assert last is not None
    unknown = sum(client.unknown for client in clients)
    assert len(added) <= int(last.value) <= len(added) + unknown + len(objects.late) + len(clients), f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_wished_is_done_once(seed: int) -> None:
    """By whoever writes it, and however often its wish comes to light: no mark is made twice, nor once it is gone."""
    objects = FaultyObjects(seed)
    clients = [Marker(objects, name, num_tries_alone=int(name == "a")) for name in "abcdef"]
    live(
        objects,
        clients,
        2000,
        lambda: min(sum(client.num_wished for client in clients), sum(len(client.put) for client in clients)) > 5,
    )
    state = objects.newest().state
    for client in clients:
        for key in client.deleted:
            assert state.get(key) is None, f"seed {seed}: {key} is there again"
        for key, (revision, created) in client.put.items():
            assert revision == created, f"seed {seed}: {key} was made twice"
            if (there := state.get(key)) is not None:
                assert (there.revision, there.create_revision) == (revision, created), f"seed {seed}: {key}"


def faultless() -> FaultyObjects:
    objects = FaultyObjects(0)
    objects.random.random = lambda: 0.45  # type: ignore[method-assign]
    return objects


def carry(steps: Steps[Any], objects: FaultyObjects, between: Callable[[Request], None] = lambda _: None) -> Any:
    """Carry steps out; `between` is told each request before it is answered."""
    try:
        request = next(steps)
        while True:
            between(request)
            request = steps.send(objects.answer(request))
    except StopIteration as end:
        return end.value


def test_a_writer_that_was_stopped_for_long_loses_its_race() -> None:
    """Its version was written by others, buried, and is nobody's to write again."""
    objects = faultless()
    slow, quick = Counter(objects, "slow"), Counter(objects, "quick")
    while not isinstance(slow.asked, Create):
        slow.turn()
    while len(quick.added) < 50:
        quick.turn()
    objects.tidy(quick, kept=3)
    assert objects.objects[slow.asked.name] == TOMBSTONE
    while not slow.added:
        slow.turn()
    assert slow.added == [51]


def overtaken(journal: Journal, objects: FaultyObjects, until_number: int) -> Callable[[Request], None]:
    """Another writes each version up to a number first."""
    rival = Journal(lambda: f"rival-{len(objects.objects)}")

    def between(request: Request) -> None:
        number = journal.number + 1
        if isinstance(request, Create) and request.name == version_name(number) and number <= until_number:
            carry(rival.change([PutKey("rival", b"")]), objects)

    return between


def test_one_that_lost_often_writes_what_all_wish_in_one_version() -> None:
    objects = faultless()
    others = [Wish(wish_name(f"w{i}"), 0, (PutKey(f"k{i}", b"v", 0, i + 1, 4.0),)) for i in range(20)]
    for wish in others:
        objects.objects[wish.name] = wish.to_bytes()
    objects.objects[wish_name("none")] = b"no wish"
    journal = Journal(iter(f"own-{i}" for i in range(100)).__next__)
    results = carry(journal.change([PutKey("own", b"")]), objects, overtaken(journal, objects, 3))
    assert journal.number == 4
    assert results[0] == (4, 4)
    newest = objects.newest()
    assert len(newest.granted) == 21
    there = newest.state.get("k7")
    assert there is not None
    assert newest.granted["wish/w7"] == ((there.revision, there.create_revision),)
    assert newest.state.leases() == {i + 1: 4.0 for i in range(20)}
    assert {wish.name for wish in others} <= set(newest.recent)


def test_who_waits_for_one_that_is_gone_writes_by_itself() -> None:
    """It took its turn, and was killed."""
    objects = faultless()
    objects.objects[turn_name(3)] = b""
    journal = Journal(iter(f"own-{i}" for i in range(100)).__next__)
    num_pauses = 0

    def between(request: Request) -> None:
        nonlocal num_pauses
        num_pauses += isinstance(request, Pause)
        rivals(request)

    rivals = overtaken(journal, objects, 2)
    assert carry(journal.change([PutKey("own", b"")]), objects, between) == ((3, 3),)
    assert num_pauses == 6


def test_a_wish_that_nobody_granted_in_time_is_void_and_made_anew() -> None:
    """While others, who do not see it, write more versions than it may wait for."""
    objects = faultless()
    journal = Journal(iter(f"own-{i}" for i in range(1000)).__next__)
    wished = []

    def between(request: Request) -> None:
        if isinstance(request, Together) and isinstance(request.requests[0], Overwrite):
            wished.append(request.requests[0].name)
        if isinstance(request, Names) or (isinstance(request, Together) and isinstance(request.requests[0], Names)):
            objects.lagging = []
        rivals(request)

    rivals = overtaken(journal, objects, 3 + Wish.WINDOW)
    objects.random.random = lambda: 0.55  # type: ignore[method-assign]  # listings lag
    assert carry(journal.change([PutKey("own", b"")]), objects, between) == ((4 + Wish.WINDOW,) * 2,)
    assert len(wished) == 2


def test_a_wish_is_told_as_it_was_made() -> None:
    ops = (
        PutKey("k", b"\x00\xff", None, 7, 4.0),
        PutKey("k", b"", 3),
        DeleteKey("k"),
        DeleteKey("k", 5),
        GrantLease(9, 2.5),
        EndLease(9),
    )
    wish = Wish("wish/a", 41, ops)
    assert Wish.from_bytes("wish/a", wish.to_bytes()) == wish
    for content in (b"", b"x", wish.to_bytes()[:-1], wish.to_bytes().replace(b"41", b"42")):
        with pytest.raises(ValueError, match=f"{WISH}a is no wish"):
            Wish.from_bytes("wish/a", content)


def test_a_put_that_loses_its_race_grants_no_lease() -> None:
    state = State()
    assert carry_out(PutKey("k", b"", 0, 1, 4.0), state) == (1, 1)
    assert carry_out(PutKey("k", b"", 0, 2, 4.0), state) is None
    assert state.leases() == {1: 4.0}
    carry_out(EndLease(1), state)
    assert carry_out(PutKey("k", b"", 0, 1), state) is None, "its lease has ended"
