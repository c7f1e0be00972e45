"""Who has each save of a rank, through all that may happen between a worker and its service."""

from __future__ import annotations

from typing import Any

import pytest

from storage.arena.slot import Slot
from storage.run.attempt import Attempt
from storage.saving.committer import Running
from storage.saving.uploads import SaveJob, Tried
from storage.service.custody import Custody
from storage.service.handed import Handed
from tests.storage.test_service_messages import STAGE


class Memory:
    """A staged state: how its memory was let go."""

    is_pending = False

    def __init__(self) -> None:
        self.how: list[str] = []

    def release(self) -> None:
        self.how.append("released")

    def abandon(self) -> None:
        self.how.append("abandoned")


class Save:
    def __init__(self, name: str, *, sent: bool = True) -> None:
        self.memory = Memory()
        staged: Any = self.memory
        job = SaveJob(Attempt.of_step(1, name, 1), 0, [], None, 0.0, staged=staged)
        self.name, self.running = name, Running(job)
        stage = STAGE.model_copy(update={"attempt": STAGE.attempt.model_copy(update={"id": name})})
        self.handed = Handed(self.running, stage, Slot.create(1), Slot.create(1), is_sent=sent)


@pytest.fixture
def custody() -> Custody:
    return Custody()


def parked(custody: Custody, name: str, *, sent: bool = True) -> Save:
    """A save that waits for its word at the service."""
    save = Save(name, sent=sent)
    custody.park(name)
    assert custody.hand(save.handed)
    return save


def test_what_gives_way_while_no_service_is_there_is_told_to_the_next(custody: Custody) -> None:
    """Or it would begin that once this process has died."""
    save = parked(custody, "a")
    custody.give_way(save.running, is_connected=False)
    assert save.memory.how == ["abandoned"], "it may be read there for ever"
    assert custody.come_back() == ["a"]
    custody.repeat(["a"])  # that service has gone before it could hear it
    assert custody.come_back() == ["a"]
    assert custody.come_back() == []
    assert custody.handed == {}


def test_what_gives_way_of_a_service_that_is_there_is_free_when_that_says_so(custody: Custody) -> None:
    save = parked(custody, "a")
    custody.give_way(save.running, is_connected=True)
    assert save.memory.how == []
    assert custody.release("a") is save.running
    assert custody.come_back() == [], "it hears of it by the next"


def test_what_was_never_sent_is_free_at_once(custody: Custody) -> None:
    save = parked(custody, "a", sent=False)
    custody.give_way(save.running, is_connected=True)
    assert save.memory.how == ["released"]
    assert custody.come_back() == []


def test_what_waits_is_the_next_services_again(custody: Custody) -> None:
    other, save = Save("a"), parked(custody, "b")
    custody.hand(other.handed)
    assert custody.lose() == [other.handed]
    assert custody.handed == {}
    assert custody.come_back() == ["a"]
    assert list(custody.handed) == ["b"]
    assert save.handed.waits
    assert custody.go_on("b") is None
    assert not save.handed.waits


def test_what_goes_on_while_no_service_is_there_is_carried_out_here_and_that_told_to_the_next(
    custody: Custody,
) -> None:
    save = parked(custody, "a")
    custody.lose()
    assert custody.go_on("a") is save.handed
    assert save.handed.tried is Tried.BEGUN
    assert custody.come_back() == ["a"]
    assert custody.handed == {}


def test_what_waits_in_the_worker_and_gives_way_is_told_to_the_next_service(custody: Custody) -> None:
    save = parked(custody, "a")
    custody.lose()
    custody.give_way(save.running, is_connected=True)
    assert save.memory.how == ["abandoned"]
    assert custody.come_back() == ["a"]


@pytest.mark.parametrize("gives_way", [True, False])
def test_what_cannot_be_handed_over_waits_here(gives_way: bool, custody: Custody) -> None:
    save = Save("a", sent=False)
    custody.park("a")
    assert custody.keep_back(save.running)
    assert custody.come_back() == []
    assert custody.handed == {}
    if gives_way:
        custody.give_way(save.running, is_connected=True)
        assert save.memory.how == ["released"]
        assert custody.go_on("a") is None
    else:
        assert custody.go_on("a") is save.running
        assert save.memory.how == []


def test_what_cannot_be_handed_over_and_does_not_wait_begins_at_once(custody: Custody) -> None:
    assert not custody.keep_back(Save("a").running)


def test_what_has_given_way_before_its_copy_was_whole_is_nobodys(custody: Custody) -> None:
    for number, late in enumerate((True, False)):
        save = Save(f"{number}", sent=False)
        custody.park(save.name)
        custody.give_way(save.running, is_connected=True)
        assert save.memory.how == []
        if late:
            assert custody.keep_back(save.running)
        else:
            assert not custody.hand(save.handed)
        assert save.memory.how == ["released"]
    assert custody.handed == {}


def test_what_a_service_refuses_waits_here_and_is_no_ones_to_be_told_of(custody: Custody) -> None:
    save = parked(custody, "a")
    assert custody.refuse("a") is save.handed
    assert custody.go_on("a") is save.handed
    assert custody.come_back() == []
    assert custody.refuse("b") is None


@pytest.mark.parametrize("holds", [True, False])
def test_a_slot_is_free_at_its_end_unless_a_state_is_held_there(holds: bool, custody: Custody) -> None:
    save = Save("a")
    custody.hand(save.handed)
    assert custody.end("a", holds=holds) is save.handed
    assert save.memory.how == ([] if holds else ["released"])
    assert custody.end("a", holds=holds) is None
    kept = custody.let_go_of_kept()
    assert [running.is_shared for running in kept] == [True] * holds
    assert custody.let_go_of_kept() == []


def test_a_slot_that_is_released_first_is_free_then(custody: Custody) -> None:
    save = Save("a")
    custody.hand(save.handed)
    assert custody.release("a") is save.running
    assert save.handed.tried is Tried.STORED
    custody.end("a", holds=True)
    assert save.memory.how == ["released"]
    assert custody.let_go_of_kept() == []
