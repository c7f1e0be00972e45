"""Where shared memory is mapped, and which pages are made for it."""

from __future__ import annotations

import errno
import gc
import mmap
import os
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from storage.arena import mapping
from storage.arena import slot as slots
from storage.arena.ahead import SlotAhead
from storage.arena.arena import Arena
from storage.arena.mapping import HUGE_PAGE_BYTES, PAGE_BYTES, HugePages
from storage.arena.slot import Slot

MIB = 1024 * 1024


def mapped_now() -> set[tuple[int, int]]:
    """From where to where slots are mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    reaches = [line.split()[0].split("-") for line in lines if "memfd:elastic-moe-slot" in line]
    return {(int(begin, 16), int(end, 16)) for begin, end in reaches}


def reach_of(address: int) -> tuple[int, int] | None:
    """From where to where that is mapped which begins there; None if nothing does."""
    gc.collect()
    return next((reach for reach in mapped_now() if reach[0] == address), None)


def test_every_slot_begins_where_a_huge_page_may() -> None:
    for size_bytes in (1, PAGE_BYTES, 3 * MIB, 8 * MIB):
        mine = Slot.create(size_bytes)
        theirs = Slot.from_fd(os.dup(mine.fd))
        assert (mine.address % HUGE_PAGE_BYTES, theirs.address % HUGE_PAGE_BYTES) == (0, 0)
        assert mine.memory.nbytes == theirs.memory.nbytes == mine.size_bytes
        mine.memory[-1] = 7
        assert theirs.memory[-1] == 7
        mine.close()
        theirs.close()


def test_a_mapping_goes_with_the_last_view_of_it_and_takes_no_more_room_than_its_own() -> None:
    slot = Slot.create(3 * MIB)
    address, size_bytes = slot.address, slot.size_bytes
    assert reach_of(address) == (address, address + size_bytes)
    view = slot.memory[5:9]
    view[:] = b"abcd"
    slot.close()
    assert bytes(view) == b"abcd"
    assert reach_of(address) is not None
    del view
    assert reach_of(address) is None


def test_what_is_to_be_done_before_a_mapping_ends_is_done_before_however_it_ends() -> None:
    """Of a circle that the collector finds the parts end in any order; a device must know before its memory goes."""
    seen: list[bool] = []

    def told(slot: Slot) -> Slot:
        address = slot.address
        slot.before_close(lambda: seen.append(reach_of(address) is not None))
        return slot

    closed = told(Slot.create(PAGE_BYTES))
    closed.close()
    assert seen == [True]
    memory_first = told(Slot.create(PAGE_BYTES))
    memory_first._close.detach()  # as if the collector came to that last
    fd = memory_first._fd
    del memory_first
    assert seen == [True, True]
    os.close(fd)


def test_a_slot_holds_what_it_is_made_of_and_is_mapped_when_it_is_looked_at() -> None:
    before = mapped_now()
    parts: list[bytes | memoryview] = [b"ab", b"", memoryview(b"cde"), *[b"f"] * 3000]
    slot = Slot.of(parts)
    assert mapped_now() == before
    theirs = Slot.from_fd(os.dup(slot.fd))
    assert bytes(slot.memory) == bytes(theirs.memory) == b"".join(parts)
    slot.close()
    theirs.close()
    assert mapped_now() == before
    never = Slot.of([b"x"])
    never.close()
    with pytest.raises(ValueError, match="closed"):
        _ = never.memory


def test_where_huge_pages_are_not_to_be_had_nobody_goes_on_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory in pieces, where the kernel says no, or moves what lies between for a long time."""
    advise, asked = mapping._advise, list[int]()

    def refuse(address: int, size_bytes: int, advice: int) -> None:
        if advice == mapping._MADV_COLLAPSE:
            asked.append(size_bytes)
            if mapping._COLLAPSE_S_MAX > 0:
                raise OSError(errno.EAGAIN, "none")
            return
        advise(address, size_bytes, advice)

    monkeypatch.setattr(mapping, "_advise", refuse)
    monkeypatch.setattr(mapping, "_AT_ONCE_BYTES", 2 * MIB)
    for seconds in (1.0, -1.0):
        asked.clear()
        monkeypatch.setattr(mapping, "_COLLAPSE_S_MAX", seconds)
        slot = Slot.create(6 * MIB)
        assert asked == [2 * MIB]
        assert os.fstat(slot.fd).st_blocks * 512 == slot.size_bytes
        slot.close()
    monkeypatch.setattr(mapping, "_COLLAPSE_AHEAD_S_MAX", 60.0)
    ahead = SlotAhead(6 * MIB).make()
    assert asked == [2 * MIB] * 4, "there is more time where nobody waits"
    assert ahead is not None
    ahead.close()
    monkeypatch.setattr(mapping, "_COLLAPSE_AHEAD_S_MAX", -1.0)
    ahead = SlotAhead(6 * MIB).make()
    assert asked == [2 * MIB] * 7, "and it is tried again now and then"
    assert ahead is not None
    ahead.close()


def test_a_processor_that_others_use_makes_no_page_costly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a training that has all of them a slot took long, and was of small pages for that reason alone."""
    advise, asked = mapping._advise, list[int]()
    clocks = {"monotonic": 0.0, "thread_time": 0.0}
    takes = {"monotonic": 0.9, "thread_time": 0.2}

    def slowly(address: int, size_bytes: int, advice: int) -> None:
        if advice == mapping._MADV_COLLAPSE:
            asked.append(size_bytes)
            for name in clocks:
                clocks[name] += takes[name]
        advise(address, size_bytes, advice)

    monkeypatch.setattr(mapping, "_advise", slowly)
    monkeypatch.setattr(mapping, "_AT_ONCE_BYTES", 2 * MIB)
    monkeypatch.setattr(mapping, "time", Mock(**{f"{name}.side_effect": partial(clocks.get, name) for name in clocks}))
    for seconds, num_asked in (((0.9, 0.2), 3), ((0.9, 0.3), 1), ((1.1, 0.2), 1)):
        takes["monotonic"], takes["thread_time"] = seconds
        asked.clear()
        slot = Slot.create(6 * MIB)
        assert len(asked) == num_asked
        slot.close()


def test_huge_pages_are_made_of_whole_blocks_only_and_what_is_in_them_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    advise = mapping._advise

    def heard(address: int, size_bytes: int, advice: int) -> None:
        if advice == mapping._MADV_COLLAPSE and 0 <= address - slot.address < slot.size_bytes:
            asked.append((address - slot.address, size_bytes))
        advise(address, size_bytes, advice)

    slot = Slot.create_empty(8 * MIB)
    monkeypatch.setattr(mapping, "_advise", heard)
    slot.populate(0, MIB)
    slot.memory[:4] = b"abcd"
    slot.populate(MIB, 5 * MIB + 1)
    slot.memory[3 * MIB : 3 * MIB + 4] = b"efgh"
    slot.populate(0, 8 * MIB)
    assert asked == [(2 * MIB, 2 * MIB), (0, 8 * MIB)]
    assert bytes(slot.memory[:4]) + bytes(slot.memory[3 * MIB : 3 * MIB + 4]) == b"abcdefgh"
    assert os.fstat(slot.fd).st_blocks * 512 == slot.size_bytes
    slot.close()


@pytest.mark.parametrize("advice", ["_MADV_COLLAPSE", "_MADV_POPULATE_WRITE"])
def test_a_kernel_that_knows_no_such_advice_makes_small_pages(advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, advice, 9999)
    slot = Slot.create(5 * MIB)
    assert os.fstat(slot.fd).st_blocks * 512 == slot.size_bytes
    assert not any(slot.memory[::PAGE_BYTES])
    slot.close()


def test_what_cannot_be_mapped_is_an_error_that_leaves_nothing() -> None:
    def num_mappings() -> int:
        return Path("/proc/self/maps").read_text().count("\n")

    before = num_mappings()
    with open(os.devnull, "rb") as file:
        for size_bytes in (0, 5000, 1 << 50) * 100:
            with pytest.raises(OSError):
                mapping.mapped(file.fileno(), size_bytes)
    assert num_mappings() < before + 50


@pytest.mark.parametrize(("costly", "expected"), [("", "wwwwww"), ("1", "p.wwww"), ("2", "wp.www"), ("123", "p.p.p.")])
def test_huge_pages_are_asked_for_where_they_are_cheap_and_what_is_there_stays(
    costly: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a virtual machine whose host has to back what lies free in large blocks; which look finds a costly page.

    Six times for the same memory: for the whole of it (w), for the first page only (p), or, once there was a costly one
    and until so much has gone without, for none (.).
    """
    asked: list[tuple[int, int]] = []
    advise = mapping._advise

    def recorded(address: int, size_bytes: int, advice: int) -> None:
        if advice == mmap.MADV_HUGEPAGE:
            asked.append((address, size_bytes))
        advise(address, size_bytes, advice)

    monkeypatch.setattr(mapping, "_advise", recorded)
    array = np.full(4 * HUGE_PAGE_BYTES, 7, np.uint8)
    monkeypatch.setattr(mapping, "_WITHOUT_BYTES", array.nbytes)
    times_s = iter([time_s for look in "123456" for time_s in (0.0, 1.0 if look in costly else 0.0)])
    pages = HugePages(clock=lambda: next(times_s))
    address, first = array.ctypes.data, -(-array.ctypes.data // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    last = (address + array.nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    names = {(): ".", ((first, HUGE_PAGE_BYTES),): "p", ((first, HUGE_PAGE_BYTES), (first, last - first)): "w"}
    found = ""
    for _ in range(6):
        asked.clear()
        pages.advise(address, array.nbytes)
        pages.advise(address, PAGE_BYTES)  # too little for one
        found += names[tuple(asked)]
    assert found == expected and bool((array == 7).all())


@pytest.mark.parametrize("costly", [None, 1, 2])
def test_huge_pages_end_with_the_first_that_is_costly(costly: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where some lie free that were in use, and behind them such as the machine's host has to back first."""
    begin, told = 10 * HUGE_PAGE_BYTES, list[tuple[int, int, int]]()
    within = begin - 5, begin + 3 * HUGE_PAGE_BYTES + 5
    clock = [0.0]

    def advise(address: int, size_bytes: int, advice: int) -> None:
        is_first = (address, size_bytes, advice) not in told
        told.append((address, size_bytes, advice))
        if advice == mapping._MADV_POPULATE_WRITE and is_first:
            clock[0] += 1.0 if costly is not None and address == begin + costly * HUGE_PAGE_BYTES else 0.0

    monkeypatch.setattr(mapping, "_advise", advise)
    pages = HugePages(clock=lambda: clock[0])
    assert pages.advise(within[0], within[1] - within[0])
    pieces = ((begin - 5, 9), (begin + HUGE_PAGE_BYTES - 1, 2), (begin + 2 * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + 5))
    num_before = 3 if costly is None else costly
    assert [pages.make(*piece, within) for piece in pieces] == [n < num_before for n in range(3)]
    made = {address for address, _, advice in told if advice == mapping._MADV_POPULATE_WRITE}
    assert made == {begin + n * HUGE_PAGE_BYTES for n in range(min(3, num_before + 1))}
    small = [(address, address + size) for address, size, advice in told if advice == mmap.MADV_NOHUGEPAGE]
    assert small[:1] == ([] if costly is None else [(begin + (costly + 1) * HUGE_PAGE_BYTES, within[1])])


def test_a_slot_that_is_made_ahead_may_take_longer_than_one_that_a_save_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(slots, "populate", lambda *_, is_ahead, has_huge: told.append(is_ahead))
    arena = Arena()
    arena.prepare(MIB)
    arena.take(2 * MIB)
    assert told == [True, False]
    arena.close()


def test_pages_are_made_where_there_are_none_and_looked_for_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    advise = mapping._advise

    def recorded(address: int, size_bytes: int, advice: int) -> None:
        made.append(size_bytes)
        advise(address, size_bytes, advice)

    monkeypatch.setattr(mapping, "_advise", recorded)
    with mmap.mmap(-1, 1 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        address = np.frombuffer(memory, np.uint8).ctypes.data
        for _ in range(2):
            mapping.make_pages(address, 1 * MIB)
        assert made == [1 * MIB]
        memory[5] = 7
        mapping.make_pages(address + 1, PAGE_BYTES)  # no whole page
        assert (made, memory[5]) == ([1 * MIB], 7)
