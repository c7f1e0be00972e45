"""Who holds a key: one of many candidates, whose claim is never mistaken for another's."""

from __future__ import annotations

from typing import TypeVar

import pytest

from launcher.errors import KVUnavailable
from launcher.kv import KV, Election, Entry, Follower, Lease, Prefixed, Snapshot
from tests.launcher.stores import Connect

T = TypeVar("T")
KEY = "job/leader"


class Deaf(Prefixed):
    """A store that carries out writes whose answers are lost: the next `num`; or, with `down`, does not."""

    def __init__(self, kv: KV) -> None:
        super().__init__(kv, "")
        self.num = 0
        self.down = False

    def put(
        self, key: str, value: bytes, *, if_revision: int | None = None, lease: Lease | None = None
    ) -> Entry | None:
        written = None if self.down else super().put(key, value, if_revision=if_revision, lease=lease)
        return self._unless_lost(written)

    def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        return self._unless_lost(False if self.down else super().delete(key, if_revision=if_revision))

    def _unless_lost(self, answer: T) -> T:
        if self.num:
            self.num -= 1
            raise KVUnavailable("no answer")
        return answer


class Candidate:
    """One with its own client and lease."""

    def __init__(self, name: str, connect: Connect) -> None:
        self.kv = Deaf(connect())
        self.lease = self.kv.lease(30)
        self.name = name.encode()
        self.election = Election(self.kv, KEY)

    def campaign(self) -> Entry | None:
        return self.election.campaign(self.name, self.lease)

    def catch_up(self) -> None:
        """Observe what the key shows now."""
        with Follower(self.kv, KEY) as follower:
            found = follower.next(10)
            assert isinstance(found, Snapshot)
            self.election.observe(found.entries[0] if found.entries else None, found.revision)


@pytest.fixture
def a(connect: Connect) -> Candidate:
    return Candidate("a", connect)


@pytest.fixture
def b(connect: Connect) -> Candidate:
    return Candidate("b", connect)


def leader(candidate: Candidate) -> bytes | None:
    there = candidate.election.leader()
    return there.value if there else None


def test_one_of_two_is_elected_and_the_other_does_not_wait(a: Candidate, b: Candidate) -> None:
    assert leader(a) is None
    claim = a.campaign()
    assert claim is not None and claim == a.election.held == b.election.leader()
    assert b.campaign() is None
    assert b.election.held is None
    assert a.campaign() == claim, "once more is the same claim"
    b.election.resign()
    assert leader(b) == b"a", "what another holds is not resigned"


def test_a_claim_ends_with_its_lease(a: Candidate, b: Candidate) -> None:
    a.campaign()
    a.lease.revoke()
    assert b.campaign() is not None
    a.catch_up()
    assert a.election.held is None
    assert a.campaign() is None, "and there is none under a lease that has ended"
    b.election.resign()
    assert a.campaign() is None


def test_a_claim_whose_answer_was_lost_is_held_by_campaigning_again(a: Candidate) -> None:
    a.kv.num = 1
    with pytest.raises(KVUnavailable):
        a.campaign()
    assert a.election.held is None
    assert a.campaign() == a.election.held == a.election.leader() is not None


def test_a_claim_whose_answer_was_lost_is_held_once_it_is_seen(a: Candidate) -> None:
    a.kv.num = 1
    with pytest.raises(KVUnavailable):
        a.campaign()
    a.catch_up()
    assert a.election.held == a.election.leader() is not None
    a.election.resign()
    assert leader(a) is None


def test_what_was_seen_before_the_claim_says_nothing_of_it(a: Candidate, b: Candidate) -> None:
    before = b.campaign()
    assert before is not None
    b.election.resign()
    claim = a.campaign()
    assert claim is not None
    a.election.observe(before, before.revision)
    a.election.observe(None, before.revision + 1)
    assert a.election.held == claim
    a.election.resign()
    a.election.observe(claim, claim.revision)
    assert a.election.held is None, "an own claim of before the resignation"


def test_a_proclamation_changes_the_claim_and_no_other(a: Candidate, b: Candidate) -> None:
    claim = a.campaign()
    assert claim is not None
    said = a.election.proclaim(b"a, busy")
    assert said is not None and said.create_revision == claim.create_revision
    assert leader(b) == b"a, busy"
    assert b.election.depose(said.revision)
    assert not b.election.depose(said.revision)
    assert b.campaign() is not None
    assert a.election.proclaim(b"a, still") is None
    assert a.election.proclaim(b"a, still") is None
    assert leader(a) == b"b"


def test_a_proclamation_whose_answer_was_lost_is_still_an_own_claim(a: Candidate) -> None:
    a.campaign()
    a.kv.num = 1
    with pytest.raises(KVUnavailable):
        a.election.proclaim(b"a, busy")
    a.catch_up()
    assert a.election.held == a.election.leader() is not None
    a.election.resign()
    assert leader(a) is None


def test_resigning_makes_room_at_once(a: Candidate, b: Candidate) -> None:
    a.campaign()
    a.election.resign()
    assert b.campaign() is not None
    a.election.resign()
    assert leader(a) == b"b"


def test_a_resignation_can_be_tried_again(a: Candidate) -> None:
    a.campaign()
    a.kv.down, a.kv.num = True, 1
    with pytest.raises(KVUnavailable):
        a.election.resign()
    a.kv.down = False
    a.election.resign()
    assert leader(a) is None


@pytest.mark.parametrize("num_lost", [0, 1, 2])
def test_last_words_stay_until_the_lease_ends(num_lost: int, a: Candidate, b: Candidate) -> None:
    a.campaign()
    a.kv.num = num_lost
    a.election.resign(b"a left")
    assert a.election.held is None
    assert leader(b) == b"a left"
    assert b.campaign() is None
    a.lease.revoke()
    assert b.campaign() is not None


def test_last_words_are_given_up_where_the_store_is_down(a: Candidate) -> None:
    a.campaign()
    a.kv.down, a.kv.num = True, 2
    a.election.resign(b"a left")
    assert leader(a) == b"a"
    assert a.election.held is None


def test_last_words_are_not_written_over_a_successor(a: Candidate, b: Candidate) -> None:
    claim = a.campaign()
    assert claim is not None
    assert b.election.depose(claim.revision)
    b.campaign()
    a.election.resign(b"a left")
    assert leader(a) == b"b"
