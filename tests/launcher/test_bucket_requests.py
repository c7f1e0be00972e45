"""What many who write at once ask of the store, and how long that takes, by a clock that requests alone drive."""

from __future__ import annotations

import base64
import heapq
import itertools
import random
import re
import zlib
from typing import Any

import pytest

from launcher.errors import KVUnavailable
from launcher.kv.bucket.journal import Journal
from launcher.kv.bucket.ops import WISH, DeleteKey, PutKey, Wish, turn_name, wish_name
from launcher.kv.bucket.register import Create, Names, Overwrite, Pause, Read, Request, Steps, Together
from launcher.kv.bucket.version import number_of

_REQUEST_S, _TURN_S = 0.020, 0.03


class Store:
    """Answers each request after `_REQUEST_S`, one every `service_s`; each takes effect when it is answered."""

    def __init__(self, service_s: float) -> None:
        self._service_s = service_s
        self.objects: dict[str, bytes] = {}
        self.num_requests = 0
        self.read: list[str] = []
        self.free_s = 0.0

    def done_s(self, request: Request, now_s: float) -> float:
        """When it is answered that is asked at `now_s`."""
        if isinstance(request, Pause):
            return now_s + max(request.seconds, request.num_requests * _REQUEST_S) * random.uniform(0.5, 1.5)
        num = len(request.requests) if isinstance(request, Together) else 1
        self.num_requests += num
        self.free_s = max(self.free_s, now_s) + num * self._service_s
        return self.free_s + _REQUEST_S

    def answer(self, request: Request) -> Any:
        match request:
            case Together(requests):
                return [self.answer(one) for one in requests]
            case Read(name):
                self.read.append(name)
                return self.objects.get(name)
            case Names(prefix):
                return [name for name in self.objects if name.startswith(prefix)]
            case Create(name, content):
                is_new = name not in self.objects
                self.objects.setdefault(name, content)
                return is_new
            case Overwrite(name, content):
                self.objects[name] = content
        return None

    def num_reads_of(self, prefix: str) -> int:
        return sum(name.startswith(prefix) for name in self.read)

    @property
    def num_versions(self) -> int:
        return sum(1 for name in self.objects if number_of(name))


def write_at_once(store: Store, journals: list[Journal], key: str, grant_ttl_s: float) -> float:
    """Each writes a key of its own; returns after how many seconds the last one is told."""
    ops = [PutKey(f"{key}/{index}", b"", None, index + 1, grant_ttl_s) for index in range(len(journals))]
    last_s, num_written = change_at_once(store, journals, ops)
    assert num_written == len(journals)
    return last_s


def change_at_once(store: Store, journals: list[Journal], ops: list[PutKey]) -> tuple[float, int]:
    """Each makes its change. After how many seconds the last one is told, and how many were done."""
    last_s, written, order = 0.0, 0, itertools.count()
    queue: list[tuple[float, int, int, Steps[Any], Request | None]] = []
    for index, journal in enumerate(journals):
        steps: Steps[Any] = journal.change([ops[index]])
        queue.append((random.uniform(0, 0.05), next(order), index, steps, None))
    heapq.heapify(queue)
    store.free_s = 0.0
    while queue:
        now_s, _, index, steps, request = heapq.heappop(queue)
        try:
            request = steps.send(store.answer(request) if request else None)
        except StopIteration as end:
            written += isinstance(end.value[0], tuple)
            last_s = max(last_s, now_s)
            continue
        heapq.heappush(queue, (store.done_s(request, now_s), next(order), index, steps, request))
    return last_s, written


def crowd(num: int, service_s: float = 0.002, name_size_bytes_max: int = 0) -> tuple[Store, list[Journal]]:
    random.seed(1)
    nonces = (f"{i:x}" for i in itertools.count())
    journals = [Journal(nonces.__next__, _TURN_S, name_size_bytes_max=name_size_bytes_max) for _ in range(num)]
    return Store(service_s), journals


def asked(store: Store, steps: Steps[Any]) -> int:
    """Carry steps out that nobody else is in the way of; returns how much they asked."""
    before = store.num_requests
    try:
        request = next(steps)
        while True:
            store.done_s(request, 0.0)
            request = steps.send(store.answer(request))
    except StopIteration:
        return store.num_requests - before


_TOLD_BY_NAMES, _READ = (8.0, 6.0, 6.0), (9.0, 7.0, 7.0)


@pytest.mark.parametrize(
    ("num", "within_s", "most"),
    [
        (2, 0.3, _TOLD_BY_NAMES),
        (8, 0.4, _TOLD_BY_NAMES),
        (32, 0.7, _READ),
        (32, 0.6, _TOLD_BY_NAMES),
        (128, 2.0, _TOLD_BY_NAMES),
    ],
)
def test_what_each_of_many_asks_does_not_grow_with_their_number(
    num: int, within_s: float, most: tuple[float, ...]
) -> None:
    """They come at once, and are ready at once: a quarter of a second of 32 nodes, and one of 128, are the store's own.

    Two of the requests of those who come are the first look at a store.
    """
    store, journals = crowd(num, name_size_bytes_max=1000 if most is _TOLD_BY_NAMES else 0)
    for phase, num_asked in zip(("come", "ready", "stop"), most, strict=True):
        before = store.num_requests, store.num_versions
        assert write_at_once(store, journals, phase, 4.0 if phase == "come" else 0.0) < within_s
        assert (store.num_requests - before[0]) / num < num_asked
        assert store.num_versions - before[1] <= 4


def test_of_those_who_wait_for_one_that_is_gone_one_takes_its_place() -> None:
    """All at once would read what all wish, each for itself."""
    store, journals = crowd(32, service_s=0.01)
    write_at_once(store, journals, "come", 4.0)
    for number in range(1, 100):
        store.objects[turn_name(store.num_versions + number)] = b""
    before = store.num_requests
    assert write_at_once(store, journals, "ready", 0.0) < 7.0
    assert (store.num_requests - before) / 32 < 20


def test_what_all_wait_for_is_written_by_one_in_one_request() -> None:
    """A round, say: whoever proposes it is alone, though all wrote a moment ago. A record is wished, as all others."""
    store, journals = crowd(32)
    write_at_once(store, journals, "come", 4.0)
    asked(store, journals[0].catch_up())
    assert asked(store, journals[0].change([PutKey("round", b"", 0)])) == 1
    assert asked(store, journals[0].change([PutKey("record", b"", None, 1)])) > 3


def test_who_looks_often_asks_once_each_time_unless_there_was_more() -> None:
    store, (writer, reader) = crowd(2)
    asked(store, writer.change([PutKey("k", b"")]))
    asked(store, reader.catch_up())
    assert asked(store, reader.peek()) == 1
    asked(store, writer.change([PutKey("k", b"")]))
    assert (asked(store, reader.peek()), reader.number) == (1, writer.number)
    for _ in range(3):
        asked(store, writer.change([PutKey("k", b"")]))
    assert (asked(store, reader.peek()), reader.number) == (4, writer.number)
    assert asked(store, reader.peek()) == 1


@pytest.mark.parametrize(("takes_wishes", "num_tries"), [(False, 1), (True, 2)])
def test_a_store_that_answers_and_takes_nothing_is_told(takes_wishes: bool, num_tries: int) -> None:
    """Its credentials have run out, say: a node that comes hears so, and does not wait for ever."""
    store, (journal,) = crowd(1)
    answer, tried = store.answer, list[Request]()

    def refuse(request: Request) -> Any:
        if not isinstance(request, Together):
            return answer(request)
        tried.append(request)
        assert len(tried) <= num_tries
        accepts = [takes_wishes and isinstance(one, Overwrite) for one in request.requests]
        return [None if accepted else KVUnavailable("forbidden") for accepted in accepts]

    store.answer = refuse  # type: ignore[method-assign]
    with pytest.raises(KVUnavailable, match="forbidden"):
        asked(store, journal.change([PutKey("k", b"", 0, 1, 4.0)]))
    assert len(tried) == num_tries


def test_of_many_who_claim_one_key_few_write() -> None:
    """Who comes a moment later sees that it is taken."""
    store, journals = crowd(32)
    write_at_once(store, journals, "come", 4.0)
    before = store.num_requests, store.num_versions
    claims = [PutKey("leader", b"%d" % index, 0, index + 1) for index in range(32)]
    last_s, num_done = change_at_once(store, journals, claims)
    assert num_done == 1
    assert last_s < 0.4
    assert (store.num_requests - before[0]) / 32 < 4.5
    assert store.num_versions - before[1] == 1


def test_wishes_that_names_tell_are_not_read() -> None:
    store, journals = crowd(32, name_size_bytes_max=1000)
    write_at_once(store, journals, "come", 4.0)
    assert sum(name.startswith(WISH) for name in store.objects) == 32
    assert store.num_reads_of(WISH) == 0
    long = Wish(wish_name("a"), 41, (PutKey("k", random.Random(1).randbytes(500)),))
    name, _ = long.to_object(1000)
    assert Wish.from_name(name) == long
    assert max(map(len, name.split("/"))) <= 255, "a gateway may make it a file"


@pytest.mark.parametrize(
    "value", [b"", b"{}", b"\x00\xff", "\u00e4".encode(), b"x" * 5000, random.Random(1).randbytes(500)]
)
def test_a_wish_is_told_by_a_name_or_by_an_object(value: bytes) -> None:
    wish = Wish(wish_name("a"), 41, (PutKey("k", value, None, 7, 4.0), DeleteKey("k")))
    name, content = wish.to_object(700)
    assert len(name) <= 700
    assert re.fullmatch(r"wish/[\w~/-]+", name), "nothing in it has to be quoted"
    told = Wish.from_name(name)
    assert (told or Wish.from_bytes(name, content)) == wish
    assert (told is None) == (len(value) == 500)
    assert Wish.from_name(wish.to_object(0)[0]) is None
    for damaged in ("wish/a~", "wish/a~AAAA", "wish/a~\u00e4"):
        with pytest.raises(ValueError, match="wish/a is no wish"):
            Wish.from_name(damaged)


@pytest.mark.parametrize(
    "told", [b"[" * 100_000, b"[1e999,[]]", b"[1,[[]]]", b"\xff"], ids=["deep", "inf", "none", "byte"]
)
def test_what_somebody_else_has_laid_among_the_wishes_stops_nobody(told: bytes) -> None:
    """Whoever writes for all passes it by, as what was damaged on its way."""
    packed = base64.urlsafe_b64encode(zlib.compress(told)).decode().rstrip("=")
    with pytest.raises(ValueError, match="wish/x is no wish"):
        Wish.from_name(f"wish/x~{packed}")
