"""The store on objects: what goes into one version, what needs none, and what is tidied up."""

from __future__ import annotations

import contextlib
import threading
import time
import types
import uuid
from collections.abc import Iterator

import pytest

from elastic_moe.register import StoreRegister
from launcher.coordination.vitals_publisher import VitalsPublisher, vitals_prefix
from launcher.errors import KVUnavailable
from launcher.kv.aside import told
from launcher.kv.bucket import shared, upkeep
from launcher.kv.bucket.beat import BEAT, beat_content, told_in
from launcher.kv.bucket.client import BucketKV
from launcher.kv.bucket.judge import Judge
from launcher.kv.bucket.ops import TURN, WISH, PutKey
from launcher.kv.bucket.shared import SharedJournal
from launcher.kv.bucket.upkeep import Upkeep
from launcher.kv.bucket.version import LOG, version_name
from launcher.rounds.vitals import Vitals
from storage.stores.memory import MemoryStore
from tests.cluster import until

_STUCK_S = 60.0


class HeldRegister(StoreRegister):
    """Creations wait until they may go on, or are not answered."""

    def __init__(self) -> None:
        super().__init__(MemoryStore(uuid.uuid4().hex))
        self.may_create = threading.Event()
        self.may_create.set()
        self.is_creating = threading.Event()
        self.is_lost = False
        self.reads: list[str] = []

    def read(self, name: str) -> bytes | None:
        self.reads.append(name)
        return super().read(name)

    def create(self, name: str, content: bytes) -> bool:
        self.is_creating.set()
        assert self.may_create.wait(_STUCK_S)
        if self.is_lost:
            raise KVUnavailable("lost on the way")
        return super().create(name, content)


@pytest.fixture
def register() -> HeldRegister:
    return HeldRegister()


@pytest.fixture
def kv(register: HeldRegister) -> Iterator[BucketKV]:
    with contextlib.closing(BucketKV(register)) as made:
        yield made


def test_what_threads_of_one_process_want_goes_into_one_version(register: HeldRegister) -> None:
    journal = SharedJournal(register, 0.005, lambda: None)
    register.may_create.clear()
    results: list[object] = []

    def put(number: int) -> None:
        results.append(journal.change(PutKey(f"k{number}", b"")).results)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(6)]
    threads[0].start()
    assert register.is_creating.wait(_STUCK_S)
    for thread in threads[1:]:
        thread.start()
    until("the others wait", lambda: len(journal._queue) == 5)
    register.may_create.set()
    for thread in threads:
        thread.join(_STUCK_S)
    assert journal.number == 2
    assert sorted(results) == [((revision, revision),) for revision in range(1, 7)]  # type: ignore[type-var]


def test_who_waited_for_another_thread_neither_looks_again_nor_thinks_that_the_store_is_slow(
    register: HeldRegister, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a round forms a change takes a second, and whoever looked twice as seldom heard of the round that late."""
    journal, now_s, reads = SharedJournal(register, 0.005, lambda: None), [0.0], register.reads
    clock = types.SimpleNamespace(
        monotonic=lambda: now_s[0], clock_gettime=lambda _: now_s[0], CLOCK_MONOTONIC=time.CLOCK_MONOTONIC
    )
    monkeypatch.setattr(shared, "time", clock)
    journal.look()
    took_s: list[float] = []
    for unless_within_s, num_reads in ((1000.0, 0), (0.0, 1)):
        register.may_create.clear()
        register.is_creating.clear()
        writes = threading.Thread(target=journal.change, args=(PutKey("k", b""),))
        looks = threading.Thread(target=lambda within_s=unless_within_s: took_s.append(journal.peek(within_s)))
        writes.start()
        assert register.is_creating.wait(_STUCK_S)
        looks.start()
        now_s[0] += 100.0
        reads.clear()
        register.may_create.set()
        for thread in (writes, looks):
            thread.join(_STUCK_S)
        assert len(reads) == num_reads
    assert took_s == [0.0, 0.0]


def test_a_change_that_is_not_answered_is_told_to_all_who_wait(register: HeldRegister) -> None:
    journal = SharedJournal(register, 0.005, lambda: None)
    register.may_create.clear()
    register.is_lost = True
    errors: list[str] = []

    def put(number: int) -> None:
        try:
            journal.change(PutKey(f"k{number}", b""))
        except KVUnavailable as error:
            errors.append(str(error))

    threads = [threading.Thread(target=put, args=(number,)) for number in range(3)]
    threads[0].start()
    assert register.is_creating.wait(_STUCK_S)  # whoever comes before that is taken along
    for thread in threads[1:]:
        thread.start()
    until("the others wait", lambda: len(journal._queue) == 2)
    register.may_create.set()
    for thread in threads:
        thread.join(_STUCK_S)
    assert errors == ["lost on the way"] * 3


def test_a_lease_is_granted_with_what_is_put_under_it_first(kv: BucketKV) -> None:
    lease = kv.lease(30.0)
    assert kv.put("k", b"", if_revision=7, lease=lease) is None
    assert kv._journal.state.leases() == {}, "what was not put grants nothing"
    assert kv.put("k", b"", lease=lease) is not None
    assert kv._journal.number == 1
    assert kv._journal.state.leases() == {lease.lease_id: 30.0}
    assert kv.put("l", b"", lease=lease) is not None
    lease.revoke()
    assert kv.list("").entries == ()


def test_a_lease_that_nothing_is_put_under_is_granted_when_it_is_renewed(kv: BucketKV) -> None:
    lease = kv.lease(0.4)
    until("it is granted", lambda: lease.lease_id in kv._journal.state.leases())
    assert kv.put("k", b"", lease=lease) is not None or lease.lost.is_set()


def test_a_lease_of_which_it_is_not_known_whether_it_was_granted_is_not_granted_again(
    kv: BucketKV, register: HeldRegister
) -> None:
    """It may have been, and have ended since."""
    lease = kv.lease(30.0)
    register.is_lost = True
    with pytest.raises(KVUnavailable, match="lost on the way"):
        kv.put("k", b"", lease=lease)
    register.is_lost = False
    assert kv.put("k", b"", lease=lease) is None


def test_a_renewal_does_not_wait_for_a_change_that_is_not_answered(kv: BucketKV, register: HeldRegister) -> None:
    """It would be counted when that is, and the next one be late: a lease has few, and its workers end with it."""
    lease = kv.lease(60.0)
    kv.put("node", b"", lease=lease)
    register.is_creating.clear()
    register.may_create.clear()
    change = threading.Thread(target=kv.put, args=("a", b""), daemon=True)
    renewal = threading.Thread(target=lambda: renewed.append(kv._renew(lease)), daemon=True)
    renewed: list[bool] = []
    try:
        change.start()
        assert register.is_creating.wait(_STUCK_S)
        kv._journal._synced_s -= 3600.0
        renewal.start()
        renewal.join(_STUCK_S / 2)
        assert renewed == [True]
    finally:
        register.may_create.set()
    change.join(_STUCK_S)
    assert kv.get("a") is not None


def test_how_workers_are_is_told_without_a_version(kv: BucketKV, register: HeldRegister) -> None:
    """Else each node that trains would wake all others every few seconds."""
    lease = kv.lease(4.0)
    assert kv.put("n", b"", lease=lease) is not None
    with (
        VitalsPublisher(kv, "job", "a-1", lambda: lease) as publisher,
        contextlib.closing(BucketKV(StoreRegister(register._store))) as other,
    ):
        publisher.publish(Vitals(step=7), num_nodes=1)
        prefix = vitals_prefix("job")
        found = until("it is told", lambda: told(other, prefix))
        assert Vitals.from_json(found[f"{prefix}a-1"]).step == 7
        assert other._journal.number == 1


def test_a_beat_that_is_none_tells_nothing() -> None:
    assert told_in(beat_content("nonce", {"k": b"\x00"})) == {"k": b"\x00"}
    for content in (b"", b"nonce", b"nonce [1]", b'nonce {"k": 1}', b'nonce {"k": "?"}', b"\xff\xfe {"):
        assert told_in(content) == {}


def test_what_clients_that_are_gone_have_left_is_swept(register: HeldRegister) -> None:
    journal = SharedJournal(register, 0.005, lambda: None)
    journal.change(PutKey("k", b"", None, 0xAB, 4.0))
    left = [f"{BEAT}cd", f"{WISH}x", f"{TURN}{7:016d}"]
    for name in [*left, f"{BEAT}ab"]:
        register.write(name, b"")
    tidier = Upkeep(register, journal, 0.0)
    for hour in range(3):
        assert set(left) <= {n for prefix in (BEAT, WISH, TURN) for n in register.names(prefix)}
        tidier.tidy(hour * upkeep._SWEEP_EVERY_S)
    assert register.names(BEAT) == [f"{BEAT}ab"]
    assert register.names(WISH) == register.names(TURN) == []
    assert register.names(LOG) == [version_name(1)]


def test_a_lease_that_was_never_renewed_stands_in_nobodys_way() -> None:
    """Who asks for a drain renews nothing: the node before it in the ring is looked at nevertheless."""
    judge, leases = Judge(), {3: 4.0, 5: 60.0, 8: 4.0}
    beats = {3: b"beat", 5: None}
    for now_s in range(12):
        looked = judge.begin(leases, [8], float(now_s))
        for lease_id in looked:
            judge.note(lease_id, beats[lease_id], float(now_s), float(now_s))
        if ended := judge.ended(leases, looked):
            break
    assert ended == [3]


def test_a_client_that_closes_leaves_nothing_of_its_wishes(register: HeldRegister) -> None:
    """Also one that has asked for one thing, and has no thread."""
    rivals = BucketKV(StoreRegister(register._store))
    number = 0
    create = register.create

    def overtaken(name: str, content: bytes) -> bool:
        nonlocal number
        if name.startswith(LOG) and number < 3:
            number += 1
            assert rivals.put("k", b"") is not None
        return create(name, content)

    register.create = overtaken  # type: ignore[method-assign]
    with contextlib.closing(rivals), contextlib.closing(BucketKV(register)) as kv:
        assert kv.put("mine", b"") is not None
        assert register.names(WISH) != []
    assert register.names(WISH) == register.names(TURN) == []
