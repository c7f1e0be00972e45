"""A job that goes on from memory claims the run behind its restore; nothing is saved before the claim stands."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from storage.errors import Fenced, InUse, Transient, UsageError
from storage.events import Reporter
from storage.ranks.agreement import AgreeingGroup
from storage.run import heartbeat, in_use, owner
from storage.run.attempt import Attempt
from storage.run.owner import Claim, FailuresSeen, Owner
from storage.saving import claiming
from storage.saving.adoption import UnfinishedPart
from storage.saving.ownership import Ownership
from storage.stores.buffers import Buffer
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectInfo, ObjectStore
from storage.stores.wrapper import StoreWrapper
from tests.cluster import until
from tests.storage.heartbeat_cases import owner_of

STEP = 8
ATTEMPT = Attempt.of_step(STEP, "a" * 8, 1)
UNFINISHED = UnfinishedPart(ATTEMPT.prefix, STEP, ATTEMPT.id, 1, 0)


class Slow(StoreWrapper):
    """A store that takes the name of an owner only when it is let."""

    def __init__(self) -> None:
        self.inner = MemoryStore("slow")
        super().__init__(self.inner)
        self.is_let = threading.Event()
        self.is_away = False

    def impatient(self, timeout_s: float) -> Slow:
        return self

    def read(self, key: str) -> bytes:
        if self.is_away:
            raise Transient("nobody listens")
        return super().read(key)

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        if key == "owner.json" or key.startswith("beat-"):
            assert self.is_let.wait(60)
        return super().put(key, buffers, if_absent=if_absent)


Told = list[str]


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def store() -> Iterator[Slow]:
    found = Slow()
    yield found
    found.is_let.set()


def before(store: Slow, lineage: str = "l", generation: int = 1) -> Claim:
    """The claim of an earlier generation, or of another job."""
    mine, _ = owner.claim(store.inner, owner_of(lineage, "b", generation))
    heartbeat.write(store.inner, mine.token, 0)
    return Claim(store, mine)


def behind(store: Slow, told: Told, generation: int = 2, **options: Any) -> Ownership:
    report = Reporter(lambda event, fields: told.append(str(event)))
    mine = owner_of("l", "c", generation)
    group, find_held = AgreeingGroup(alone=True), lambda: [UNFINISHED]
    return Ownership(store, group, mine, report, take_over=False, find_held=find_held, can_wait=True, **options)


def recorded(store: Slow) -> Owner:
    found = owner.read_owner(store.inner)
    assert found is not None
    return found


def test_a_job_that_restores_from_memory_waits_for_its_claim_only_to_save(store: Slow, told: Told) -> None:
    older = before(store)
    with behind(store, told) as ownership:
        ownership.await_look()
        assert recorded(store).generation == 1, "it restores meanwhile"
        assert ownership.adopted_step == STEP
        confirmed = threading.Thread(target=ownership.confirm)
        confirmed.start()
        confirmed.join(0.05)
        assert confirmed.is_alive()
        older.check()
        store.is_let.set()
        confirmed.join(60)
        assert (recorded(store), recorded(store).adopts) == (ownership.claim.owner, (ATTEMPT.id,))
        assert ownership.claim.owner.epoch == 2
        ownership.claim.check()
        older.of_attempt(ATTEMPT.id).check()
        with pytest.raises(Fenced):
            older.check()
    assert told == ["checkpoint_adopted"]


def test_a_claim_keeps_away_from_a_restore_until_it_is_waited_for(
    store: Slow, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests would take the rank that reads its processor, and the interpreter its lock."""
    monkeypatch.setattr(claiming, "_RESTORE_S", 3600.0)
    store.is_let.set()
    before(store)
    with behind(store, told) as ownership:
        ownership.await_look()
        assert ownership._behind is not None
        is_wanted = ownership._behind._is_wanted
        until("it keeps away", lambda: bool(is_wanted._cond._waiters))  # type: ignore[attr-defined]
        assert recorded(store).generation == 1
        ownership.confirm()
        assert recorded(store).generation == 2
    monkeypatch.setattr(claiming, "_RESTORE_S", 0.0)
    with behind(store, told, generation=3):
        until("the claim, for which nobody waits", lambda: recorded(store).generation == 3)


def test_a_restore_waits_for_the_answer_whether_another_job_has_the_run(
    store: Slow, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    before(store, lineage="other")
    monkeypatch.setattr(in_use.Watch, "liveness", lambda self, now_s: in_use.Liveness.ALIVE)
    with behind(store, told) as ownership:
        for call in (ownership.await_look, ownership.confirm, ownership.confirm):
            with pytest.raises(InUse, match="is in use"):
                call()
    assert recorded(store).lineage == "other"


def test_a_generation_that_is_late_saves_nothing(store: Slow, told: Told) -> None:
    before(store, generation=3)
    store.is_let.set()
    with behind(store, told) as ownership:
        ownership.await_look()
        for call in (ownership.confirm, ownership.await_claim, ownership.settle):
            with pytest.raises(Fenced, match="may not take over"):
                call()
    assert recorded(store).generation == 3


def test_where_the_store_is_away_the_first_commit_claims(store: Slow, told: Told) -> None:
    before(store)
    store.is_away = True
    with behind(store, told) as ownership:
        ownership.await_look()
        ownership.confirm()
        assert (told, ownership.claim.owner.epoch) == (["checkpoint_claimed_later"], 0)
        store.is_away = False
        store.is_let.set()
        ownership.claim.check()
        assert recorded(store).token == ownership.claim.token


def test_a_job_that_ends_before_it_has_claimed_leaves_no_sign_of_life(store: Slow, told: Told) -> None:
    before(store)
    ownership = behind(store, told).start()
    ownership.await_look()
    closed = threading.Thread(target=ownership.close)
    closed.start()
    store.is_let.set()
    closed.join(60)
    assert not closed.is_alive()
    assert not [info.key for info in store.inner.list("beat-")]


def test_who_has_closed_claims_no_run_any_more(store: Slow, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store was silent for so long that nobody waited for it, and what claims next must not be fenced by that."""
    before(store)
    store.is_let.set()
    answers, read = threading.Event(), owner.read_owner
    monkeypatch.setattr(claiming, "_CLOSE_S", 0.0)
    monkeypatch.setattr(owner, "read_owner", lambda store: read(store) if answers.wait(60) else None)
    ownership = behind(store, told).start()
    ownership.close()
    answers.set()
    ownership.await_claim()
    assert (recorded(store).generation, told) == (1, [])


def test_a_store_that_is_away_at_the_first_save_ends_no_training(store: Slow, told: Told) -> None:
    before(store)
    store.is_let.set()
    with behind(store, told) as ownership:
        ownership.await_claim()
        store.is_away = True
        ownership.confirm()
        store.is_away = False
        store.inner.delete("owner.json")
        with pytest.raises(UsageError, match="does not see"):
            ownership.confirm()


def test_a_claim_that_comes_with_a_commit_knows_what_the_run_has_seen(store: Slow, told: Told) -> None:
    """Else each restart while the store is away has the job look like one that never fails, and hardly ever save."""
    older = before(store)
    store.is_away = True
    with behind(store, told) as ownership:
        ownership.confirm()
        assert ownership.claim.failures == FailuresSeen(0, 0.0)
        store.is_away = False
        store.is_let.set()
        ownership.claim.check()
        now = ownership.claim.owner
        assert (now.failures, now.since_unix_s) == (1, older.owner.since_unix_s)


def test_a_claim_of_which_nobody_heard_that_it_was_recorded_keeps_what_it_has_adopted(
    store: Slow, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    before(store)
    store.is_let.set()
    record = owner._record

    def unheard(at: ObjectStore, mine: Owner) -> Owner:
        record(at, mine)
        raise Transient("nobody answers any more")

    with monkeypatch.context() as silent:
        silent.setattr(owner, "_record", unheard)
        ownership = behind(store, told).start()
        ownership.await_claim()
    assert (told, ownership.claim.owner.epoch) == (["checkpoint_claimed_later"], 0)
    ownership.claim.check()
    assert ownership.claim.owner == recorded(store)
    assert ownership.claim.owner.adopts == (ATTEMPT.id,)
    ownership.claim.disown()
    assert (recorded(store).epoch, recorded(store).adopts) == (2, ())
    ownership.close()


def test_a_commit_that_claims_once_more_is_not_undone(store: Slow, told: Told) -> None:
    claim = before(store)
    again = claim.owner.model_copy(update={"epoch": 5})
    claim.recorded(again)
    claim.recorded(again.model_copy(update={"epoch": 4}))
    assert claim.owner.epoch == 5
