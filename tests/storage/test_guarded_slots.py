"""Slots that the service holds as well: no worker has to free them as it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from storage import Checkpointer
from storage.agent import AgentEnvironment
from storage.arena.arena import Arena
from storage.arena.slot import Slot
from storage.service import guarded_slots
from storage.service.capturing import LiveKeeper
from storage.service.channel import close_all
from storage.service.guarded_slots import GuardedSlots
from storage.service.server import ServerOptions
from storage.service.slot_teller import SlotTeller
from tests.cluster import until
from tests.storage.service_cases import PATIENCE_S, InThread, connected
from tests.storage.test_slots import MIB, slots_held

PLENTY = 1 << 60


class Guarding:
    """A service in this process that guards slots, and what a worker has of them."""

    def __init__(self, path: Path, *, keeps_live: bool = False) -> None:
        self.path, self.free = path, PLENTY
        self.running = InThread(path, ServerOptions(linger_s=PATIENCE_S, wind_up_s=PATIENCE_S))
        self.running.server.truce._clock = lambda: 0.0  # one lasts until it is ended
        self.slots = GuardedSlots(self.running.server.truce, lambda: self.free)
        self.slots.serve(self.running.server)
        if keeps_live:
            LiveKeeper(lambda part: None).serve(self.running.server)
        self.before = slots_held()

    @property
    def num_held(self) -> int:
        """How many slots there are in this process, worker's and service's."""
        return len(slots_held() - self.before)

    def close(self) -> None:
        self.slots.close()
        self.running.close()


@pytest.fixture
def guarding(tmp_path: Path) -> Iterator[Guarding]:
    guarding = Guarding(tmp_path / "private" / "service.sock")
    guarding.running.start()
    yield guarding
    guarding.close()
    until("all of it to be freed", lambda: guarding.num_held == 0)


@contextlib.contextmanager
def worker(guarding: Guarding) -> Iterator[Arena]:
    """An arena whose slots the service is told of; as where a process is killed, it ends with the connection."""
    with connected(guarding.path) as channel:
        arena = Arena(4, partial(SlotTeller().tell, channel, "saves"))
        yield arena
        arena.close()


def test_a_worker_frees_none_of_its_slots_as_it_ends_and_the_service_does_so_behind(guarding: Guarding) -> None:
    with worker(guarding) as arena:
        used = arena.take(MIB)
        arena.prepare(MIB)
        until("the service to have both", lambda: guarding.slots.size_bytes == 2 * MIB)
        arena.have_guarded()  # which it has
        guarding.running.server.truce.ask(PATIENCE_S)
        assert used is not None
        arena.give_back(used)
        arena.close()
        assert guarding.num_held == 2
    until("the end to be heard of", lambda: guarding.slots.size_bytes == 0)
    assert guarding.num_held == 2, "a job waits for what is done now"
    guarding.running.server.truce.end()
    until("both to be freed", lambda: guarding.num_held == 0)


def test_what_is_too_small_is_let_go_of_by_both(guarding: Guarding) -> None:
    with worker(guarding) as arena:
        small = arena.take(MIB)
        arena.have_guarded()
        until("the service to have it", lambda: guarding.slots.size_bytes == MIB)
        assert small is not None
        arena.give_back(small)
        large = arena.take(2 * MIB)
        until("the small one to be gone", lambda: guarding.num_held == 1)
        arena.have_guarded()
        until("the service to have the large one", lambda: guarding.slots.size_bytes == 2 * MIB)
        assert large is not None
        arena.give_back(large)
        arena.prepare(4 * MIB)
        until("the larger one to be all", lambda: guarding.slots.size_bytes == 4 * MIB and guarding.num_held == 1)


@pytest.mark.parametrize("when", ["from the beginning", "later"])
def test_where_memory_is_short_nothing_is_kept_for_later(guarding: Guarding, when: str) -> None:
    guarding.running.server.truce.ask(PATIENCE_S)
    with worker(guarding) as arena:
        arena.prepare(MIB)
        until("the service to have it", lambda: guarding.slots.size_bytes == MIB)
        if when == "from the beginning":
            guarding.free = MIB - 1
    guarding.free = MIB - 1
    until("it to be freed", lambda: guarding.num_held == 0)
    assert guarding.running.server.truce.is_on


def test_what_is_another_process_s_for_good_is_let_go_of_by_both(guarding: Guarding) -> None:
    with worker(guarding) as arena:
        dropped, kept = arena.take(MIB), arena.take(2 * MIB)
        arena.have_guarded()
        until("the service to have both", lambda: guarding.slots.size_bytes == 3 * MIB)
        assert dropped is not None and kept is not None
        arena.drop(dropped)
        until("the service to have the other alone", lambda: guarding.slots.size_bytes == 2 * MIB)
        until("nobody to have it", lambda: guarding.num_held == 1)
        arena.give_back(kept)


def test_a_service_that_was_started_anew_is_told_of_all_slots_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is killed before its next save would free them itself."""
    path = tmp_path / "private" / "service.sock"
    monkeypatch.setenv(AgentEnvironment.variable("service"), str(path))
    first, second = Guarding(path, keeps_live=True), None
    first.running.start()
    try:
        with Checkpointer(str(tmp_path / "run")) as ckpt:
            ckpt.save(1, {"w": torch.ones(MIB // 4)}, wait=True)
            arenas = ckpt._savers()[0]._arena, ckpt._start().live.state._arena  # type: ignore[union-attr]
            size_bytes = until("slots of both", lambda: all(arena.size_bytes for arena in arenas) and sum_of(arenas))
            until("the service to have them", lambda: first.slots.size_bytes == sum_of(arenas))
            first.close()
            second = Guarding(path, keeps_live=True)
            second.running.start()
            until("the next one to have them", lambda: second.slots.size_bytes == sum_of(arenas) >= size_bytes)
    finally:
        for guarding in (first, second):
            if guarding is not None:
                guarding.close()


def sum_of(arenas: Sequence[Arena]) -> int:
    return sum(arena.size_bytes for arena in arenas)


def test_arenas_that_share_a_connection_tell_of_their_own_slots_alone(guarding: Guarding) -> None:
    teller = SlotTeller()
    with connected(guarding.path) as channel, connected(guarding.path) as later:
        mine, other = (Slot.create(MIB) for _ in range(2))
        teller.tell(channel, "saves", [os.dup(mine.fd)])
        teller.tell(channel, "live", [os.dup(other.fd)])
        until("both", lambda: guarding.slots.size_bytes == 2 * MIB)
        teller.tell(channel, "live", [])
        until("one", lambda: guarding.slots.size_bytes == MIB)
        teller.tell(None, "saves", [os.dup(mine.fd)])
        teller.tell(later, "saves", [os.dup(mine.fd)])
        until("it by the next connection, too", lambda: guarding.slots.size_bytes == 2 * MIB)
        for slot in (mine, other):
            slot.close()


def test_who_tells_by_a_connection_that_was_makes_none_forget_what_was_told(guarding: Guarding) -> None:
    """A thread may have asked for the connection before it was there, and come to tell after another."""
    teller, slot = SlotTeller(), Slot.create(MIB)
    with connected(guarding.path) as before, connected(guarding.path) as channel:
        teller.tell(channel, "saves", [os.dup(slot.fd)])
        until("the service to have it", lambda: guarding.slots.size_bytes == MIB)
        slot.close()
        for late in (None, before):
            teller.tell(late, "live", [])
        teller.tell(channel, "saves", [])
        until("the service to have let go of it", lambda: guarding.num_held == 0)


def test_what_a_save_lets_go_of_while_it_is_told_of_is_not_kept() -> None:
    told: list[set[int]] = []
    taken: list[Slot | None] = []
    may_take = [True]

    def guard(copies: Sequence[int]) -> None:
        inodes = {os.fstat(fd).st_ino for fd in copies}
        close_all(copies)
        while may_take:  # once, as if another thread came now
            may_take.clear()
            taken.append(arena.take(2 * MIB))
        told.append(inodes)

    arena = Arena(2, guard)
    arena.prepare(MIB)
    (slot,) = taken
    assert slot is not None
    assert told[-1] == {os.fstat(slot.fd).st_ino}
    arena.close()
    arena.give_back(slot)


def test_a_process_that_can_have_no_more_descriptors_saves_on_and_has_none_guarded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Sequence[int]] = []
    made: list[int] = []
    arena = Arena(2, told.append)
    first, second = arena.take(MIB), arena.take(MIB)
    assert first is not None and second is not None

    def dup(fd: int) -> int:
        if made:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        made.append(fd)
        return fd

    monkeypatch.setattr("storage.arena.arena.os", SimpleNamespace(dup=dup, close=made.remove))
    arena.have_guarded()
    assert (told, made) == ([[]], []), "nor is one left"
    arena.give_back(second)
    made.append(-1)
    assert arena.take(2 * MIB) is not None
    assert told == [[], []]
    arena.close()


def test_a_worker_cannot_have_any_number_guarded(guarding: Guarding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_slots, "NUM_GUARDED_MAX", 2)
    with connected(guarding.path) as channel:
        slots = [Slot.create(1) for _ in range(4)]
        SlotTeller().tell(channel, "saves", [os.dup(slot.fd) for slot in slots])
        SlotTeller().tell(channel, "live", [])
        for slot in slots:
            slot.close()
        until("those that are too many to be gone", lambda: guarding.num_held == 2)


def test_a_service_without_threads_frees_at_once(guarding: Guarding, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> threading.Thread:
        raise RuntimeError("can't start new thread")

    with worker(guarding) as arena:
        arena.prepare(MIB)
        until("the service to have it", lambda: guarding.slots.size_bytes == MIB)
        guarding.running.server.truce.ask(PATIENCE_S)
        monkeypatch.setattr("storage.service.guarded_slots.threading.Thread", refuse)
    until("it to be freed", lambda: guarding.num_held == 0)


def test_the_last_save_before_a_stop_has_no_slot_made_for_the_next(tmp_path: Path) -> None:
    told: list[str] = []
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.start()
        saver = ckpt._savers()[0]
        stager, arena = saver._stager, saver._arena
        stager._pool = Recorded(told)  # type: ignore[assignment]
        ckpt.save(1, {"w": torch.ones(4)}, wait="held")
        assert told == []
        ckpt.save(2, {"w": torch.ones(4)})
        assert told == ["prepare"], "a stop may be put off"
        assert arena.num_made == 1


class Recorded:
    """A pool that does nothing but note what it is to do."""

    def __init__(self, told: list[str]) -> None:
        self._told = told

    def submit(self, call: object, *_: object) -> None:
        self._told.append(getattr(call, "__name__", ""))

    def shutdown(self, *, wait: bool) -> None:
        """Nothing."""


def test_who_cannot_tell_the_service_keeps_no_descriptor() -> None:
    before = slots_held()
    arena = Arena(2, partial(SlotTeller().tell, None, "saves"))
    arena.prepare(MIB)
    assert len(slots_held() - before) == 1
    arena.close()
    assert not slots_held() - before
