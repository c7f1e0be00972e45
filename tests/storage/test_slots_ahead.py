"""Slots that are made before they are needed: a save that needs one meanwhile waits for a piece of it at most."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from storage.arena import ahead
from storage.arena.ahead import SlotAhead
from storage.arena.arena import Arena
from storage.arena.slot import Slot
from tests.cluster import until
from tests.storage.test_slots import MIB, slots_held

WAIT_S = 60.0


class Making:
    """Holds who makes a slot ahead up in its second piece of 1 MiB, until it is let go on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.pieces: list[tuple[int, int, bool]] = []
        self.reached, self.goes_on = threading.Event(), threading.Event()
        self.lack: MemoryError | None = None
        populate = Slot.populate

        def slowly(slot: Slot, begin: int, stop: int, *, is_ahead: bool = False) -> None:
            self.pieces.append((begin, stop, is_ahead))
            if is_ahead and begin:
                self.reached.set()
                assert self.goes_on.wait(WAIT_S)
                if self.lack is not None:
                    raise self.lack
            populate(slot, begin, stop, is_ahead=is_ahead)

        patch.setattr(Slot, "populate", slowly)
        patch.setattr(ahead, "_PIECE_BYTES", MIB)
        patch.setattr("storage.arena.arena.free_bytes", lambda: None)

    @contextlib.contextmanager
    def of(self, arena: Arena, size_bytes: int) -> Iterator[None]:
        """Inside, a thread is in the midst of making a slot ahead."""
        thread = threading.Thread(target=arena.prepare, args=(size_bytes,))
        thread.start()
        try:
            assert self.reached.wait(WAIT_S)
            yield
        finally:
            self.goes_on.set()
            thread.join(WAIT_S)
            assert not thread.is_alive()


@pytest.fixture
def making(monkeypatch: pytest.MonkeyPatch) -> Iterator[Making]:
    before = slots_held()
    making = Making(monkeypatch)
    yield making
    making.goes_on.set()
    assert not slots_held() - before


def test_nobody_begins_one_that_was_asked_for_before_the_last_save(making: Making) -> None:
    """The thread that is to make it has been busy since, and comes to it when the process is about to end."""
    arena = Arena(3)
    used = arena.take(MIB)
    arena.leave_off()
    arena.prepare(MIB)
    assert arena.num_made == 1
    other = arena.take(MIB)  # a stop may be put off
    arena.prepare(MIB)
    assert arena.num_made == 3
    assert used is not None and other is not None
    arena.give_back(used)
    arena.give_back(other)
    arena.close()


def beside(making: Making, arena: Arena, call: Callable[[], Slot | None]) -> Slot | None:
    """What comes of a call on a thread, while a slot is made that goes on once the call has left or taken that."""
    found: list[Slot | BaseException | None] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    made = arena._ahead
    assert made is not None
    thread = threading.Thread(target=run)
    thread.start()
    try:
        until("the call to have come to the slot", lambda: made._is_left)
    finally:
        making.goes_on.set()
        thread.join(WAIT_S)
    assert not thread.is_alive()
    (slot,) = found
    if isinstance(slot, BaseException):
        raise slot
    return slot


def test_a_save_takes_over_what_is_being_made(making: Making) -> None:
    arena = Arena(2)
    with making.of(arena, 6 * MIB):
        slot = beside(making, arena, lambda: arena.take(6 * MIB))
    assert slot is not None
    assert os.fstat(slot.fd).st_blocks * 512 == slot.size_bytes == 6 * MIB
    assert making.pieces == [(0, MIB, True), (MIB, 2 * MIB, True), (2 * MIB, 6 * MIB, False)]
    assert (arena.num_made, arena.num_free) == (1, 1), "it is nobody else's"
    arena.give_back(slot)
    arena.close()


def test_a_slot_that_is_taken_as_it_becomes_whole_is_not_free_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    make, is_whole, goes_on = SlotAhead.make, threading.Event(), threading.Event()

    def made(self: SlotAhead) -> Slot | None:
        slot = make(self)
        is_whole.set()
        assert goes_on.wait(WAIT_S)
        return slot

    monkeypatch.setattr(SlotAhead, "make", made)
    arena = Arena(2)
    thread = threading.Thread(target=arena.make_ahead, args=(MIB,))
    thread.start()
    try:
        assert is_whole.wait(WAIT_S)
        slot = arena.take(MIB)
    finally:
        goes_on.set()
        thread.join(WAIT_S)
    assert slot is not None
    assert (arena.num_made, arena.num_free) == (1, 1)
    arena.give_back(slot)
    arena.close()


def test_a_save_waits_for_none_where_one_has_come_back_meanwhile(making: Making) -> None:
    arena = Arena(2)
    first = arena.take(2 * MIB)
    assert first is not None
    with making.of(arena, 2 * MIB):
        arena.give_back(first)
        assert arena.take(2 * MIB) is first, "though whoever makes the other stands still"
    assert arena.num_made == 2
    arena.give_back(first)
    arena.close()


def test_what_would_be_too_small_is_not_made_to_its_end(making: Making) -> None:
    arena = Arena(2)
    with making.of(arena, 4 * MIB):
        slot = beside(making, arena, lambda: arena.take(8 * MIB))
    assert slot is not None
    assert slot.size_bytes == 8 * MIB
    assert (2 * MIB, 3 * MIB, True) not in making.pieces
    assert arena.num_made == 1
    arena.give_back(slot)
    arena.close()


@pytest.mark.parametrize("leave", [Arena.leave_off, Arena.close])
def test_nothing_is_left_of_what_nobody_needs_any_more(making: Making, leave: Callable[[Arena], Slot | None]) -> None:
    arena = Arena(2)
    with making.of(arena, 4 * MIB):
        beside(making, arena, lambda: leave(arena))
    assert (2 * MIB, 3 * MIB, True) not in making.pieces
    assert arena.num_made == 0


@pytest.mark.parametrize("takes", [False, True])
def test_a_lack_of_memory_in_the_midst_of_it_leaves_nothing(making: Making, takes: bool) -> None:
    making.lack = MemoryError("none")
    arena = Arena(2)
    with making.of(arena, 4 * MIB):
        if takes:
            with pytest.raises(MemoryError, match=r"^none$"):
                beside(making, arena, lambda: arena.take(4 * MIB))
    assert arena.num_made == 0
    making.lack = None
    arena.prepare(4 * MIB)
    assert arena.num_made == 1
    arena.close()
